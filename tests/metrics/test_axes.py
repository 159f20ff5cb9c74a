"""Acceptance along the text: hand-computed cells, intervals on the documents' resamples, and its sentences."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import axes
from kvshot_lib.plots import report_matrix

OFFSET = "generated_offset"


def table_of(*rows):
    """Rows of ``axes.csv``: variant, seed, document, bin_low, anchors, matches, at draft step 0 of the generated offset."""
    table = pd.DataFrame(rows, columns=["variant", "seed", "document", "bin_low", "anchors", "matches"])
    return table.assign(axis=OFFSET, draft_step=0)


def test_counts_are_summed_before_they_are_divided():
    """8 of 10 and 1 of 2 make 9 of 12; the other seed 6 of 12; their mean is .625."""
    rows = [("kv_2", 0, 0, 0, 10, 8), ("kv_2", 0, 2, 0, 2, 1), ("kv_2", 1, 0, 0, 10, 5), ("kv_2", 1, 2, 0, 2, 1)]
    found = axes.axis_table(axes.draw_axes(table_of(*rows), documents=3, samples=200))
    wanted = {"variant": "kv_2", "axis": OFFSET, "bin_low": 0, "draft_step": 0, "value": 0.625, "seed_low": 0.5}
    wanted |= {"seed_high": 0.75, "seeds": 2, "anchors": 12, "documents": 2}
    pd.testing.assert_frame_equal(found.drop(columns=["low", "high"]), pd.DataFrame([wanted]), check_dtype=False)
    # One resample in 27 holds neither document and is undefined; the others lie between the two documents' own shares.
    assert 0.5 <= found["low"].iloc[0] < 0.625 < found["high"].iloc[0] <= 0.65


def test_bootstrap_draws_documents():
    """100 documents, half of which match throughout: .5 +- 1.96 sqrt(.25 / 100), however many anchors they have."""
    rows = [("kv_2", 0, document, 16, 30, 30 * (document % 2)) for document in range(100)]
    (row,) = axes.axis_table(axes.draw_axes(table_of(*rows), 100, samples=4000)).itertuples()
    assert (row.value, row.low, row.high) == pytest.approx((0.5, 0.402, 0.598), abs=0.011)


def test_thin_cells_are_left_out_and_absent_ones_refused():
    draws = axes.draw_axes(table_of(("a", 0, 0, 0, 49, 1), ("a", 0, 0, 16, 50, 1)), 1, samples=5)
    assert axes.axis_table(draws, 50)["bin_low"].tolist() == [16]
    with pytest.raises(StudyError, match="no anchors of a in generated_offset from 32 on at draft step 0"):
        draws.rows("a", OFFSET, 32, 0)


def test_a_run_without_differences_has_the_acceptance_of_its_counts():
    """All bins together give step acceptance: the counts of a run and its axes are the same anchors."""
    match = np.random.default_rng(0).random((4, 40, 7)) < 0.4
    documents = [(m, np.ones_like(m)) for m in match]
    places = np.stack([np.arange(40), np.arange(40) + 7], axis=1)
    table = metrics.count_axes("kv_2", 0, documents, [places] * 4)
    cells = axes.axis_table(axes.draw_axes(table, 4, samples=5))
    total = (
        cells.assign(matches=cells["value"] * cells["anchors"])
        .groupby(["axis", "draft_step"])[["matches", "anchors"]]
        .sum()
    )
    for (_, step), row in total.iterrows():
        assert row["matches"] / row["anchors"] == pytest.approx(match[:, :, step].mean())


def test_names_of_bins():
    assert axes.bin_names([0, 16, 32, 256]) == ["0-15", "16-31", "32-63", "256-511"]


def test_sentence_compares_the_ends_of_the_axis():
    rows = [("kv_2", 0, d, low, 60, hits) for d in range(5) for low, hits in ((0, 30), (16, 33), (32, 15))]
    draws = axes.draw_axes(table_of(*rows), 5, samples=50)
    table = axes.axis_table(draws, 50)
    assert report_matrix.along(draws, table, OFFSET) == (
        "- `kv_2`, draft step 0: 0.250 at 32-63, below 0.500 at 0-15, by -0.250 [-0.250, -0.250]."
    )
    assert "nothing to compare" in report_matrix.along(draws, table[:1], OFFSET)
    runs = pd.DataFrame({"variant": ["hidden", "kv_2"]})
    assert report_matrix.not_recorded(runs, table_of(*rows)).endswith("not recorded for `hidden`.")
    assert report_matrix.not_recorded(runs, table_of()).endswith("not recorded for this run.")
    assert report_matrix.not_recorded(runs[1:], table_of(*rows)) == ""
