"""Drift along the draft steps: against a plain computation, and of a drafter that drifts nowhere."""

import math

import examples
import pytest
import torch
from examples import STEPS

from kvshot_lib.probes import drift
from kvshot_lib.probes.attention import layer_row, watch
from kvshot_lib.probes.drift import COSINE, DRIFT, HELD, RECALL, drift_rows
from kvshot_lib.probes.target_rows import compute_state
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.ttt import draft_steps

ONE = (1,)  # the document that is looked at


@pytest.fixture
def measured():
    drafter, source = examples.drafter("hidden_post_norm"), examples.live_of(examples.DOCUMENTS[ONE[0]])
    return drafter, source, list(drift_rows(examples.target(), drafter, source, STEPS))


def sums(rows, name, metric):
    return {
        row["draft_step"]: (row["top"], row["bottom"])
        for row in rows
        if (row["variant"], row["metric"]) == (name, metric)
    }


@torch.no_grad()
def test_cosines_equal_a_plain_computation(measured):
    drafter, source, rows = measured
    features = source.batch([0])
    anchors, fused = find_anchors(features.answer_mask, STEPS), drafter.prefix(features)[1][0]
    wanted = {(name, k): [] for name in (DRIFT, HELD) for k in range(1, STEPS)}
    for k, _, output in draft_steps(drafter, features, anchors, STEPS - 1):
        for row, t in enumerate(anchors.index[0].tolist()):
            if anchors.valid[0, row, k + 1]:
                fed, true = drafter.feedback(output)[0, row], fused[t + 1 + k]
                for name, state in ((DRIFT, fed), (HELD, fused[t])):
                    wanted[name, k + 1].append(float(state @ true / state.norm() / true.norm()))
    for (name, k), cosines in wanted.items():
        top, bottom = sums(rows, name, COSINE)[k]
        assert bottom == len(cosines) and top == pytest.approx(math.fsum(cosines), abs=1e-4)


@torch.no_grad()
def test_recall_equals_a_plain_computation(measured):
    """The eight largest of tokens 1 … t, by sorting; the drafter's entry s stands at token s + 1."""
    drafter, source, rows = measured
    features, layers = source.batch([0]), drafter.spec.hidden_layers
    anchors, state = (
        find_anchors(features.answer_mask, STEPS),
        compute_state(examples.target(), features.tokens[0], layers),
    )
    best = lambda weights, t: {*sorted(range(1, t + 1), key=lambda s: -weights[s])[:8]}
    for call in watch(drafter, features, anchors, range(STEPS)):
        k, mine, own, held, count = call.draft_step, layer_row(call), 0.0, 0.0, 0
        for row, t in enumerate(anchors.index[0].tolist()):
            if t <= 8 or not anchors.valid[0, row, k]:
                continue
            count += 1
            looked = best([0.0, *mine[row].tolist()], t)
            for place in range(len(layers)):
                later, at = (state.rows(place, torch.tensor([p])).mean(0)[0].tolist() for p in (t + 1 + k, t))
                own += len(looked & best(later, t)) / 8 / len(layers)
                held += len(best(at, t) & best(later, t)) / 8 / len(layers)
        for name, total in ((DRIFT, own), (HELD, held)):
            assert (count == 0 and k not in sums(rows, name, RECALL)) or sums(rows, name, RECALL)[k] == (
                pytest.approx(total, abs=1e-4),
                count,
            )


def test_a_drafter_that_keeps_the_targets_state_drifts_nowhere(monkeypatch):
    drafter, source = examples.drafter("hidden"), examples.live_of(examples.DOCUMENTS[ONE[0]])

    def perfect(drafter, features, anchors, steps):
        fused = drafter.prefix(features)[1]
        for k in range(steps):
            yield k, anchors, fused[:, (anchors.index[0] + 1 + k).clamp(max=fused.shape[1] - 1)]

    monkeypatch.setattr(drift, "draft_steps", perfect)
    found = sums(drift_rows(examples.target(), drafter, source, STEPS), DRIFT, COSINE)
    assert found and all(top == pytest.approx(bottom, abs=1e-4) for top, bottom in found.values())
