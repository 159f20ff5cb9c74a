"""Rounded weights: by hand, within the bound, as small as they say, and the same bytes again."""

import numpy as np
import pytest
import torch

from kvshot_lib.drafters.checkpoint import load_rounded, round_rows, save_rounded
from kvshot_lib.errors import StudyError


def test_a_row_by_hand():
    """Standard deviation 2, steps of half of it: multiples of 1. A row of zeros stays."""
    counts, scales = round_rows(np.array([[2.0, -2.0, 1.9, -1.9], [0.0] * 4]) * 2 / np.std([2, -2, 1.9, -1.9]), 0.5)
    assert scales[0, 0] == 1.0 and counts.tolist() == [[2, -2, 2, -2], [0, 0, 0, 0]]


def test_one_huge_weight_widens_the_steps_of_its_row():
    row = np.full((1, 10_000), 0.01)
    row[0, 0] = 100.0
    counts, scales = round_rows(row, 0.1)
    assert counts[0, 0] == 127 and counts[0, 0] * float(scales[0, 0]) == pytest.approx(100, rel=1e-3)


def test_there_and_back(tmp_path):
    torch.manual_seed(0)
    tensors = {"w": torch.randn(300, 200) * torch.rand(300, 1), "norm": torch.randn(200), "ids": torch.arange(5)}
    path = save_rounded(tensors, tmp_path / "a.safetensors", 0.33)
    found = load_rounded(path)
    error = (found["w"] - tensors["w"]) / tensors["w"].std(1, keepdim=True, correction=0)
    assert error.abs().max() <= 0.166 and error.square().mean().sqrt() == pytest.approx(0.33 / 12**0.5, rel=0.02)
    assert torch.equal(found["norm"], tensors["norm"]) and torch.equal(found["ids"], tensors["ids"])
    assert 3.5 < 8 * path.stat().st_size / tensors["w"].numel() < 4.1, "bits a weight"
    assert save_rounded(tensors, tmp_path / "b.safetensors", 0.33).read_bytes() == path.read_bytes()


def test_damage_is_told(tmp_path):
    path = save_rounded({"w": torch.randn(8, 8)}, tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StudyError, match="restore it with git"):
        load_rounded(path)
