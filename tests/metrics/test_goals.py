"""B1 and B2: the best is chosen on other data than it is judged on, and its rival has had as many tokens."""

import numpy as np
import pandas as pd
import pytest
import synthetic

from kvshot_lib.metrics import claims, goals, paper, tables
from kvshot_lib.metrics import resampling as bootstrap


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
        name: goals.reads(name)
        for name in ("kv_4", "hybrid_warm_gate_floor", "block_both_2", "hidden_normed", "block_states_4")
    }
    assert sides == dict.fromkeys(("kv_4", "hybrid_warm_gate_floor", "block_both_2"), "kv") | dict.fromkeys(
        ("hidden_normed", "block_states_4"), "hidden"
    )
    assert goals.reads("states_2") == "hidden"
    assert goals.reads("both_4") == "kv"
    assert {goals.reads(v) for v in ("kv_2_zero", "kv_2_shuffled", "kv_2_lagged", "none_1", "mine")} == {"neither"}


def test_the_best_of_each_side_by_validation_at_the_end():
    """1 + .5 + .25 + … + .5⁷ = 1.9921875; the controls' and the shorter validation's high numbers don't count."""
    known = {"hidden": 0.4, "hidden_normed": 0.45, "kv_2": 0.5, "kv_2_zero": 0.8}
    table = goals.contenders(
        runs(**dict.fromkeys([*known, "kv_2_no_ttt"], 100)), pd.concat([history(**known), history(1, kv_2_no_ttt=0.9)])
    )
    assert table["variant"].tolist() == ["kv_2", "hidden_normed", "hidden"]
    assert table["validation_mat"].iloc[0] == pytest.approx(1.9921875)
    assert goals.best_pair(table) == ("kv_2", "hidden_normed")
    plain, best = goals.acceptance_goals(table)
    assert plain.terms == ((1, "kv_2", "measured_mat"), (-1.1, "hidden", "measured_mat"))
    assert best.terms[1] == (-1.1, "hidden_normed", "measured_mat") and best.kind == "goal"


def test_a_warm_start_is_compared_with_one_that_had_as_many_tokens():
    known = {"hidden": 0.6, "hidden_continued": 0.4, "hybrid_warm": 0.7, "kv_1": 0.5}
    table = goals.contenders(runs(**dict.fromkeys(known, 100)), history(**known))
    assert table.set_index("variant")["tokens"].to_dict() == {
        "hybrid_warm": 200,
        "hidden_continued": 200,
        "hidden": 100,
        "kv_1": 100,
    }
    assert goals.best_pair(table) == ("hybrid_warm", "hidden_continued")
    assert {claim.terms[1][1] for claim in goals.acceptance_goals(table)} == {"hidden_continued"}


def test_nothing_trained_is_not_run():
    table = goals.contenders(runs(kv_2_zero=100), history(kv_2_zero=0.5))
    assert goals.best_pair(table) == ("", "")
    draws = bootstrap.draw(*(synthetic.matrix(("kv_1",), 1, 20)[name] for name in ("counts", "run_lengths")), 20)
    card = claims.scorecard(draws, paper.read_paper(), goals.acceptance_goals(table))
    assert set(card["verdict"]) == {"not run"}


