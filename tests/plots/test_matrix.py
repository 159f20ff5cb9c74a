"""Figures and sentences of the whole matrix, on made-up tables of the study's 21 variants."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import synthetic
from test_report import DECAYS, FLAT, draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.metrics import axes
from kvshot_lib.metrics import comparisons as ablations
from kvshot_lib.metrics import resampling as bootstrap
from kvshot_lib.plots import matrix as figures_matrix
from kvshot_lib.plots import report_matrix
from kvshot_lib.plots import style as figures


@cache
def study():
    """Draws, their summary, and acceptance along the text of the main variants, of all variants at two seeds."""
    made = synthetic.matrix(seeds=2, documents=20)
    draws = bootstrap.draw(made["counts"], made["run_lengths"], samples=40)
    main = figures.main_variants(draws.variants)
    along = axes.draw_axes(figures.of(made["axes"], main), 20, samples=40)
    return draws, bootstrap.summary_table(draws), axes.axis_table(along, figures.LEAST_ANCHORS)


def every_figure():
    draws, summary, along = study()
    table = figures_matrix.depth_table(summary)
    yield "depth", figures_matrix.draw_depth(table), table
    table = ablations.ablation_table(draws)
    yield "ablations", figures_matrix.draw_ablations(table), table
    for axis in figures_matrix.AXIS_TITLES:
        yield axis, figures_matrix.draw_axis(along, axis), along[along["axis"] == axis].reset_index(drop=True)


def test_drawn_twice_has_the_same_bytes_and_its_table_beside_it(tmp_path):
    for folder in ("a", "b"):
        for name, figure, table in every_figure():
            path = figures.save_figure(figure, table, tmp_path / folder, name)
            beside = pd.read_csv(path.with_suffix(".csv"))
            pd.testing.assert_frame_equal(beside.astype(table.dtypes.to_dict()), table, check_dtype=False, rtol=1e-5)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_every_comparison_of_the_matrix_is_drawn_with_its_paired_difference():
    draws, _, _ = study()
    table = ablations.ablation_table(draws)
    pairs = {(reference, variant) for reference, changed in ablations.ABLATIONS.items() for variant in changed}
    assert set(zip(table["reference"], table["variant"])) == pairs and len(table) == 2 * len(pairs)
    assert {name for pair in pairs for name in pair} <= {*VARIANTS}
    row = table[(table["variant"] == "cross_only_warm") & (table["metric"] == "measured_mat")].iloc[0]
    gap = draws.difference(("cross_only_warm", "measured_mat"), ("hybrid_warm", "measured_mat"))
    assert (row["value"], row["low"], row["high"]) == pytest.approx((gap.value, gap.low, gap.high))
    drawn = figures_matrix.draw_ablations(table).axes[0]
    shown = table[table["metric"] == "measured_mat"]["value"]
    np.testing.assert_allclose([bar.get_width() for bar in drawn.patches], shown)
    labels = [label.get_text() for label in drawn.get_yticklabels()]
    assert labels[:2] == ["minus kv_2", "kv_2_heads"] and labels[-2:] == ["minus hybrid_warm", "cross_only_warm"]


def test_depth_has_four_points_and_two_level_lines():
    _, summary, _ = study()
    table = figures_matrix.depth_table(summary)
    layers = table[table["metric"] == "measured_mat"].set_index("variant")["num_layers"]
    assert layers.dropna().to_dict() == {"kv_1": 1, "kv_2": 2, "kv_3": 3, "kv_4": 4}
    assert set(layers[layers.isna()].index) == {"hidden", "hybrid"}
    lines = [line.get_xydata() for line in figures_matrix.draw_depth(table).axes[0].get_lines()]
    points = table[(table["metric"] == "measured_mat") & table["num_layers"].notna()]
    assert any(len(line) == 4 and np.allclose(line[:, 1], points["value"]) for line in lines)


def test_axis_figure_shows_the_bins_of_its_table():
    _, _, along = study()
    figure = figures_matrix.draw_axis(along, "generated_offset")
    assert [panel.get_title(loc="left")[-1] for panel in figure.axes] == ["0", "3", "6"]
    own = along[(along["axis"] == "generated_offset") & (along["variant"] == "kv_2") & (along["draft_step"] == 3)]
    line = next(line for line in figure.axes[1].get_lines() if line.get_label() == "kv_2")
    np.testing.assert_allclose(line.get_ydata(), own["value"])


def test_sections_without_their_variants_say_so():
    draws = draws_of(hidden=DECAYS, kv_1=FLAT)
    summary = bootstrap.summary_table(draws)
    assert figures_matrix.depth_table(summary).empty and ablations.ablation_table(draws).empty
    told = report_matrix.depth(draws, figures_matrix.depth_table(summary))
    assert told.endswith("Not run here: `kv_2`, `kv_3`, `kv_4`.") and told.startswith("Depth needs two of")
    told = report_matrix.ablations(draws, ablations.ablation_table(draws))
    assert told.startswith("No comparison here for `hidden_post_norm`") and "`both_4`: they or the" in told


def test_sentences_of_depth_and_ablations():
    """Nested matches: measured 1.9 (.4 .3 .2) and 1.9 (.3 .3 .3); zero at 1.09 is lower."""
    draws = draws_of(kv_1=DECAYS, kv_2=FLAT, kv_2_zero=(4, 3, 2), kv_2_mlp=(40, 30, 30))
    text = report_matrix.depth(draws, figures_matrix.depth_table(bootstrap.summary_table(draws)))
    assert "- Measured MAT of `kv_2` is not distinguishable from that of `kv_1`, by" in text
    assert text.endswith("Not run here: `kv_3`, `kv_4`.")
    text = report_matrix.ablations(draws, ablations.ablation_table(draws)).splitlines()[0]
    assert text == (
        "- Against `kv_2`, higher measured MAT: `kv_2_mlp` (+0.100 [0.100, 0.100]); lower: `kv_2_zero` "
        "(-0.810 [-0.810, -0.810]); not distinguishable: none."
    )


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 0.3, "above"), (-0.1, 0.3, "not distinguishable from")])
def test_a_verdict_needs_all_seeds(low, high, verdict):
    row = pd.Series({"value": 0.2, "low": 0.1, "high": 0.3, "seed_low": low, "seed_high": high})
    assert report_matrix._verdict(row) == verdict
    mirrored = pd.Series({"value": -0.2, "low": -0.3, "high": -0.1, "seed_low": -high, "seed_high": -low})
    assert report_matrix._verdict(mirrored) == verdict.replace("above", "below")
