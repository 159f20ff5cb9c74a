"""The linear probe: known relations, no leak between halves, rotation taken off, a drafter left as it was."""

import pytest
import torch
from examples import STEPS, drafter, live, live_of, target

from kvshot_lib.probes import probe as query_probe
from kvshot_lib.probes.probe import (
    best_penalty,
    fit,
    probe,
    probe_anchors,
    probe_data,
    probe_rows,
    squares,
)
from kvshot_lib.probes.target_rows import compute_state, plain_queries
from kvshot_lib.text.corpus import Document
from kvshot_lib.training.anchors import find_anchors


def made(noise=0.0, rows=240):
    """Two layers of three label channels, linear in five states; 12 documents."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 5, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1]) + 3
    y = x @ torch.randn(5, 6, generator=generator) + 7 + noise * torch.randn(rows, 6, generator=generator)
    return x, y.view(-1, 2, 3), torch.arange(rows) % 12


def r2(errors):
    residual, total = errors.sum((0, 1)).tolist()
    return 1 - residual / total


def test_ridge_by_hand():
    """x = -1, 1 (spread √2), y = 0, 4: slope 2 per x without a penalty; with penalty 1 (the gram's trace) half of it."""
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [4.0]])
    for penalty, slope in ((0.0, 2.0), (1.0, 1.0)):
        mean, spread, centre, weights = fit(x, y, penalty)
        assert (mean.item(), centre.item(), (weights / spread).item()) == pytest.approx((0, 2, slope))
    errors = squares(torch.tensor([[3.0]]), torch.tensor([[[5.0]]]), fit(x, y, 0.0))
    assert errors.flatten().tolist() == pytest.approx([9, 9])  # 2 + 2·3 = 8 for 5; the mean is 2 for 5


def test_a_linear_label_is_found_and_shuffled_ones_are_not():
    true, shuffled = probe(*made())
    assert r2(true) > 0.999 and -0.4 < r2(shuffled) < 0.1
    noisy, _ = probe(*made(noise=5.0))
    assert 0.3 < r2(noisy) < 0.999
    assert true[..., 1].equal(probe(*made())[0][..., 1])


def test_no_document_is_scored_by_a_map_that_saw_it():
    """Labels that are a random number for each document: a map that had seen the document would do well."""
    x, _, document = made()
    x = torch.nn.functional.one_hot(document, 12).float()
    y = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))[document].view(-1, 2, 3)
    assert r2(probe(x, y, document)[0]) < 0.1
    assert r2(squares(x, y, fit(x, y.flatten(1), 1e-6))) > 0.999


def test_penalty_follows_the_noise():
    quiet, loud = made(), made(noise=300.0)
    assert best_penalty(*quiet) == min(query_probe.PENALTIES) and best_penalty(*loud) > min(query_probe.PENALTIES)
    assert best_penalty(quiet[0][:2], quiet[1][:2], torch.zeros(2)) == 0.1  # one document: nothing to choose by


def test_queries_without_rotation_are_what_the_target_projects():
    tokens = live().batch([1]).tokens[0]
    module, taken = target().model.get_decoder().layers[2].self_attn.q_proj, []
    handle = module.register_forward_hook(lambda _m, _i, output: taken.append(output[0]))
    state = compute_state(target(), tokens, (1, 2))
    handle.remove()
    plain = plain_queries(state, drafter("kv_1").rotary)
    assert plain.shape == (len(tokens), 2, 64)
    assert torch.allclose(plain[:, 1], taken[0].view(len(tokens), 4, 16).flatten(1), atol=1e-5)


@pytest.mark.parametrize("variant, width", [("kv_2", 64), ("hybrid", 128)])
def test_states_are_what_the_query_projection_reads(variant, width):
    built, document = drafter(variant), 1
    features = live().batch([document])
    anchors = find_anchors(features.answer_mask, STEPS)
    places = torch.arange(features.tokens.shape[1])
    before = [parameter.clone() for parameter in built.parameters()]
    data = probe_data(built, features, anchors, [0, 3, 6], places[:, None, None].expand(-1, 3, 2).float())
    rows = probe_anchors(anchors)
    assert rows.tolist() == anchors.valid[0, :, -1].nonzero()[:, 0].tolist()
    for (_, k), (x, y) in data.items():
        assert x.shape == (len(rows), width) and y[:, 0, 0].tolist() == (anchors.index[0, rows] + 1 + k).tolist()
    if variant == "kv_2":
        tokens = features.tokens[0, anchors.index[0, rows] + 1]
        assert torch.allclose(data[0, 0][0], built.layers[0].attention_norm(built.embed(tokens)), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))


def test_rows_of_several_documents():
    long = [Document(live().batch([4]).tokens[0].int().numpy(), live().batch([4]).answer_mask[0].numpy())] * 4
    source, built, data = live_of(*long), drafter("kv_1"), []
    for document in range(4):
        features = source.batch([document])
        state = compute_state(target(), features.tokens[0], source.spec.kv_layers)
        labels = plain_queries(state, built.rotary)
        data.append((document, probe_data(built, features, find_anchors(features.answer_mask, STEPS), [0, 6], labels)))
    rows = probe_rows([*data, (4, {})], source.spec.kv_layers)
    assert len(rows) == 2 * 2 * 4 * 3  # labels, steps, documents, target layers
    assert {row["document"] for row in rows} == {0, 1, 2, 3}
    assert all(row["residual"] >= 0 and row["total"] > 0 for row in rows)
