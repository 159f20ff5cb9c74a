"""Standing in a drafter's attention, and its overlap with the target's: hand-made rows, naive computations, all put back."""

import math
from dataclasses import replace

import pytest
import torch
from examples import DOCUMENTS, STEPS, drafter, live, live_of, target, target_layer_as_drafter

from kvshot_lib.probes import attention
from kvshot_lib.probes.attention import (
    attending,
    kv_attentions,
    layer_row,
    overlap,
    overlap_rows,
    own_query,
    recall,
    reference_rows,
    watch,
)
from kvshot_lib.probes.target_rows import compute_state
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.ttt import draft_steps

REUSING = ["kv_1", "kv_2", "hybrid"]


def outputs(built, document=0):
    features = live().batch([document])
    anchors = find_anchors(features.answer_mask, STEPS)
    with torch.no_grad():
        return [output for _, _, output in draft_steps(built, features, anchors, STEPS)]


@pytest.mark.parametrize("variant", REUSING)
def test_watching_changes_nothing_and_sees_every_step_and_place(variant):
    built, seen = drafter(variant), []
    before, weights = outputs(built), {name: t.clone() for name, t in built.state_dict().items()}

    def see(call):
        places = call.places(len(DOCUMENTS[0].tokens))
        seen.append((call.key, call.draft_step, call.anchors.tolist(), places.tolist()))
        return own_query(call)

    with attending(kv_attentions(built), see):
        watched = outputs(built)
    assert all(torch.equal(a, b) for a, b in zip(before, watched, strict=True))
    assert [key[:2] for key in seen] == [(layer, k) for k in range(STEPS) for layer in range(len(built.layers))]
    for _, k, anchors, places in seen:
        assert anchors == list(range(2, 10))  # answer x3 … x11: the first anchor is the last prompt token
        assert places == [min(t + 1 + k, 11) for t in anchors]
    assert all(torch.equal(weights[name], t) for name, t in built.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(built), strict=True))


def test_drafter_is_as_it_was_after_an_error():
    built = drafter("hybrid")
    before = outputs(built)
    with pytest.raises(RuntimeError, match="out of memory"), attending(kv_attentions(built), lambda call: _fail()):
        outputs(built)
    assert all("forward" not in vars(module) for module in kv_attentions(built).values())
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(built), strict=True))


def _fail():
    raise RuntimeError("out of memory")


def test_what_is_replaced_matters():
    built = drafter("kv_2")
    with attending(kv_attentions(built), lambda call: 0 * own_query(call)):
        changed = outputs(built)
    assert not torch.allclose(changed[0], outputs(built)[0])


LAYERS = (1, 2, 3)  # what feature_spec reuses of the tiny target


def watched(built, document=1, source=None):
    source = source or live()
    features = source.batch([document])
    anchors = find_anchors(features.answer_mask, STEPS)
    calls = watch(built, features, anchors, [0, 3, 6])
    state = compute_state(target(), features.tokens[0], LAYERS)
    return calls, state, anchors


def test_overlap_of_hand_made_rows(monkeypatch):
    """Anchor t = 3: entries 1, 2, 3 count (and 0, with the sink); the entry after it doesn't."""
    monkeypatch.setattr(attention, "TOP", 2)
    mine = torch.tensor([[0.6, 0.2, 0.1, 0.0, 0.1]])
    true = torch.tensor([[0.5, 0.0, 0.1, 0.1, 0.3]])
    js, with_sink, found, found_with_sink = overlap(mine, true, torch.tensor([3])).tolist()
    # Without the sink (2/3, 1/3, 0) and (0, 1/2, 1/2), mean (1/3, 5/12, 1/4)
    by_hand = (2 / 3 * math.log(2) + 1 / 3 * math.log(4 / 5) + 0.5 * math.log(6 / 5) + 0.5 * math.log(2)) / 2
    assert js[0] == pytest.approx(by_hand)
    assert found == [0.5]  # {1, 2} and {2, 3}
    assert 0 < with_sink[0] < js[0]
    assert found_with_sink == [0.5]  # {0, 1} and {0, 2 or 3}
    same = overlap(mine, 7 * mine, torch.tensor([3])).flatten().tolist()
    assert same == pytest.approx([0, 0, 1, 1], abs=1e-6)


def test_recall_counts_the_largest_kept_entries(monkeypatch):
    monkeypatch.setattr(attention, "TOP", 3)
    row = torch.tensor([[9.0, 1, 2, 3, 4, 5]])
    kept = torch.tensor([[False, True, True, True, True, True]])
    assert recall(row, -row + 10, kept).tolist() == [pytest.approx(1 / 3)]  # {3, 4, 5} and {1, 2, 3}
    assert recall(row, torch.tensor([[9.0, 0, 0, 5, 5, 5]]), kept).tolist() == [1.0]


