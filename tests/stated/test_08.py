"""Numbers in the text of notebook 08, held against the recorded tables."""

import re
from functools import cache

import numpy as np
import pandas as pd
from notebook_checks import ROOT
from recorded import draws, longer, minus, one_minus, table, turned
from stated import checked, text_of

from kvshot_lib.metrics.claims import CLAIMS, LAST, in_favour
from kvshot_lib.metrics.comparisons import MANY, holm, p_value
from kvshot_lib.metrics.diagnostics import flow_draws, gate_draws
from kvshot_lib.metrics.resampling import Interval
from kvshot_lib.metrics.scorecard import all_draws, compare_with_paper, paper_value, read_paper, scorecard

NOTEBOOK = "notebooks/08_paper_scorecard.ipynb"
EXPECTED, STEP = "expected_mat", "step_acceptance"


@cache
def card():
    drawn, apart = (all_draws(ROOT / "data/recorded" / name) for name in ("full", "sources"))
    return scorecard(drawn, read_paper(), experiments={"sources": apart}).set_index("claim")


@cache
def by_student():
    """Of each part of a claim, whether the statistic is on its side, and p by Student's t after Holm over all parts."""
    drawn = {name: all_draws(ROOT / "data/recorded" / (name or "full")) for name in ("", "sources")}
    rows, parts = {}, [claim for claim in CLAIMS if claim.kind == "claim" and not claim.aside]
    for claim in parts:
        each = {variant: 0.0 for variant in claim.variants}
        for weight, variant, metric, *step in claim.terms:
            step = [6 if k == LAST else k for k in step]
            each[variant] = each[variant] + weight * drawn[claim.experiment].rows(variant, metric, *step)
        value, *resampled = sum(rows.mean(0) for rows in each.values())
        seeds = [(rows[:, 0].var(ddof=1) / len(rows), len(rows) - 1) for rows in each.values() if len(rows) > 1]
        variance = np.nanvar(resampled, ddof=1) + sum(own for own, _ in seeds)
        freedom = variance**2 / sum(own**2 / degrees for own, degrees in seeds) if seeds else MANY
        favour = in_favour(Interval(value, value, value), claim.direction, claim.threshold).value
        rows[claim.claim] = favour > 0, p_value(favour, np.sqrt(variance), freedom)
    found = pd.DataFrame(rows, index=["favour", "p"]).T
    return found.assign(p=holm(found["p"]))


@cache
def gates():
    return gate_draws(table("gradients"))


def trained():
    runs = table("runs")
    return len(runs), runs["variant"].nunique(), runs["trained_tokens"].mean() / 1e6


def statistic(claim):
    """Value and interval of a claim's statistic."""
    return card().loc[claim, ["value", "low", "high"]].tolist()


def gate(variant, metric):
    return [*vars(gates().contrast((1, variant, metric))).values()]


def sparse():
    """Share of the draft's own entries in the gradient of values, and of keys."""
    drawn = flow_draws(table("gradient_flow"))
    return [x for of in ("value", "key") for x in vars(drawn.contrast((1, "hidden", f"{of}_gradient"))).values()]


def paper(metric, *variants):
    return [paper_value(read_paper(), variant, metric) for variant in variants]


def orderings():
    told = compare_with_paper(draws(), read_paper())["ordering"].value_counts()
    assert told["not distinguishable"] == 2
    return told[["yes", "no", "not distinguishable"]].sum(), told["yes"], told["no"]


def on_gemma(a, b, *which):
    return minus(a, b, *which, profile="gemma-3-270m")


