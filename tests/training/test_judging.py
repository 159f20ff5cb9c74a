"""Acceptance under teacher forcing: perfect and half-right drafters, batches of any size, padding."""

from types import SimpleNamespace
from unittest import mock

import examples
import numpy as np
import pytest
import torch
from examples import DRAFT_IDS, STEPS, VARIANTS, logits_by_pair

from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.training import judging
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import anchor_places, judge, match_documents, outside_vocabulary, predict

LAST_ONES = [examples.document("0" * 5 + "1" * length, seed=3) for length in range(1, 12)]  # spans of 1 to 11 tokens


def perfect(features, anchors, ttt_steps):
    """Reads the target's distribution at t+1+k, written out pair by pair; -1 where nothing is asked."""
    head = examples.target().model.get_output_embeddings().weight
    drafts = torch.full((*anchors.index.shape, ttt_steps), -1)
    for document, row, k in anchors.valid.nonzero().tolist():
        place = int(anchors.index[document, row]) + 1 + k
        drafts[document, row, k] = (head @ features.final_hidden[document, place]).argmax()
    return drafts


def right_where(condition):
    """A drafter that is right about x_{t+2+k} if condition(t + 2 + k), and wrong otherwise."""

    def predictor(features, anchors, ttt_steps):
        drafts = perfect(features, anchors, ttt_steps)
        places = anchors.index[..., None] + 2 + torch.arange(ttt_steps)
        return torch.where(condition(places), drafts, (drafts + 1) % 512)

    return predictor


def matches_of(predictor, source, ttt_steps, **how):
    """What `match_documents` gives for a function that drafts tokens: (features, anchors, K) -> [B, M, K]."""
    reader = SimpleNamespace(reads=("final_hidden",))
    with mock.patch.object(judging, "predict", lambda _, *given: predictor(*given)):
        return match_documents(source, reader, ttt_steps, **how)


def values(matched):
    counted = [metrics.count_document(*document) for document in matched]
    return metrics.metrics_of(sum(counts for counts, _ in counted), sum(runs for _, runs in counted))


@pytest.mark.parametrize("documents", [examples.DOCUMENTS, LAST_ONES, LAST_ONES[7:8]])
def test_a_perfect_drafter_scores_exactly_one_everywhere(documents):
    found = values(matches_of(perfect, examples.live_of(*documents), STEPS))
    assert set(found) == set(metrics.METRICS)
    assert (found["step_acceptance"] == 1).all() and (found["chain_acceptance"] == 1).all()
    assert found["retention"] == found["chain_retention"] == 1
    assert found["expected_mat"] == found["measured_mat"] == 1 + STEPS


def test_a_drafter_one_place_late_is_caught():
    """It gives the argmax of p_{t+2+k}, which a judge that is one off would take for perfect."""

    def late(features, anchors, ttt_steps):
        next_place = (anchors.index + 1).clamp(max=features.tokens.shape[1] - ttt_steps - 1)
        return perfect(features, type(anchors)(next_place, anchors.valid, anchors.weight), ttt_steps)

    found = values(matches_of(late, examples.live_of(*LAST_ONES), STEPS))
    assert found["step_acceptance"].max() < 0.5


def test_right_about_every_second_token_by_hand():
    """An answer x_3 … x_8, K = 3, right about even places. Place t+2+k per anchor, and 1 where the drafter is right:

    anchor 2   x4 x5 x6   1 0 1   runs 1
    anchor 3   x5 x6 x7   0 1 0        0
    anchor 4   x6 x7 x8   1 0 1        1
    anchor 5   x7 x8      0 1          (not valid at all steps)
    anchor 6   x8         1
    """
    source = examples.live_of(examples.document("000111111"))
    ((match, valid),) = matches_of(right_where(lambda places: places % 2 == 0), source, 3)
    assert valid.astype(int).tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert match.astype(int).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0]]
    found = values([(match, valid)])
    assert found["step_acceptance"].tolist() == [3 / 5, 2 / 4, 2 / 3]
    assert found["chain_acceptance"][:2].tolist() == [3 / 5, 0 / 2] and np.isnan(found["chain_acceptance"][2])
    assert found["expected_mat"] == pytest.approx(1 + 3 / 5 + 3 / 5 * 2 / 4 + 3 / 5 * 2 / 4 * 2 / 3)
    assert found["measured_mat"] == pytest.approx(1 + (1 + 0 + 1) / 3)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_batch_size_and_padding_change_nothing(variant):
    drafter, source = examples.drafter(variant), examples.live()
    alone = match_documents(source, drafter, STEPS, batch_documents=1)
    for size in (2, 3, 8):
        assert_same(match_documents(source, drafter, STEPS, batch_documents=size), alone)
    assert [len(match) for match, _ in alone] == [9 - 1, 2 + 9, 1, 0, 13]


