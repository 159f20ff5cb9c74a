"""Metrics against numbers computed by hand, a naive reference, and a perfect drafter."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import resampling as bootstrap

# The worked example of the module's docstring; -1 marks pairs that are not valid.
RUN = ["variant", "seed"]
EXAMPLE = np.array([[1, 1, 0], [0, 1, 1], [1, 0, -1], [1, -1, -1]])


def split(table):
    """(match, valid) of an integer table with -1 for pairs that are not valid."""
    return table == 1, table >= 0


def values_of(*tables):
    """Metric values, keyed by (metric, draft_step or None), of one run whose documents are integer tables."""
    counted = [metrics.count_document(*split(table)) for table in tables]
    found = metrics.metrics_of(sum(counts for counts, _ in counted), sum(runs for _, runs in counted))
    steps = {(name, k): v for name, values in found.items() if values.ndim for k, v in enumerate(values)}
    return steps | {(name, None): float(value) for name, value in found.items() if not value.ndim}


@st.composite
def documents(draw, steps=3):
    """A document as an integer table: an anchor with `left` answer tokens left has `left` valid steps."""
    left = draw(st.lists(st.integers(0, steps), min_size=1, max_size=12))
    rows = [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) + [-1] * (steps - n) for n in left]
    return np.array(rows)


def test_worked_example_by_hand():
    counts, runs = metrics.count_document(*split(EXAMPLE))
    assert counts.tolist() == [[4, 3, 4, 3], [3, 2, 2, 1], [2, 1, 1, 0]]
    assert runs.tolist() == [2, 2]
    values = values_of(EXAMPLE)
    assert [values["step_acceptance", k] for k in range(3)] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert [values["chain_acceptance", k] for k in range(3)] == pytest.approx([3 / 4, 1 / 2, 0])
    assert values["retention", None] == pytest.approx(2 / 3)
    assert values["chain_retention", None] == 0
    assert values["expected_mat", None] == pytest.approx(1 + 3 / 4 + 1 / 2 + 1 / 4)
    assert values["measured_mat", None] == pytest.approx(2)


def test_bins_are_powers_of_two():
    assert metrics.bin_low([0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 256, 511, 512, 1023]).tolist() == [
        0, 0, 0, 16, 16, 32, 32, 64, 64, 128, 256, 256, 512, 512
    ]  # fmt: skip
    assert metrics.bin_names([0, 16, 32, 256]) == ["0-15", "16-31", "32-63", "256-511"]
    assert [metrics.axis_steps(length) for length in (1, 2, 3, 7)] == [[0], [0, 1], [0, 1, 2], [0, 3, 6]]


def test_counts_along_the_axes_by_hand():
    """The example of `count_axes` at two steps: the last anchor is valid at step 0 alone, 15 matches at both."""
    valid = np.ones((17, 2), bool)
    valid[16, 1] = False
    match = np.zeros((17, 2), bool)
    match[15] = match[16] = True  # the match that is not valid must not count
    places = np.stack([np.arange(17), np.arange(17) + 1], axis=1)
    none = np.zeros((0, 2), bool)
    table = metrics.count_axes("kv_2", 3, [(none, none), (match, valid)], [np.zeros((0, 2), int), places])
    assert table.columns.tolist() == [*RUN, "document", "axis", "bin_low", "draft_step", "anchors", "matches"]
    assert (table["variant"] == "kv_2").all() and (table["seed"] == 3).all() and (table["document"] == 1).all()
    assert table[["axis", "bin_low", "draft_step", "anchors", "matches"]].to_numpy().tolist() == [
        ["context_length_tokens", 0, 0, 15, 0],
        ["context_length_tokens", 0, 1, 15, 0],
        ["context_length_tokens", 16, 0, 2, 2],
        ["context_length_tokens", 16, 1, 1, 1],
        ["generated_offset", 0, 0, 16, 1],
        ["generated_offset", 0, 1, 16, 1],
        ["generated_offset", 16, 0, 1, 1],
    ]


@given(st.lists(documents(), min_size=1, max_size=4), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_bins_of_an_axis_sum_to_the_counts(tables, prompt):
    matched = [split(table) for table in tables]
    places = [np.stack([3 * np.arange(len(m)), 3 * np.arange(len(m)) + prompt], axis=1) for m, _ in matched]
    counts, _ = metrics.count_run("hidden", 0, matched)
    axes = metrics.count_axes("hidden", 0, matched, places)
    index, summed = ["document", "draft_step"], ["anchors", "matches"]
    wanted = counts[counts["anchors"] > 0].set_index(index)[summed].sort_index()
    for axis in metrics.AXES:
        found = axes[axes["axis"] == axis].groupby(index)[summed].sum()
        assert found.reset_index().astype(int).equals(wanted.reset_index().astype(int)), axis


@pytest.mark.parametrize("answer", [1, 2, 6, 7, 8, 9, 30])
def test_perfect_drafter_scores_exactly_one_at_every_step(answer):
    """Answers shorter than, as long as and longer than the chain, with a user turn in the middle of the document."""
    steps, assistant = 7, np.array([False] * 5 + [True] * answer + [False] * 4 + [True] * 40 + [False])
    n = len(assistant)
    wanted = np.arange(n)[:, None, None] + 1 + np.arange(steps + 1)  # x_{t+1} … x_{t+2+k} for the last k
    read = np.where(wanted < n, assistant[np.minimum(wanted, n - 1)], False)[:, 0]
    valid = np.logical_and.accumulate(read, axis=1)[:, 1:]
    counts, runs = metrics.count_run("hidden", 0, [(valid, valid), (valid | True, valid)])
    drawn = bootstrap.draw(counts, runs, samples=50)
    perfect = np.where(drawn.keys["metric"].str.endswith("_mat"), 1.0 + steps, 1.0)
    assert (drawn.values == perfect[:, None]).all()
    assert (
        counts.groupby("draft_step")["anchors"].sum().diff().dropna() < 0
    ).all()  # later steps really have fewer anchors


def test_product_of_marginals_is_not_the_expected_length():
    """Both match half of all pairs: one everything or nothing (runs of 2 or 0), the other step 0 or step 1 (1 or 0)."""
    together = values_of(np.array([[1, 1], [0, 0]] * 8))
    apart = values_of(np.array([[1, 0], [0, 1]] * 8))
    assert together["expected_mat", None] == apart["expected_mat", None] == 1 + 1 / 2 + 1 / 4
    assert (together["measured_mat", None], apart["measured_mat", None]) == (2, 1.5)
    assert (together["chain_acceptance", 1], apart["chain_acceptance", 1]) == (1, 0)


def test_drafter_with_known_correlation():
    """Half of the anchors are easy (match with 3/4 at each step), half hard (1/4), independent given the anchor, every
    pattern in its exact share of 16: so step acceptance is 1/2, chain acceptance at step 1 (9/16 + 1/16) / 2 · 2."""
    easy = [[a, b] for a in (1, 1, 1, 0) for b in (1, 1, 1, 0)]
    hard = [[a, b] for a in (1, 0, 0, 0) for b in (1, 0, 0, 0)]
    values = values_of(np.array(easy), np.array(hard))
    assert values["step_acceptance", 0] == values["step_acceptance", 1] == 1 / 2
    assert values["chain_acceptance", 1] == 5 / 8
    assert values["expected_mat", None] == 1 + 1 / 2 + 1 / 4
    assert values["measured_mat", None] == 1 + 1 / 2 + 5 / 16


def test_measured_mat_ignores_runs_cut_by_the_end_of_the_answer():
    assert values_of(np.array([[1, 1, 1], [1, 1, -1], [1, -1, -1]]))["measured_mat", None] == 4


def test_metric_of_no_anchors_is_missing_not_zero():
    values = values_of(np.array([[1, -1, -1], [0, -1, -1]]))
    assert values["step_acceptance", 0] == 0.5
    assert np.isnan(
        [
            values["step_acceptance", 1],
            values["chain_acceptance", 1],
            values["measured_mat", None],
            values["retention", None],
        ]
    ).all()


def test_not_nested_or_misshapen_masks_are_refused():
    with pytest.raises(ValueError, match="nested"):
        metrics.count_document(np.ones((2, 3), bool), np.array([[True, False, True]] * 2))
    with pytest.raises(ValueError, match="anchors, K"):
        metrics.count_document(np.ones((2, 3), bool), np.ones((2, 4), bool))


@given(documents(), st.integers(0, 12), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_batching_and_padding_change_nothing(table, cut, padding, garbage):
    """Splitting a document into two, or adding invalid rows (whatever they hold), leaves every value as it was."""
    cut = min(cut, len(table))
    padded = np.concatenate([table[:cut], np.full((padding, 3), -1), table[cut:]])
    match, valid = split(padded)
    match |= garbage & ~valid
    whole = metrics.count_document(*split(table))
    assert all(np.array_equal(a, b) for a, b in zip(whole, metrics.count_document(match, valid)))
    assert_same(values_of(table), values_of(table[:cut], table[cut:]))


@given(documents())
@settings(max_examples=60, deadline=None)
def test_counts_equal_a_loop(table):
    counts, runs = np.zeros((3, 4), dtype=int), [0, 0]
    for row in table:
        alive = True
        for k, cell in enumerate(row):
            if cell < 0:
                break
            counts[k] += [1, cell, alive, alive and cell]
            alive = alive and bool(cell)
        if row[-1] >= 0:
            runs[0] += 1
            runs[1] += next((k for k, cell in enumerate(row) if cell == 0), 3)
    mine = metrics.count_document(*split(table))
    assert mine[0].tolist() == counts.tolist() and mine[1].tolist() == runs


@given(documents())
@settings(max_examples=60, deadline=None)
def test_chain_identities(table):
    """Where no answer ends early, reached_{k+1} = chain_matches_k, and measured_mat is a sum of chain products."""
    table = table[table[:, -1] >= 0]
    if not len(table):
        return
    counts, (complete, accepted) = metrics.count_document(*split(table))
    assert counts[1:, 2].tolist() == counts[:-1, 3].tolist()
    chain = np.nan_to_num(counts[:, 3] / np.maximum(counts[:, 2], 1))
    assert 1 + np.cumprod(chain).sum() == pytest.approx(1 + accepted / complete)


def assert_same(a, b):
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=0, atol=0)


def test_no_documents_is_refused():
    with pytest.raises(StudyError, match="evaluation_documents"):
        metrics.count_run("hidden", 0, [])


# Along a training


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
    table = metrics.training_table(history_of(kv_2=6, block_kv_2_b16=14))
    last = table[table["step_name"] == "last"].groupby("variant")["draft_step"].unique()
    assert last["kv_2"].tolist() == [6] and last["block_kv_2_b16"].tolist() == [14]
    assert set(table.loc[table["step_name"] == "first", "draft_step"]) == {0}


def test_means_and_ranges_are_over_seeds():
    table = metrics.training_table(history_of(kv_2=1))
    row = table[table["step_name"] == "last"].iloc[-1]
    assert row["million_tokens"] == 2
    assert row[["value", "seed_low", "seed_high"]].tolist() == pytest.approx([0.3, 0.25, 0.35])


def test_nothing_validated_is_an_empty_table():
    assert metrics.training_table(history_of(kv_2=1).query("split == 'train'")).empty


def test_validation_mat_by_hand():
    """Acceptance .25 / (k + 1) · n at seven steps, n = 1 and 2; a validation of one step is left out."""
    found = metrics.validation_mat(history_of(kv_2=6, kv_2_no_ttt=0).query("seed == 0"))
    assert found[["variant", "trained_tokens"]].to_numpy().tolist() == [["kv_2", 1e6], ["kv_2", 2e6]]
    wanted = [1 + sum(math.prod(0.25 * n / (k + 1) for k in range(last)) for last in range(1, 8)) for n in (1, 2)]
    assert found["value"].tolist() == pytest.approx(wanted)