STATED = [
    (
        "judged by itself, at 5%. By Student's t, which knows how few seeds are, and with Holm's correction over all 29 parts, C6 and C11 would be open as well (p = .059 and .061)",
        lambda: [5, len(by_student()), *by_student()["p"][["C6", "C11"]]],
    ),
    (
        "the cache is worth .293 tokens [.266, .320] (C2), and .019 [.014, .024] at the last draft step (K6)",
        lambda: [*one_minus("kv_1", "none_1"), *one_minus("kv_1", "none_1", (STEP, 6))],
    ),
    (
        "the cache is worth .230 tokens [.205, .256]. K6 becomes open: at the last draft step it is .004 [−.000, .008]",
        lambda: [*longer("kv_4", "none_4"), *longer("kv_4", "none_4", (STEP, 6))],
    ),
    (
        "stays not reproduced, by .096 [.072, .121] with one layer and .128 [.106, .150] with four",
        lambda: [*one_minus("states_1", "kv_1"), *longer("states_4", "kv_4")],
    ),
    (
        "hold, by .769 tokens [.657, .884] and .072 [.059, .085]",
        lambda: [*on_gemma("kv_2", "none_2"), *on_gemma("kv_2", "none_2", STEP, 6)],
    ),
    ("are worse, by .827 [.711, .946]", lambda: turned(on_gemma("states_2", "kv_2"))),
    (
        "these two are .48 and .50 on them",
        lambda: [on_gemma("kv_2", "none_2", EXPECTED)[0], -on_gemma("states_2", "kv_2", EXPECTED)[0]],
    ),
    (
        ".181 tokens [.160, .207] of measured MAT, against another text's, where to an own one it is worth .612 [.597, .629]",
        lambda: [
            *minus("kv_1_anchor_query", "kv_1_anchor_query_shuffled", profile="sources"),
            *minus("kv_1", "kv_1_shuffled", profile="sources"),
        ],
    ),
    (
        "K6: so it does at the last draft step (acceptance) | −.006",
        lambda: minus("kv_1", "none_1", "step_acceptance", 6)[:1],
    ),
    ("+.011 [.007, .015], as expected", lambda: minus("kv_1", "none_1", "step_acceptance", 6, profile="sources")),
    ("+.173 [.161, .186], reproduced", lambda: minus("kv_1", "none_1", profile="sources")),
    ("+.067 [.048, .089], not reproduced", lambda: minus("states_2", "kv_2", profile="sources")),
    (
        "−.556, not reproduced | +1.400 [1.337, 1.463], reproduced",  # the first is of a table that fell
        lambda: (-0.556, *card().loc["C15c", ["measured_value", "measured_low", "measured_high"]]),
    ),
    (
        "It gets .134 [.077, .193] *less*: .025 [−.035, .080], where an own query gets .159 [.150, .168]",
        lambda: (
            *turned(statistic("C15d")),
            *minus("kv_1_oracle_query", "kv_1_oracle_query_shuffled", EXPECTED, profile="sources"),
            *minus("kv_1", "none_1", EXPECTED, profile="sources"),
        ),
    ),
    (
        "an own query gets .520 [.507, .535]",
        lambda: minus("kv_1", "kv_1_shuffled", EXPECTED, profile="sources"),
    ),
    (
        "157 trainings of 59 drafters on SmolLM2-135M-Instruct, 15 million tokens each (19 drafters start from trained ones), judged on 508 greedy answers",
        lambda: [
            *trained(),
            table("runs").dropna(subset="init_from")["variant"].nunique(),
            table("counts")["document"].nunique(),
        ],
    ),
    ("beat the cache by .157 tokens [.138, .176]", lambda: statistic("C12c")),
    ("with un-rotated keys on both sides by .110 [.092, .126]", lambda: statistic("C12d")),
    ("a draft step 47% slower", lambda: [100 * (np.exp(statistic("C14c")[0]) - 1)]),
    (
        "is .029 at step 0 and −.006 [−.012, −.002] at step 6",
        lambda: [minus("kv_1", "none_1", STEP, 0)[0], 0, *statistic("K6"), 6],
    ),
    ("cross-attention alone gains .120 [.107, .135]", lambda: statistic("C10b")),
    ("it *loses* .072 [.056, .087]", lambda: turned(statistic("C10a"))),
    ("the values' share is .044 [.033, .054], but the keys' .203 [.132, .277]", sparse),
    ("whose gate is at .271 [.257, .288] after a tenth", lambda: gate("hybrid_warm", "gate_after_a_tenth")),
    ("whose gate is at .142 [.131, .153]", lambda: gate("hybrid_warm_31", "gate_after_a_tenth")),
    ("the paper's gate is at about .1.", lambda: paper("gate_at_the_end", "hybrid_warm")),
    ("Ours reopens, to .567 [.542, .589]", lambda: gate("hybrid_warm", "gate_at_the_end")),
    ("Of 32 differences 16 have the paper's sign, 14 the other", orderings),
    ("(1.84, 2.23, 2.34 < 2.37)", lambda: paper(EXPECTED, "kv_1", "kv_2", "kv_4", "hidden")),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)


def test_verdicts_in_the_text_are_those_of_the_scorecard():
    whole = card()[~card().index.str[-1].str.isalpha()]
    claims = whole[whole["kind"] == "claim"]["verdict"].value_counts()
    assert claims.to_dict() == {"reproduced": 9, "not reproduced": 7, "inconclusive": 2}
    text = text_of(NOTEBOOK)
    assert "Of 18 claims nine are reproduced, seven are not, and two stay open" in text
    parts = {verdict: text.partition(f"**{word}.**")[2].partition("**")[0] for word, verdict in (
        ("Reproduced", "reproduced"), ("Not reproduced", "not reproduced"), ("Open", "inconclusive"))}  # fmt: skip
    for verdict, told in parts.items():
        named = {name.rstrip("abcd") for name in re.findall(r"\((C\d+[a-d]?)", told)}
        assert named and all(whole.loc[name, "verdict"] == verdict for name in named), (verdict, named)


def test_two_verdicts_hang_on_each_part_being_judged_by_itself():
    """Where both ways decide, they decide alike."""
    told, ways = card()["verdict"], {"reproduced": True, "not reproduced": False}
    decided = {name: ways[told[name]] for name in by_student().index if told[name] in ways}
    assert {name for name in decided if by_student()["p"][name] > 0.05} == {"C6", "C11"}
    assert all(by_student()["favour"][name] == way for name, way in decided.items())
    assert (by_student()["p"].drop([*decided]) > 0.05).all()
