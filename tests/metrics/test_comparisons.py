"""Comparisons of drafters: the registry's pairs, and families that were listed beforehand."""

import numpy as np
import pandas as pd
import pytest
from flat_draws import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import comparisons
from kvshot_lib.metrics.resampling import Draws, Interval


def test_a_comparison_by_hand():
    """One draft step: MAT is 1 + α. kv_2 lies at .3, its variant without TTT at .2, in every document and seed."""
    draws = draws_of({"kv_2": [(30,), (30,)], "kv_2_no_ttt": (20,)})
    table = comparisons.comparison_table(draws)
    assert table[["value", "low", "high"]].to_numpy() == pytest.approx(-0.1)
    told = ["kv_2_no_ttt", "kv_2", 1, "below", "kv_2_no_ttt − kv_2"]
    assert table[["variant", "against", "seeds", "verdict", "minus"]].to_numpy().tolist() == [told]
    assert table["p"].tolist() == [pytest.approx(2 / 301)]


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
    """Of 199 resamples of a - b none, 3, 2 and 199 lie at or below 0: p = 2, 8, 6 and 2 of 200.

    Holm with the missing one as the fifth: .01 · 5, .01 · 4 (but no less than the one before), .03 · 3, .04 · 2 (no
    less than .09). So at 5% none is sure; without the missing one .01 · 4 is.
    """
    sure, four, three = (np.concatenate([[1.0], -np.ones(n), np.ones(199 - n)]) for n in (0, 3, 2))
    draws = drawn_as(zero=np.zeros(200), sure=sure, four=four, three=three, below=-sure)
    questions = [
        {"id": v, "a": v, "b": "zero", "metric": "m", "asks": f"{v}?"} for v in ("sure", "four", "three", "below")
    ]
    table = comparisons.family(draws, questions)
    assert list(table) == [*comparisons.FAMILY, "asks"]
    assert table["p"].tolist() == pytest.approx([0.01, 0.04, 0.03, 0.01])
    assert table["holm"].tolist() == pytest.approx([0.04, 0.06, 0.06, 0.04])
    assert table["verdict"].tolist() == ["above", *["not distinguishable from"] * 2, "below"]
    assert table["smallest_visible"].tolist() == [0] * 4 and table["seeds"].tolist() == [1] * 4
    table = comparisons.family(draws, [*questions, {"id": "gone", "a": "gone", "b": "zero", "metric": "m"}])
    assert table["holm"][:4].tolist() == pytest.approx([0.05, 0.09, 0.09, 0.05])
    assert table["verdict"].tolist() == ["not distinguishable from"] * 4 + ["not run"] and table.iloc[
        4:, 5:11
    ].isna().all(axis=None)


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


def test_registered_pairs_are_those_of_the_registry():
    pairs = comparisons.registered_pairs(VARIANTS)
    assert ("hidden_31", "hidden_post_norm") in pairs and len(pairs) == sum(bool(v.against) for v in VARIANTS.values())
    assert comparisons.registered_pairs(["kv_2", "hidden"]) == []


def test_p_values_count_resamples_on_the_other_side():
    """Of 99 resamples 2 lie at or below 0: 2 · 3 / 100. None does: 2 / 100, as a p of 0 can't be known. All do: 1."""
    drawn = np.concatenate([[0.5], [-1.0, 0.0], np.ones(97)])
    assert comparisons.p_value(drawn) == comparisons.p_value(-drawn) == pytest.approx(0.06)
    assert comparisons.p_value(np.ones(100)) == pytest.approx(0.02) and comparisons.p_value(np.zeros(100)) == 1


def test_holm_by_hand():
    """The smallest of three times 3, the next times 2, never below the one before it, never above 1."""
    assert comparisons.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparisons.holm([0.5, 0.6]) == pytest.approx([1, 1]) and comparisons.holm([0.04]) == pytest.approx([0.04])


def test_the_smallest_visible_difference_is_seen_in_four_of_five_studies():
    """With a standard error of .1 a true difference of .28 leaves 0 outside the interval in 80%."""
    least = comparisons.smallest_visible(Interval(0.0, -0.196, 0.196))
    assert least == pytest.approx(0.28)
    means = np.random.default_rng(0).normal(least, 0.1, 20_000)
    assert (means - 0.196 > 0).mean() == pytest.approx(0.8, abs=0.01)
