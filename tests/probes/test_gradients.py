"""Gradient flow of a trained drafter: closed forms for two entries, parts that sum to autograd's gradient, nothing changed after."""

import math
from types import SimpleNamespace

import blocks
import examples
import numpy as np
import pandas as pd
import pytest
import torch
from examples import STEPS
from finished import finished

from kvshot_lib.drafters.attention import _plain_attention, prefix_mask
from kvshot_lib.errors import StudyError
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.metrics import tables
from kvshot_lib.probes import gradients as flow
from kvshot_lib.probes.attention import draft_mass
from kvshot_lib.text.corpus import Document
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import predict
from kvshot_lib.training.loss import ttt_loss

EVERY = ("hidden", "hidden_post_norm", "kv_1", "kv_2", "hybrid", "cross_only", "kv_2_mlp", "none_1", "kv_1_unrotate")


def prepared(variant):
    """A drafter, features of two documents, and all their anchors."""
    features = examples.features(documents=(0, 4))
    return examples.drafter(variant), features, find_anchors(features.answer_mask, STEPS)


def test_the_mass_of_two_entries_in_closed_form():
    """One prefix entry with score 0 and one of the chain with score ln 3: the chain gets 3/4, and value gradients are split 1 to 3."""
    query = torch.tensor([2.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)  # head size 4: scores are halved
    prefix = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4, requires_grad=True)
    chain = torch.tensor([math.log(3), 0, 0, 0]).view(1, 1, 1, 1, 4), torch.zeros(1, 1, 1, 1, 4, requires_grad=True)
    mask = prefix_mask(torch.tensor([[1]]), 1)
    assert draft_mass(query, prefix, mask, chain).item() == pytest.approx(0.75)
    _plain_attention(query[:, :, None], prefix, mask, chain).sum().backward()
    assert prefix[1].grad.flatten().tolist() == pytest.approx([0.25] * 4)
    assert chain[1].grad.flatten().tolist() == pytest.approx([0.75] * 4)


