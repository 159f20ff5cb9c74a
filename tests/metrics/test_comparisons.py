"""Comparisons of drafters: the registry's pairs, and families that were listed beforehand."""

import numpy as np
import pandas as pd
import pytest
from flat_draws import draws_of
from scipy.special import ndtr

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import comparisons
from kvshot_lib.metrics.resampling import Draws


def test_a_comparison_by_hand():
    """One draft step: MAT is 1 + α. kv_2 lies at .3, its variant without TTT at .2, in every document and seed."""
    draws = draws_of({"kv_2": [(30,), (30,)], "kv_2_no_ttt": (20,)})
    table = comparisons.comparison_table(draws)
    assert table[["value", "low", "high"]].to_numpy() == pytest.approx(-0.1)
    told = ["kv_2_no_ttt", "kv_2", 1, "below", "kv_2_no_ttt − kv_2"]
    assert table[["variant", "against", "seeds", "verdict", "minus"]].to_numpy().tolist() == [told]
    assert table["p"].item() < 1e-9


def test_every_draft_step_and_pairs_that_lack_a_run_are_left_out():
    draws = draws_of({"kv_1": (30, 20), "none_1": (30, 30)})
    table = comparisons.comparison_table(
        draws, [("kv_1", "none_1"), ("kv_1", "hidden")], ["step_acceptance", "retention"]
    )
    assert table["draft_step"].tolist()[:2] == [0, 1] and table["draft_step"].isna().tolist()[2]
    assert table["verdict"].tolist() == ["not distinguishable from", "below", "below"]
    assert table["value"].tolist() == pytest.approx([0, -0.1, -1 / 3])


def drawn_as(**draws) -> Draws:
    """Draws of one scalar metric m, as given: variant to [1 + samples]."""
    keys = pd.DataFrame({"variant": list(draws), "seed": 0, "metric": "m", "draft_step": pd.NA})
    return Draws(keys.astype({"draft_step": "Int64"}), np.stack([np.array(row, float) for row in draws.values()]))


def test_a_family_by_hand():
    """Documents alone: resamples one above and one below the value, 200 of them, have a standard error of √(200/199).

    3.0, 2.1, 2.3 and -3.0 of these have p = .003, .036, .022 and .003. Holm: times 4, 1 (no less than the one before),
    2 and 4. With a missing one as the fifth the middle two are not sure.
    """
    error, around = np.sqrt(200 / 199), np.concatenate([[0.0], np.tile([1.0, -1.0], 100)])
    values = {"sure": 3.0, "two": 2.1, "more": 2.3, "below": -3.0}
    draws = drawn_as(zero=np.zeros(201), **{name: value + around for name, value in values.items()})
    questions = [{"id": v, "a": v, "b": "zero", "metric": "m", "asks": f"{v}?"} for v in values]
    table = comparisons.family(draws, questions)
    assert list(table) == [*comparisons.FAMILY, "asks"]
    p = [2 * ndtr(-abs(value) / error) for value in values.values()]
    assert table["p"].tolist() == pytest.approx(p, rel=1e-4) and p == pytest.approx(
        [0.0028, 0.0362, 0.0218, 0.0028], abs=1e-4
    )
    assert table["holm"].tolist() == pytest.approx([4 * p[0], 2 * p[2], 2 * p[2], 4 * p[0]], rel=1e-4)
    assert table["verdict"].tolist() == ["above", "above", "above", "below"] and table["seeds"].tolist() == [1] * 4
    assert table["smallest_visible"].tolist() == pytest.approx([(2.4977 + 0.8416) * error] * 4, rel=1e-4)
    table = comparisons.family(draws, [*questions, {"id": "gone", "a": "gone", "b": "zero", "metric": "m"}])
    assert table["holm"][:4].tolist() == pytest.approx([5 * p[0], 2 * p[1], 3 * p[2], 5 * p[0]], rel=1e-4)
    assert table["verdict"].tolist() == ["above", *["not distinguishable from"] * 2, "below", "not run"]
    assert table.iloc[4, 5:11].isna().all()


