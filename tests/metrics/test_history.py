"""The record of a training: its first and its own last draft step."""

import math

import pandas as pd
import pytest

from kvshot_lib.metrics.history import training_table, validation_mat


def history_of(**last_steps):
    """Two records of two seeds each, down to the last step named; acceptance .5 / (k + 1) at the end, half of it before, .1 more in seed 1."""
    rows = [
        [variant, seed, n, 1e6 * n, split, k, 0.25 * n / (k + 1) + 0.1 * seed]
        for variant, last in last_steps.items()
        for seed in (0, 1)
        for split in ("train", "validation")
        for n in (1, 2)
        for k in range(last + 1)
    ]
    columns = ["variant", "seed", "step", "trained_tokens", "split", "draft_step", "acceptance"]
    return pd.DataFrame(rows, columns=columns).astype({"draft_step": "Int64"})


def test_the_last_step_is_the_variants_own():
    """A block of 16 slots among chains of 7: each shows its own last step, not the longest of all."""
    table = training_table(history_of(kv_2=6, block_kv_2_b16=14))
    last = table[table["step_name"] == "last"].groupby("variant")["draft_step"].unique()
    assert last["kv_2"].tolist() == [6] and last["block_kv_2_b16"].tolist() == [14]
    assert set(table.loc[table["step_name"] == "first", "draft_step"]) == {0}


def test_means_and_ranges_are_over_seeds():
    table = training_table(history_of(kv_2=1))
    row = table[table["step_name"] == "last"].iloc[-1]
    assert row["million_tokens"] == 2
    assert row[["value", "seed_low", "seed_high"]].tolist() == pytest.approx([0.3, 0.25, 0.35])


def test_nothing_validated_is_an_empty_table():
    assert training_table(history_of(kv_2=1).query("split == 'train'")).empty


def test_validation_mat_by_hand():
    """Acceptance .25 / (k + 1) · n at seven steps, n = 1 and 2; a validation of one step is left out."""
    found = validation_mat(history_of(kv_2=6, kv_2_no_ttt=0).query("seed == 0"))
    assert found[["variant", "trained_tokens"]].to_numpy().tolist() == [["kv_2", 1e6], ["kv_2", 2e6]]
    wanted = [1 + sum(math.prod(0.25 * n / (k + 1) for k in range(last)) for last in range(1, 8)) for n in (1, 2)]
    assert found["value"].tolist() == pytest.approx(wanted)