def test_mass_equals_that_of_a_softmax_spelled_out_and_hidden_entries_get_none():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 3, 2, 8)
    query, keys, own = (torch.randn(shape, generator=generator) for shape in shapes)
    visible = torch.tensor([[1, 3, 5], [2, 2, 4]])
    found = draft_mass(query, (keys, keys), prefix_mask(visible, 5), (own, own))
    for b, h, m in np.ndindex(2, 4, 3):
        seen = torch.cat([keys[b, h // 2, : visible[b, m]], own[b, h // 2, m]])
        weights = (seen @ query[b, h, m] / 8**0.5).softmax(0)
        assert found[b, h, m].item() == pytest.approx(weights[-2:].sum().item(), rel=1e-5)


def test_all_scores_equal_make_mass_equal_to_the_share_of_entries():
    """With queries of zero every entry gets the same attention: at step k it is (k + 1) / (t + 1 + k + 1), and `hidden` has one fewer."""
    for variant, entries in (("kv_2", lambda k: k + 1), ("hidden", lambda k: k)):
        drafter, features, _ = prepared(variant)
        anchors = flow.anchors_before(features.answer_mask[1:], 8)
        features = examples.features(documents=(4,))
        with torch.no_grad():
            for layer in drafter.layers:
                layer.attention.q_proj.weight.zero_()
        table = pd.DataFrame(flow.measure(drafter, features, anchors))
        by_step = table[table["quantity"].isin(["draft_mass", "draft_share"])]
        for row in by_step.itertuples():
            k = row.draft_step
            wanted = np.mean([entries(k) / (t + 1 + entries(k)) for t in anchors.index[0].tolist()])
            assert row.value == pytest.approx(wanted, rel=1e-5), (variant, k, row.quantity)
        assert sorted(set(by_step["draft_step"])) == [k for k in range(STEPS) if entries(k)]


@pytest.mark.parametrize("variant", ["block_kv_2", "block_states_2", "block_both_1_mlp"])
def test_block_drafters_are_measured_too(variant):
    """Parts sum to autograd's gradient; with queries of zero the mass is the share b / (entries + b); the drafter stays as it was."""
    drafter, features = blocks.block_drafter(variant), examples.features(documents=(4,))
    anchors, attributes = flow.anchors_before(features.answer_mask, 8), [set(vars(m)) for m in drafter.modules()]
    with flow.watched_gradients(drafter) as flows:
        ttt_loss(drafter, features, ttt_steps=STEPS, anchors=anchors).loss.backward()
    modules = flow.projections(drafter)
    for key in modules:
        parts = sum(found for (*own, _), found in flows.items() if tuple(own) == key)
        torch.testing.assert_close(parts, modules[key].weight.grad, rtol=1e-4, atol=1e-6)
    drafter.zero_grad()
    before = predict(drafter, features, anchors, STEPS)
    table = pd.DataFrame(flow.measure(drafter, features, anchors))
    assert [set(vars(m)) for m in drafter.modules()] == attributes
    assert torch.equal(predict(drafter, features, anchors, STEPS), before)
    assert set(table.loc[table["quantity"] == "draft_mass", "draft_step"]) == set(range(STEPS))
    for layer in drafter.layers:
        layer.attention.q_proj.weight.data.zero_()
    table = pd.DataFrame(flow.measure(drafter, features, anchors))
    sources, size = 2 if "both" in variant else 1, drafter.config.block_size
    wanted = np.mean([size / (sources * (t + 1) + size) for t in anchors.index[0].tolist()])
    found = table.loc[table["quantity"].isin(["draft_mass", "draft_share"]), "value"]
    assert len(found) and np.allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("variant", EVERY)
def test_both_sides_sum_to_the_gradient_of_autograd(variant):
    drafter, features, _ = prepared(variant)
    with flow.watched_gradients(drafter) as flows:
        ttt_loss(drafter, features, ttt_steps=STEPS, step_decay=0.8).loss.backward()
    modules = flow.projections(drafter)
    for key, module in modules.items():
        parts = sum(found for (*own, _), found in flows.items() if tuple(own) == key)
        torch.testing.assert_close(parts, module.weight.grad, rtol=1e-4, atol=1e-6)
    sides = {
        (branch, matrix): {s for _, b, m, s in flows if (b, m) == (branch, matrix)} for _, branch, matrix, _ in flows
    }
    draft_only = drafter.config.paradigm != "hidden" and variant != "none_1"
    assert sides["cross" if draft_only else next(iter(flows))[1], "k_proj"] == (
        {"draft"} if draft_only else {"draft", "prefix"}
    )


def test_a_gradient_that_is_not_from_the_drafts_own_tokens_is_told_apart():
    """Detach the chain's keys: their part of the gradient is gone, and with it all that k_proj gets in a `kv` drafter."""
    drafter, features, _ = prepared("kv_1")
    attention = drafter.layers[0].attention
    project = attention.project
    attention.project = lambda *given: [
        part.detach() if name == "k" else part for name, part in zip(given[2:], project(*given), strict=True)
    ]
    with flow.watched_gradients(drafter) as flows:
        ttt_loss(drafter, features, ttt_steps=STEPS).loss.backward()
    assert (0, "cross", "k_proj", "draft") not in flows and (0, "cross", "v_proj", "draft") in flows


@pytest.mark.parametrize("variant", EVERY)
def test_a_diagnostic_leaves_the_drafter_as_it_was_also_after_an_exception(variant, monkeypatch):
    drafter, features, anchors = prepared(variant)
    before = {name: p.clone() for name, p in drafter.state_dict().items()}
    attributes = [dict(vars(m)) for m in drafter.modules()]
    wanted = predict(drafter, features, anchors, STEPS)
    one = flow.anchors_before(features.answer_mask[1:], 8)
    alone = examples.features(documents=(4,))
    flow.measure(drafter, alone, one)
    with monkeypatch.context() as patched:
        patched.setattr(flow, "ttt_loss", lambda *given, **named: ttt_loss(*given, **named) and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            flow.measure(drafter, alone, one)
    assert all(torch.equal(p, before[name]) for name, p in drafter.state_dict().items())
    assert all(p.grad is None for p in drafter.parameters())
    assert torch.equal(predict(drafter, features, anchors, STEPS), wanted)
    for module, attribute in zip(drafter.modules(), attributes, strict=True):
        assert set(vars(module)) == set(attribute) and not module._forward_hooks and not module._forward_pre_hooks


def test_sequences_are_whole_and_share_no_document():
    documents = [Document(np.full(n, n), np.ones(n, bool)) for n in (5, 3, 4, 6, 2, 9)]
    made = flow.long_documents(documents, 7, 9)
    assert [d.tokens.tolist() for d in made] == [[5] * 5 + [3] * 2, [4] * 4 + [6] * 3, [2] * 2 + [9] * 5]
    made, contexts = flow.sequences_for(documents * 4, (8, 16, 32, 64), 99, draft_length=3)
    assert contexts == [8, 16] and {len(d.tokens) for d in made} == {20}
    with pytest.raises(StudyError, match="29 tokens of evaluation text make no context of 128 tokens"):
        flow.sequences_for(documents, (128, 256), 4)


def test_drafters_that_read_different_layers_are_measured_together():
    target = examples.target()
    specs = [feature_spec(target, 1), feature_spec(target, 2, fused_layers=(1, 2))]
    source, _ = flow.long_features(target, specs, examples.DOCUMENTS * 8, 4, (8,))
    for spec in specs:
        assert source.with_layers(spec.kv_layers, spec.hidden_layers).spec.hidden_layers == spec.hidden_layers


def test_anchors_are_the_nearest_ones_that_see_no_more_than_the_context():
    mask = torch.ones(1, 40).bool()
    assert flow.anchors_before(mask, 20).index.tolist() == [list(range(10, 20))]  # more than half of the context
    assert flow.anchors_before(mask, 32).index.tolist() == [list(range(16, 32))]  # 16 at most: t + 1 = 17 … 32
    mask[0, 12:] = False
    assert flow.anchors_before(mask, 32) is None


def test_a_finished_run_is_measured_once_and_unknown_runs_are_refused(tmp_path, monkeypatch, capsys):
    finished(tmp_path, "kv_1")
    calls, load = [], flow.load_drafter
    monkeypatch.setattr(flow, "load_target", lambda name, device: examples.target("tiny-llama"))
    monkeypatch.setattr(flow, "load_drafter", lambda folder, target: calls.append(folder) or load(folder, target))
    documents = [examples.document("0" + "1" * 19, seed) for seed in range(8)]
    text = SimpleNamespace(documents=documents, provenance={"sha256": "0"})
    monkeypatch.setattr(flow, "load_corpus", lambda *_: text)
    measured = {"fingerprint": "code", "contexts": (16, 24, 512)}
    flow.measure_gradients(tmp_path, **measured)
    flow.measure_gradients(tmp_path, **measured)
    assert len(calls) == 1 and "too little text for contexts of 512 tokens" in capsys.readouterr().out
    table = tables.read(tmp_path / "tables", "gradient_flow")
    assert set(table["context_length_tokens"]) == {16, 24} and table["document"].nunique() == 4
    flow.measure_gradients(tmp_path, **measured, documents=2)
    assert len(calls) == 2, "other settings, other numbers"
    text.provenance["sha256"] = "1"
    flow.measure_gradients(tmp_path, **measured, documents=2)
    assert len(calls) == 3, "another text in its place"
    with pytest.raises(StudyError, match="kv_9/seed0: no finished run in"):
        flow.measure_gradients(tmp_path, ["kv_9/seed0"], **measured)