def test_a_drafter_that_is_the_targets_layer_attends_like_it():
    """Given the target's true query, that drafter's row on the prefix is the target's own, up to what lies after the anchor."""
    calls, state, _ = watched(target_layer_as_drafter())
    for call in calls:
        places = call.places(len(DOCUMENTS[1].tokens))
        query = state.queries[-1][None, :, places]
        mine, t = layer_row(call, query), call.anchors
        true = state.rows(2, places).mean(0)[:, : mine.shape[1]]
        seen = torch.arange(mine.shape[1]) <= t[:, None]
        if call.draft_step == 0:  # one draft-side entry, so head by head the prefix has the same shares
            one = torch.softmax(query[0, 0] @ call.prefix[0][0, 0].T * 16**-0.5 + call.mask[0, 0], -1)
            own = state.rows(2, places)[0][:, : mine.shape[1]] * seen
            assert torch.allclose(one, own / own.sum(-1, keepdim=True), atol=1e-5)
        assert (mine * ~seen == 0).all() and true.shape == mine.shape


@pytest.mark.parametrize("variant", ["kv_2", "hybrid"])
def test_drafter_rows_equal_a_naive_softmax(variant):
    calls, _, _ = watched(drafter(variant))
    for call in calls[:2]:
        groups, heads = call.prefix[0].shape[1], call.query.shape[1]
        naive = torch.zeros(heads, call.query.shape[2], call.prefix[0].shape[2])
        for h in range(heads):
            g = h // (heads // groups)
            for m, t in enumerate(call.anchors.tolist()):
                keys = torch.cat([call.prefix[0][0, g, : t + 1], call.chain[0][0, g, m]])
                naive[h, m, : t + 1] = (keys @ call.query[0, h, m] * 16**-0.5).softmax(-1)[: t + 1]
        assert torch.allclose(layer_row(call), naive.mean(0), atol=1e-5)


def test_rows_have_every_layer_and_step_and_only_long_prefixes():
    calls, state, anchors = watched(drafter("kv_2"))
    rows = overlap_rows(calls, state, LAYERS, anchors.valid[0])
    index, valid = anchors.index[0], anchors.valid[0]
    many = {k: int((valid[:, k] & (index > 8)).sum()) for k in (0, 3, 6)}
    assert [(r["draft_step"], r["layer"], r["target_layer"]) for r in rows] == [
        (k, layer, l) for k in (0, 3, 6) if many[k] for layer in (0, 1) for l in LAYERS
    ]
    assert all(r["anchors"] == many[r["draft_step"]] for r in rows)
    assert all(0 <= r["js"] <= math.log(2) and 0 <= r["recall"] <= 1 for r in rows)


def test_references_compare_the_target_with_itself():
    features = live().batch([1])
    anchors = find_anchors(features.answer_mask, STEPS)
    state, other = (compute_state(target(), live().batch([d]).tokens[0], LAYERS) for d in (1, 4))
    given = anchors.index[0], anchors.valid[0], [0, 3, 6], state
    rows = reference_rows(*given, other, LAYERS)
    assert {r["source"] for r in rows} == {"row_t", "other_document"} and {r["layer"] for r in rows} == {None}
    itself = [r for r in reference_rows(*given, state, LAYERS) if r["source"] == "other_document"]
    assert all(r["js"] == pytest.approx(0, abs=1e-6) and r["recall"] == 1 for r in itself)
    assert all(r["js"] > 1e-4 for r in rows)


def test_what_comes_after_a_step_changes_nothing():
    """Step k at anchor t is about tokens up to x_{t+1+k}, on the drafter's side and on the target's."""
    built = drafter("kv_2")
    tokens = DOCUMENTS[1].tokens.copy()
    tokens[13] = 5 + tokens[13] % 400
    changed = live_of(replace(DOCUMENTS[1], tokens=tokens))
    for (mine, state), (other, others) in [(watched(built)[:2], watched(built, 0, changed)[:2])]:
        for a, b in zip(mine, other, strict=True):
            places = a.anchors + 1 + a.draft_step
            before = places < 13
            assert before.any() or a.draft_step
            assert torch.allclose(layer_row(a)[before], layer_row(b)[before], atol=1e-6)
            true = [s.rows(0, places.clamp(max=18)).mean(0)[before] for s in (state, others)]
            assert torch.allclose(*true, atol=1e-6)
            assert not torch.equal(layer_row(a)[~before], layer_row(b)[~before])
