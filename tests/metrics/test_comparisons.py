"""Comparisons of drafters: the registry's pairs, families of them, and the best of each side."""

import numpy as np
import pandas as pd
import pytest
from flat_draws import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import comparisons, tables
from kvshot_lib.metrics.resampling import Draws, Interval, resample_weights
from kvshot_lib.metrics.scorecard import acceptance_goals, read_paper, scorecard, speed_goal


def test_a_comparison_by_hand():
    """One draft step: MAT is 1 + α. kv_2 lies at .3, its variant without TTT at .2, in every document and seed."""
    draws = draws_of({"kv_2": [(30,), (30,)], "kv_2_no_ttt": (20,)})
    found = comparisons.compare(draws, "kv_2_no_ttt", "kv_2")
    assert (found.value, found.low, found.high) == pytest.approx((-0.1,) * 3)
    assert comparisons.compare(draws, "kv_2", "kv_2_no_ttt", "step_acceptance", 0).value == pytest.approx(0.1)
    table = comparisons.comparison_table(draws)
    assert table[["variant", "against", "seeds", "verdict"]].to_numpy().tolist() == [
        ["kv_2_no_ttt", "kv_2", 1, "below"]
    ]
    assert table["p"].tolist() == [pytest.approx(2 / 301)]


def test_every_draft_step_and_pairs_that_lack_a_run():
    draws = draws_of({"kv_1": (30, 20), "none_1": (30, 30)})
    table = comparisons.comparison_table(
        draws, [("kv_1", "none_1"), ("kv_1", "hidden")], ["step_acceptance", "retention"]
    )
    assert table["draft_step"].tolist()[:2] == [0, 1] and table["draft_step"].isna().tolist()[2]
    assert table["verdict"].tolist() == ["not distinguishable from", "below", "below"] + ["not run"] * 3
    assert table["value"][:3].tolist() == pytest.approx([0, -0.1, -1 / 3]) and table["value"][3:].isna().all()


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


# The best of each side


def runs(**tokens) -> pd.DataFrame:
    starts = {"hybrid_warm": "hidden", "hidden_continued": "hidden"}
    return pd.DataFrame(
        {"variant": v, "seed": 0, "trained_tokens": n, "init_from": starts.get(v, "")} for v, n in tokens.items()
    )


def history(steps: int = 7, **acceptance) -> pd.DataFrame:
    """A validation at the end, all steps alike, and a better one in mid-training that must not count."""
    rows = [
        [v, 0, step, step, 1.0, "validation", k, np.nan, value if step == 20 else 0.9, 0.0]
        for v, value in acceptance.items() for step in (10, 20) for k in range(steps)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["history"])).astype({"draft_step": "Int64"})


def test_what_counts_as_reuse():
    sides = {
        "kv": ("kv_4", "hybrid_warm_gate_floor", "block_both_2", "both_4"),
        "hidden": ("hidden_normed", "block_states_4", "states_2"),
        "neither": ("kv_2_zero", "kv_2_shuffled", "kv_2_lagged", "none_1", "mine"),
    }
    for side, variants in sides.items():
        assert {comparisons.reads(variant) for variant in variants} == {side}


def test_the_best_of_each_side_by_validation_at_the_end():
    """1 + .5 + .25 + … + .5⁷ = 1.9921875; the controls' and the shorter validation's high numbers don't count."""
    known = {"hidden": 0.4, "hidden_normed": 0.45, "kv_2": 0.5, "kv_2_zero": 0.8}
    record = pd.concat([history(**known), history(1, kv_2_no_ttt=0.9)])
    trained = runs(**dict.fromkeys([*known, "kv_2_no_ttt"], 100))
    table = comparisons.contenders(trained, record)
    assert table["variant"].tolist() == ["kv_2", "hidden_normed", "hidden"]
    assert table["validation_mat"].iloc[0] == pytest.approx(1.9921875)
    assert comparisons.best_pair(table) == ("kv_2", "hidden_normed", "hidden")
    plain, best = acceptance_goals(trained, record)
    assert plain.terms == ((1, "kv_2", "measured_mat"), (-1.1, "hidden", "measured_mat"))
    assert best.terms[1] == (-1.1, "hidden_normed", "measured_mat") and best.kind == "goal"


def test_a_warm_start_is_compared_with_one_that_had_as_many_tokens():
    known = {"hidden": 0.6, "hidden_continued": 0.4, "hybrid_warm": 0.7, "kv_1": 0.5}
    table = comparisons.contenders(runs(**dict.fromkeys(known, 100)), history(**known))
    tokens = {"hybrid_warm": 200, "hidden_continued": 200, "hidden": 100, "kv_1": 100}
    assert table.set_index("variant")["tokens"].to_dict() == tokens
    assert comparisons.best_pair(table) == ("hybrid_warm", "hidden_continued", "hidden_continued")


def test_nothing_trained_is_not_run():
    record = runs(kv_2_zero=100), history(kv_2_zero=0.5)
    assert comparisons.best_pair(comparisons.contenders(*record)) == ("kv_4", "hidden", "hidden")
    card = scorecard(draws_of({"kv_1": (30,)}), read_paper(), acceptance_goals(*record))
    assert set(card["verdict"]) == {"not run"}


