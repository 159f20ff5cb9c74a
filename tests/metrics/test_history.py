"""The record of a training: its first and its own last draft step."""

import pandas as pd
import pytest

from kvshot_lib.metrics.history import training_table


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