def test_a_family_of_metrics_and_steps_and_what_it_refuses():
    """α is .3 .2 and .3 .3: the same at step 0, .1 less at step 1; MAT by runs 1 + .2 + .3 - 1 - .3 - .3."""
    draws = draws_of({"kv_1": (30, 20), "none_1": (30, 30)})
    pair = {"id": "P1", "a": "kv_1", "b": "none_1"}
    table = comparisons.family(draws, [pair, pair | {"id": "P2", "metric": "step_acceptance", "draft_step": 1}])
    assert table[["id", "metric"]].to_numpy().tolist() == [["P1", "measured_mat"], ["P2", "step_acceptance"]]
    assert table["draft_step"].isna().tolist() == [True, False] and table["draft_step"].iloc[1] == 1
    assert table["value"].tolist() == pytest.approx([-0.1, -0.1]) and set(table["verdict"]) == {"below"}
    for wrong, told in (({"a": "kv_1"}, "no b, id"), (pair | {"metric": "mat"}, "P1: no run has mat at no draft_step")):
        with pytest.raises(StudyError, match=told):
            comparisons.family(draws, [wrong])


def test_one_alone_is_compared_with_nothing():
    """Two seeds at 1.0 and 1.2: mean 1.1, error √(.02 / 2) with one degree; t = 11, p = 1 - 2 / π · atan(11) = .0577."""
    keys = pd.DataFrame({"variant": "kv_2", "seed": [0, 1], "metric": "fall", "draft_step": pd.NA})
    draws = Draws(keys.astype({"draft_step": "Int64"}), a_metric(1.0, 1.2, around=(0, 0)))
    found = comparisons.family(draws, [{"id": "X1", "a": "kv_2", "b": None, "metric": "fall"}]).iloc[0]
    assert (found["value"], found["seeds"]) == (pytest.approx(1.1), 2) and found["p"] == pytest.approx(0.0577, abs=1e-4)


def test_registered_pairs_are_those_of_the_registry():
    pairs = comparisons.registered_pairs(VARIANTS)
    assert ("hidden_31", "hidden_post_norm") in pairs and len(pairs) == sum(bool(v.against) for v in VARIANTS.values())
    assert comparisons.registered_pairs(["kv_2", "hidden"]) == []


def a_metric(*seeds, around=(0.0,)):
    """Draws of a variant's seeds: their values, and resamples that differ from them alike."""
    return np.array([[seed, *(seed + np.array(around))] for seed in seeds])


def test_seeds_enter_by_their_own_spread_and_degrees_of_freedom():
    """Seeds 1.0, 1.2 and .5, .7: variances .02 / 2 each, √.02 together, .02² / (2 · .01²) = 2 degrees.

    t = .5 / √.02 = 3.54; with two degrees p = 1 - t / √(2 + t²) = .0715, not the .0004 of a normal.
    """
    found = comparisons.standard_error(a_metric(1.0, 1.2, around=(0, 0)), a_metric(0.5, 0.7, around=(0, 0)))
    assert found == pytest.approx((np.sqrt(0.02), 2))
    assert comparisons.p_value(0.5, *found) == comparisons.p_value(-0.5, *found) == pytest.approx(0.0715, abs=1e-4)
    error, freedom = comparisons.standard_error(a_metric(1.0, around=(0.1, -0.1)), a_metric(0.5, around=(0, 0)))
    assert error == pytest.approx(np.sqrt(0.02)) and freedom == comparisons.MANY  # one seed each: documents alone
    assert comparisons.p_value(0.0, 0.0, 1.0) == 1 and comparisons.p_value(0.1, 0.0, 1.0) == 0


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_without_a_difference_five_in_a_hundred_are_found(seeds):
    """Standard errors of 2 by seeds and of 1 by documents. Resampled seeds would have found 14, 10 and 7 of them."""
    random, found = np.random.default_rng(seeds), 0
    for _ in range(2000):
        one, other = random.normal(0, 2 * np.sqrt(seeds / 2), (2, seeds))
        drawn = a_metric(*(one + random.normal()), around=random.normal(size=40)), a_metric(*other, around=np.zeros(40))
        difference = drawn[0][:, 0].mean() - drawn[1][:, 0].mean()
        found += comparisons.p_value(difference, *comparisons.standard_error(*drawn)) < 0.05
    assert found / 2000 < 0.065


def test_holm_by_hand():
    """The smallest of three times 3, the next times 2, never below the one before it, never above 1."""
    assert comparisons.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparisons.holm([0.5, 0.6]) == pytest.approx([1, 1]) and comparisons.holm([0.04]) == pytest.approx([0.04])
