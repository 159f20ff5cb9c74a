"""Anchors and their valid draft steps against hand-written masks and the definition; samples of them."""

import numpy as np
import pytest
import sequential
import torch
from examples import STEPS

from kvshot_lib.training.anchors import find_anchors, sample_anchors


def test_anchors_of_hand_written_masks():
    """-1 marks padding of the table; the digits are the number of valid draft steps of each anchor, K = 3."""
    masks = {
        "0001111": {2: 3, 3: 2, 4: 1},  # the example of the module: to the last token
        "0001111000": {2: 3, 3: 2, 4: 1},  # the same with padding
        "1111": {0: 2, 1: 1},  # x_0 is never drafted
        "01100111110": {0: 1, 4: 3, 5: 3, 6: 2, 7: 1},  # two spans: no chain runs from one into the other
        "0100110": {3: 1},  # a span of one token has no pair
        "0000": {},
        "1": {},
    }
    for digits, wanted in masks.items():
        mask = torch.tensor([[digit == "1" for digit in digits]])
        anchors = find_anchors(mask, 3)
        used = anchors.valid[0, :, 0]
        found = dict(zip(anchors.index[0, used].tolist(), anchors.valid[0, used].sum(-1).tolist(), strict=True))
        assert found == wanted, digits
        assert not anchors.valid[0, ~used].any() and not anchors.index[0, ~used].any()
        assert (anchors.weight == 1).all()
    rows = ["0001111000", "1111000000", "0000000000"]
    batch = find_anchors(torch.tensor([[digit == "1" for digit in row] for row in rows]), 3)
    assert batch.index.tolist() == [[2, 3, 4], [0, 1, 0], [0, 0, 0]]
    assert batch.valid.sum(-1).tolist() == [[3, 2, 1], [2, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_anchors_of_random_masks_equal_the_definition(seed):
    mask = torch.tensor(np.random.default_rng(seed).random((4, 40)) < [[0.5], [0.8], [0.95], [0.0]])
    anchors = find_anchors(mask, STEPS)
    found = [(d, int(anchors.index[d, row]), k) for d, row, k in anchors.valid.nonzero().tolist()]
    assert sorted(found) == sequential.scored_pairs(mask, STEPS)


def test_a_sample_is_the_size_that_the_fraction_says():
    mask = torch.tensor(
        [[d == "1" for d in row] for row in ("0111111111110", "0011111110000", "0110000000000", "0" * 13)]
    )
    anchors = find_anchors(mask, 3)
    assert anchors.valid[..., 0].sum(1).tolist() == [10, 6, 1, 0]
    subset, place = sample_anchors(anchors, 0.25, torch.Generator().manual_seed(0))
    used = subset.valid[..., 0]
    assert used.sum(1).tolist() == [3, 2, 1, 0]  # rounded up
    for document, (number, kept) in enumerate([(10, 3), (6, 2), (1, 1)]):
        assert subset.weight[document, used[document]].tolist() == pytest.approx([number / kept] * kept)
        drawn = subset.index[document, used[document]].tolist()
        assert len(set(drawn)) == kept
        assert drawn == anchors.index[document, place[document, used[document]]].tolist()
    assert not subset.weight[~used].any()