def assert_same(found, wanted):
    for (match, valid), (other_match, other_valid) in zip(found, wanted, strict=True):
        assert np.array_equal(match, other_match) and np.array_equal(valid, other_valid)


def test_a_target_argmax_that_cannot_be_drafted_is_a_rejection():
    """Perfect within the draft vocabulary: it misses just the pairs that `outside_vocabulary` counts."""

    def within(features, anchors, ttt_steps):
        drafts = perfect(features, anchors, ttt_steps)
        return torch.where(torch.isin(drafts, DRAFT_IDS), drafts, DRAFT_IDS[0])

    source = examples.live()
    step_0 = values(matches_of(within, source, 1))["step_acceptance"][0]
    outside = outside_vocabulary(source, examples.drafter("hidden"))
    assert 0.02 < outside < 0.5
    assert step_0 == pytest.approx(1 - outside)


def test_places_of_anchors_by_hand():
    """0011100111111111100: anchors 1 2 of the first span, 6 … 14 of the second. 00100000110: anchor 7."""
    source = examples.live()
    assert anchor_places(source, 1).tolist() == [[0, 2], [1, 3], *([t - 6, t + 1] for t in range(6, 15))]
    assert anchor_places(source, 2).tolist() == [[0, 8]]
    assert anchor_places(source, 3).shape == (0, 2)
    assert anchor_places(examples.live_of(examples.document("11110")), 0).tolist() == [[1, 1], [2, 2]]


def test_places_line_up_with_matches():
    """Right only where the generated offset is even: `match_documents` gives its anchors in this order."""
    source = examples.live()

    def predictor(features, anchors, ttt_steps):
        drafts = perfect(features, anchors, ttt_steps)
        outside = (~features.answer_mask[:, None, :]) & (
            torch.arange(features.tokens.shape[1]) <= anchors.index[..., None]
        )
        last_outside = torch.where(outside, torch.arange(outside.shape[2]), -1).amax(-1)
        return torch.where(((anchors.index - last_outside) % 2 == 0)[..., None], drafts, (drafts + 1) % 512)

    matched = matches_of(predictor, source, STEPS, batch_documents=3)
    places = [anchor_places(source, document) for document in range(len(source))]
    assert [len(where) for where in places] == [len(match) for match, _ in matched]
    for (match, _), where in zip(matched, places, strict=True):
        assert match[:, 0].tolist() == (where[:, 0] % 2 == 0).tolist()


def test_judge_never_counts_what_is_not_valid():
    features = examples.features()
    anchors = find_anchors(features.answer_mask, STEPS)
    places = (anchors.index[..., None] + 1 + torch.arange(STEPS)).clamp(max=features.tokens.shape[1] - 1)
    every = features.target_argmax.gather(1, places.flatten(1)).view(places.shape)
    assert torch.equal(judge(every, features, anchors), anchors.valid)


def test_predict_gives_the_argmax_as_target_tokens():
    drafter, features = examples.drafter("hidden"), examples.features()
    anchors = find_anchors(features.answer_mask, STEPS)
    predictions = predict(drafter, features, anchors, STEPS)
    logits = logits_by_pair(drafter, features)
    for document, row, k in anchors.valid.nonzero().tolist():
        best = logits[document, int(anchors.index[document, row]), k].argmax()
        assert predictions[document, row, k] == DRAFT_IDS[best]
