"""Slopes against closed forms and full refits; a planted interaction is found, and chance finds one about as often as it should."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics.claims import stated
from kvshot_lib.metrics.interaction import (
    cell_rates,
    fit_logistic,
    join_matches,
    quantile_bin,
    shift_draws,
    slope_draws,
    standardised,
)
from kvshot_lib.metrics.resampling import resample_weights
from kvshot_lib.metrics.scorecard import read_paper, scorecard


def made_up(slopes: dict[str, float], seed=0, documents=40, anchors=60, on_entropy=0.0):
    """Anchors whose shift goes with their entropy, documents of their own ease, and drafters that fall with shift as told."""
    chance = np.random.default_rng(seed)
    n = documents * anchors
    document = np.repeat(np.arange(documents), anchors)
    entropy = chance.normal(size=n)
    shift = 0.6 * entropy + 0.8 * chance.normal(size=n)
    ease = chance.normal(0, 0.5, documents)[document] - 0.8 * entropy
    table = pd.DataFrame({"document": document, "draft_step": 6, "shift": shift, "entropy": entropy})
    rows = []
    for variant, slope in slopes.items():
        odds = ease + slope * shift - on_entropy * (variant == "hidden") * entropy
        match = (chance.random(n) < 1 / (1 + np.exp(-odds))).astype(int).reshape(documents, anchors)
        rows += [[variant, 0, d, 6, "".join(map(str, m))] for d, m in enumerate(match)]
    return table, pd.DataFrame(rows, columns=["variant", "seed", "document", "draft_step", "matches"])


def card_of(slopes, **settings):
    draws = shift_draws(*made_up(slopes, **settings), samples=400)
    return draws, scorecard(draws, read_paper(), stated("H1")).iloc[0]


def test_regression_equals_closed_forms():
    """Groups of 40 with 10 and of 60 with 45 matches: log-odds ln(1/3), and ln 3 - ln(1/3) between them."""
    group = np.repeat([0, 1], [40, 60])
    y = np.concatenate([np.arange(40) < 10, np.arange(60) < 45]).astype(float)
    assert fit_logistic(np.ones((100, 1)), y) == pytest.approx([np.log(55 / 45)])
    assert fit_logistic(np.column_stack([np.ones(100), group]), y) == pytest.approx([np.log(1 / 3), np.log(9)])
    assert np.isnan(fit_logistic(np.column_stack([np.ones(100), group]), group.astype(float))).all()  # separated


def test_interaction_of_the_joint_model_is_the_difference_of_slopes():
    chance = np.random.default_rng(0)
    x = np.column_stack([np.ones(300), chance.normal(size=(300, 2))])
    y = [(chance.random(300) < 0.4).astype(float) for _ in range(2)]
    joint = np.block([[x, np.zeros_like(x)], [x, x]])  # 1, shift, entropy, and each times "is the second drafter"
    together = fit_logistic(joint, np.concatenate(y))
    assert together[4] == pytest.approx(fit_logistic(x, y[1])[1] - fit_logistic(x, y[0])[1])


def test_resamples_equal_full_fits_on_each_of_them():
    table, matches = made_up({"hidden": -0.7}, documents=30)
    y = join_matches(table, matches)["hidden", 0].astype(float)
    x = np.column_stack([np.ones(len(y)), table["shift"], table["entropy"]])
    document, weights = table["document"].to_numpy(), resample_weights(30, 40, seed=1)
    drawn = slope_draws(x, y, document, weights)
    assert drawn[0] == pytest.approx(fit_logistic(x, y))
    for weight, found in zip(weights, drawn):
        times = weight[document]
        assert found == pytest.approx(fit_logistic(np.repeat(x, times, axis=0), np.repeat(y, times)), abs=0.02)


def test_planted_interaction_is_found_and_its_sign_is_told():
    _, row = card_of({"hidden": -1.0, "kv_2": -0.3})
    assert row["verdict"] == "supported" and row["low"] < 0.7 < row["high"]
    assert row["statistic"] == "shift_slope[6](kv_2) - shift_slope[6](hidden)".replace("[6]", "[last]")
    _, row = card_of({"hidden": -0.3, "kv_2": -1.0})
    assert row["verdict"] == "not supported"


def test_without_an_interaction_chance_finds_one_about_one_time_in_twenty():
    """40 studies: 5% would be 2; eight or more are a chance of 0.06%. A drafter that only dislikes entropy fools nobody."""
    told = [card_of({"hidden": -0.5, "kv_2": -0.5}, seed=seed, on_entropy=0.6)[1]["verdict"] for seed in range(40)]
    assert sum(verdict != "inconclusive" for verdict in told) < 8


def test_entropy_alone_makes_no_shift_slope_and_standardising_takes_it_out():
    table, matches = made_up({"hidden": 0.0}, documents=150)
    draws = shift_draws(table, matches, samples=200)
    assert draws.mean("hidden", "shift_slope", 6).verdict(0) == "not distinguishable from"
    assert draws.mean("hidden", "entropy_slope", 6).verdict(0) == "below"
    match, bins = join_matches(table, matches)["hidden", 0], quantile_bin(table["shift"], 5)
    raw = match[bins == 0].mean() - match[bins == 4].mean()
    assert raw > 0.15 and abs(draws.mean("hidden", "standardised_fall", 6).value) < 0.06  # wide bins leave a little


def test_quantile_bins_and_standardisation_by_hand():
    assert quantile_bin(pd.Series([5, 1, 3, 2]), 2).tolist() == [1, 0, 1, 0]
    cells = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 2], [1, 3], [1, 3], [1, 0]])  # entropies 3, 2, 1, 2 of 8
    rates = np.array([[[0.8, 0.4, 0.0, 0.0]]])
    assert standardised(rates, cells) == pytest.approx(np.array([[0.8 * 3 / 8 + 0.4 * 2 / 8]]))


def test_rates_are_counted_by_hand_and_rows_without_shift_are_left_out():
    cells, match = np.array([[0, 0], [0, 0], [4, 3]]), np.array([1, 0, 1])
    rates = cell_rates(cells, match, np.array([0, 1, 1]), np.array([[1, 1], [2, 0]]))
    assert rates[:, 0, 0].tolist() == [0.5, 1] and rates[0, 4, 3] == 1 and np.isnan(rates[1, 4, 3])
    table = pd.DataFrame({"document": 0, "draft_step": 0, "shift": [0.1, 0.2, 0.3, 0.4, 0.5, np.nan], "entropy": 1.0})
    columns = ["variant", "seed", "document", "draft_step", "matches"]
    draws = shift_draws(table, pd.DataFrame([["hidden", 0, 0, 0, "110101"]], columns=columns), samples=5)
    assert draws.keys["anchors"].unique() == [5]


def test_matches_are_joined_in_any_order_of_rows_and_other_anchors_are_refused():
    table, matches = made_up({"hidden": 0.0, "kv_1": 0.0}, documents=5)
    mixed = join_matches(table, matches.sample(frac=1, random_state=0))
    for run, match in join_matches(table, matches).items():
        assert (match == mixed[run]).all()
    other = table.sort_values(["draft_step", "document"], ascending=[True, False], kind="stable").reset_index(drop=True)
    moved = join_matches(other, matches)["hidden", 0]
    assert (moved[other["document"] == 2] == mixed["hidden", 0][table["document"] == 2]).all()
    with pytest.raises(StudyError, match="has other anchors for hidden seed 0"):
        join_matches(table[1:], matches)


def test_a_handful_of_matches_gives_no_slope():
    table, matches = made_up({"hidden": 0.0})
    matches["matches"] = ["1" + "0" * 59] * 40  # 40 matches in all
    assert np.isnan(shift_draws(table, matches, samples=20).rows("hidden", "shift_slope", 6)).all()