def prompts(speeds: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Rows of `decode_prompts`: 10 tokens a prompt; the target alone takes 10 s, a chain 10 / speed."""
    rows = []
    for (variant, plan), each in speeds.items():
        for number, speed in enumerate(each):
            for mode, name, seconds in (("alone", "-", 10.0), ("chain", plan, 10 / speed)):
                row = dict.fromkeys(tables.SCHEMAS["decode_prompts"], 0.0)
                row |= {"variant": variant, "mode": mode, "plan": name, "prompt": f"p{number}", "seconds": seconds}
                row |= {"seed": 0, "turn": 0, "new_tokens": 10, "forwards": 5}
                rows.append(row | {"dtype": "float32", "device": "cpu", "category": "any"})
    return pd.DataFrame(rows).drop_duplicates(["variant", "mode", "plan", "prompt"])


def speeds_of(*decoded: pd.DataFrame):
    """B2, its draws on 50 resamples and its verdict, from `decode_prompts` and `decode_duel` (none by default)."""
    best, draws = comparisons.speed_draws(*[*decoded, tables.empty("decode_duel")][:2], samples=50)
    claim = speed_goal(best)
    return claim, draws, scorecard(draws, read_paper(), (claim,)).iloc[0]


def test_speed_is_chosen_on_every_second_prompt_and_judged_on_the_others():
    """kv_1's chain of 7 is fastest on prompts 0 and 2, slow on 1 and 3, the judges; hidden's 4 is chosen over its 7."""
    timed = prompts({
        ("kv_1", "7"): [3.0, 1.0, 3.0, 1.0], ("kv_1", "4"): [2.0, 2.0, 2.0, 2.0],
        ("hidden", "7"): [1.0, 9.0, 1.0, 9.0], ("hidden", "4"): [1.5, 1.25, 1.5, 1.25], ("kv_2_zero", "7"): [9.0] * 4,
    })  # fmt: skip
    claim, draws, row = speeds_of(timed)
    assert claim.claim == "B2" and claim.terms == ((1, "kv_1", "speedup"), (-1.1, "hidden", "speedup"))
    assert "chains of 7" in claim.statement and "chains of 4" in claim.statement
    measured = [draws.mean(variant, "speedup").value for variant in ("kv_1", "hidden")]
    assert measured == pytest.approx([1.0, 1.25])
    assert row["verdict"] == "not reached" and row["value"] == pytest.approx(1 - 1.1 * 1.25)


def test_a_tenth_more_speed_reaches_the_goal_and_nothing_timed_is_not_run():
    assert speeds_of(prompts({("kv_1", "7"): [2.0] * 6, ("hidden", "7"): [1.5] * 6}))[2]["verdict"] == "reached"
    assert speeds_of(tables.empty("decode_prompts"))[2]["verdict"] == "not run"
    assert speeds_of(prompts({("kv_1", "7"): [2.0] * 6}))[2]["missing"] == "hidden"


def test_speed_is_judged_on_the_duels_prompts_where_there_are_any():
    """Chosen on all of p0 … p3: kv_1's 4 and hidden's 7; of the duel p3 is known and p5 lacks one of them."""
    timed = prompts({
        ("kv_1", "7"): [3.0, 1.0, 3.0, 1.0], ("kv_1", "4"): [2.0, 2.0, 2.0, 2.0],
        ("hidden", "7"): [1.5, 9.0, 1.5, 9.0], ("hidden", "4"): [1.6, 1.25, 1.6, 1.25],
    })  # fmt: skip
    duel = prompts({("kv_1", "4"): [9.0] * 3 + [9.0, 3.0, 9.0], ("hidden", "7"): [1.0] * 3 + [1.0, 2.0]})
    duel = duel[~duel["prompt"].isin(["p0", "p1", "p2"])]
    claim, draws, _ = speeds_of(timed, duel)
    assert "chains of 4" in claim.statement and "chains of 7" in claim.statement
    measured = [draws.mean(variant, "speedup").value for variant in ("kv_1", "hidden")]
    assert measured == pytest.approx([3, 2]) and draws.keys["documents"].tolist() == [1, 1]
    other = duel.assign(variant=duel["variant"].replace("kv_1", "kv_2"))  # a duel of others says nothing of these
    assert speeds_of(timed, other)[1].keys["documents"].tolist() == [2, 2]


def test_the_duels_weights_are_those_of_its_prompts():
    """The interval of a speed resamples prompts: half of four at 1, half at 3, all of equal length."""
    timed = prompts({("kv_1", "7"): [2.0] * 4, ("hidden", "7"): [2.0] * 4})
    duel = prompts({("kv_1", "7"): [0] * 0 + [9.0] * 4 + [1.0, 3.0, 1.0, 3.0], ("hidden", "7"): [2.0] * 8})
    draws = speeds_of(timed, duel)[1]
    weights = resample_weights(4, 50, 0)
    seconds = weights @ np.array([10, 10 / 3, 10, 10 / 3])
    assert draws.rows("kv_1", "speedup")[0] == pytest.approx(weights.sum(1) * 10 / seconds)