def prompts(speeds: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    """Rows of `decode_prompts`: 10 tokens a prompt; the target alone takes 10 s, a chain 10 / speed."""
    rows = []
    for (variant, plan), each in speeds.items():
        for number, speed in enumerate(each):
            for mode, name, seconds in (("alone", "-", 10.0), ("chain", plan, 10 / speed)):
                row = dict.fromkeys(tables.SCHEMAS["decode_prompts"], 0.0)
                row |= {
                    "variant": variant,
                    "seed": 0,
                    "mode": mode,
                    "plan": name,
                    "prompt": f"p{number}",
                    "turn": 0,
                    "seconds": seconds,
                }
                rows.append(
                    row | {"new_tokens": 10, "forwards": 5, "dtype": "float32", "device": "cpu", "category": "any"}
                )
    return pd.DataFrame(rows).drop_duplicates(["variant", "mode", "plan", "prompt"])


def test_speed_is_chosen_on_every_second_prompt_and_judged_on_the_others():
    """kv_1's chain of 7 is fastest on prompts 0 and 2 and slow on 1 and 3, where it is judged; hidden's 4 is chosen over its 7."""
    timed = prompts({
        ("kv_1", "7"): [3.0, 1.0, 3.0, 1.0], ("kv_1", "4"): [2.0, 2.0, 2.0, 2.0],
        ("hidden", "7"): [1.0, 9.0, 1.0, 9.0], ("hidden", "4"): [1.5, 1.25, 1.5, 1.25], ("kv_2_zero", "7"): [9.0] * 4,
    })  # fmt: skip
    claim, draws = goals.speed_goal(timed, samples=50)
    assert claim.claim == "B2" and claim.terms == ((1, "kv_1", "speedup"), (-1.1, "hidden", "speedup"))
    assert "chains of 7" in claim.statement and "chains of 4" in claim.statement
    assert draws.mean("kv_1", "speedup").value == pytest.approx(1.0) and draws.mean(
        "hidden", "speedup"
    ).value == pytest.approx(1.25)
    card = claims.scorecard(draws, paper.read_paper(), (claim,))
    assert card["verdict"].tolist() == ["not reached"] and card["value"].iloc[0] == pytest.approx(1 - 1.1 * 1.25)


def test_a_tenth_more_speed_reaches_the_goal_and_nothing_timed_is_not_run():
    claim, draws = goals.speed_goal(prompts({("kv_1", "7"): [2.0] * 6, ("hidden", "7"): [1.5] * 6}), samples=50)
    assert claims.scorecard(draws, paper.read_paper(), (claim,))["verdict"].tolist() == ["reached"]
    claim, draws = goals.speed_goal(tables.empty("decode_prompts"), samples=50)
    assert claims.scorecard(draws, paper.read_paper(), (claim,))["verdict"].tolist() == ["not run"]
    claim, draws = goals.speed_goal(prompts({("kv_1", "7"): [2.0] * 6}), samples=50)
    assert claims.scorecard(draws, paper.read_paper(), (claim,))["missing"].tolist() == ["hidden"]


def test_speed_is_judged_on_the_duels_prompts_where_there_are_any():
    """Chosen on all of p0 … p3, now that others judge: kv_1's 4 and hidden's 7; of the duel p3 is known and p5 lacks one of them."""
    timed = prompts({
        ("kv_1", "7"): [3.0, 1.0, 3.0, 1.0], ("kv_1", "4"): [2.0, 2.0, 2.0, 2.0],
        ("hidden", "7"): [1.5, 9.0, 1.5, 9.0], ("hidden", "4"): [1.6, 1.25, 1.6, 1.25],
    })  # fmt: skip
    duel = prompts({("kv_1", "4"): [9.0] * 3 + [9.0, 3.0, 9.0], ("hidden", "7"): [1.0] * 3 + [1.0, 2.0]})
    duel = duel[~duel["prompt"].isin(["p0", "p1", "p2"])]
    claim, draws = goals.speed_goal(timed, duel, samples=50)
    assert "chains of 4" in claim.statement and "chains of 7" in claim.statement
    assert draws.mean("kv_1", "speedup").value == pytest.approx(3) and draws.mean(
        "hidden", "speedup"
    ).value == pytest.approx(2)
    assert draws.keys["prompts"].tolist() == [1, 1]
    other = duel.assign(variant=duel["variant"].replace("kv_1", "kv_2"))  # a duel of others says nothing of these
    assert goals.speed_goal(timed, other, samples=50)[1].keys["prompts"].tolist() == [2, 2]


def test_one_refuted_part_refutes_a_goal():
    assert claims.combine(["reached", "not reached"]) == "not reached"
    assert (
        claims.combine(["reached", "reached"]) == "reached" and claims.combine(["reached", "not run"]) == "inconclusive"
    )
