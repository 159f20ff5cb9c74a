"""The sentences of notebook 03 say what the counts say, and change when the counts do."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import resampling as bootstrap
from kvshot_lib.plots import report, report_limits

# Matches per 100 anchors at each of three steps, the same in all documents, so that every interval has no width.
DECAYS, FLAT, RISES = (40, 30, 20), (30, 30, 30), (20, 25, 30)


def draws_of(noise=0, documents=6, **matches):
    """Draws of runs with the given matches per 100 anchors; ``noise`` more or fewer in every other document."""
    made = []
    for variant, per_step in matches.items():
        run = []
        for document in range(documents):
            wanted = np.array(per_step) + noise * (-1) ** document * np.array([1, 0, -1])
            match = np.arange(100)[:, None] < wanted
            run.append((match, np.ones_like(match)))
        made.append(metrics.count_run(variant, 0, run))
    return bootstrap.draw(*(pd.concat(tables) for tables in zip(*made)), samples=200)


def runs_of(*variants, seeds=(0,), **facts):
    one = {"paradigm": "kv", "num_layers": 2, "parameters": 5_310_000, "trained_tokens": 245_760, "train_s": 187.3}
    one |= {"device": "cpu", "dtype": "float32", "target": "tiny", "draft_vocab_size": 8192}
    one |= {"out_of_draft_vocab_fraction": 0.021} | facts
    return pd.DataFrame([{"variant": variant, "seed": seed} | one for variant in variants for seed in seeds])


def line_of(text, variant):
    (line,) = [line for line in text.splitlines() if line.startswith(f"- `{variant}`")]
    return line


def test_decay_is_told_by_the_interval():
    text = report.decay(draws_of(hidden=DECAYS, kv_1=FLAT, kv_2=RISES))
    assert line_of(text, "hidden") == (
        "- `hidden` goes from 0.400 [0.400, 0.400] at step 0 to 0.200 [0.200, 0.200] at step 2. "
        "Retention 0.500 [0.500, 0.500]: it **decays** (the whole interval is below 1)."
    )
    assert "**no decay** can be told from chance" in line_of(text, "kv_1")
    assert "it **rises**" in line_of(text, "kv_2")
    assert "**no decay**" in report.decay(draws_of(noise=15, kv_1=(30, 30, 29)))
    assert "too few matches" in report.decay(draws_of(kv_1=(0, 0, 0)))


def test_what_the_choice_of_anchors_does_is_told_where_the_control_was_run():
    assert "Its retention of 0.667 has one cause" in report.decay(draws_of(none_1=(30, 25, 20)))
    assert "which are harder on average" in report.decay(draws_of(none_1=(30, 25, 20)))
    assert "which are no harder" in report.decay(draws_of(none_1=FLAT))
    assert "one cause" not in report.decay(draws_of(hidden=DECAYS, none_1=FLAT), ["hidden"])


def test_gaps_name_the_steps_above_and_below():
    text = report.gaps(draws_of(hidden=DECAYS, kv_2=FLAT, hybrid=DECAYS), "hidden")
    assert line_of(text, "kv_2") == (
        "- `kv_2`: step acceptance is below `hidden` at step 0, above `hidden` at step 2, not distinguishable from "
        "`hidden` at step 1. Its retention is above that of `hidden`, by +0.500 [0.500, 0.500]."
    )
    assert "not distinguishable from `hidden` at steps 0-2." in line_of(text, "hybrid")
    assert "`hidden`:" not in text
    assert (
        report.gaps(draws_of(hidden=FLAT), "hidden")
        == "Only `hidden` was measured, so there is nothing to compare it with."
    )


def test_lengths_compare_measured_with_expected_and_with_the_reference():
    """Nested matches of .4 .3 .2: measured 1 + .9, expected 1 + .4 + .12 + .024."""
    text = report.lengths(draws_of(hidden=DECAYS, kv_2=FLAT), "hidden")
    assert "measured 1.900 [1.900, 1.900], above its product of marginals, by +0.356" in line_of(text, "hidden")
    assert "It is not distinguishable from that of `hidden`" in line_of(text, "kv_2")


def test_in_short_sorts_the_drafters():
    text = report.in_short(draws_of(hidden=DECAYS, kv_2=FLAT, hybrid=DECAYS, kv_1=(10, 5, 1)), "hidden")
    first, second = text.split("\n\n")
    assert (
        "retain more of their step acceptance: `kv_2`; these retain less: `kv_1`; not distinguishable: `hybrid`."
        in first
    )
    assert (
        "longer accepted runs: none; these have shorter ones: `kv_1`; not distinguishable: `kv_2`, `hybrid`." in second
    )


def test_in_short_counts_the_drafters_that_it_does_not_name():
    draws = draws_of(hidden=DECAYS, kv_2=FLAT, kv_3=FLAT, kv_4=RISES, hybrid=DECAYS)
    text = report.in_short(draws, "hidden", ["hidden", "kv_2"]).split("\n\n")[0]
    assert "acceptance: `kv_2` and 2 others; these retain less: none; not distinguishable: 1 other." in text


def test_table_of_numbers():
    text = report.acceptance(draws_of(kv_2=FLAT, hidden=DECAYS))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert [row[0] for row in rows] == ["variant", ":--", "`hidden`", "`kv_2`"]
    assert rows[0][1:4] == ["$\\alpha_{0}$", "$\\alpha_{1}$", "$\\alpha_{2}$"]
    assert rows[2][1:5] == [f"{x:.3f}<br>[{x:.3f}, {x:.3f}]" for x in (0.4, 0.3, 0.2, 0.5)]


def test_variants_found_and_not_run():
    text = report.drafters(runs_of("kv_2", "hidden", "mine", seeds=(0, 1)))
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0] == "| `hidden` | kv | 2 | 5.31 M | 245,760 | 187 s | 0, 1 | cpu, float32 |"
    assert [row.split("`")[1] for row in rows] == ["hidden", "kv_2", "mine"]
    mixed = runs_of("hidden", seeds=(0, 1)).assign(device=["H200", "H100"])
    assert "| 0, 1 | H200 and H100, float32 |" in report.drafters(mixed)
    absent = text.splitlines()[-1]
    assert absent.startswith("Not run here: ") and "`kv_1`" in absent and "`kv_2`," not in absent


def test_limits_follow_the_run():
    draws = draws_of(hidden=DECAYS, kv_2=FLAT)
    text = report_limits.limits(runs_of("hidden", "kv_2"), draws, "hidden")
    assert (
        "**One target**: `tiny`. " in text
        and "**One seed** for `hidden`, `kv_2`" in text
        and "**Few seeds**" not in text
    )
    assert "6 answers have 600 anchors" in text and "2.1% of the target's choices" in text
    text = report_limits.limits(
        runs_of("hidden", "kv_2", seeds=(0, 1), target="smollm2-135m-instruct"), draws, "hidden"
    )
    assert "**One seed**" not in text and "**Few seeds**" in text and "(weights Q4_1, dequantised)" in text


def test_limits_of_many_drafters_are_counted_not_listed():
    variants = [f"kv_{i}" for i in range(1, 7)]
    draws = draws_of(**{variant: FLAT for variant in variants})
    text = report_limits.limits(runs_of(*variants), draws, "kv_1")
    assert "**One seed** for 6 of 6 drafters:" in text and "warm starts" not in text
    runs = runs_of(*variants, seeds=(0, 1, 2)).assign(init_from=["kv_2"] * 3 + [""] * 15)
    text = report_limits.limits(runs, draws, "kv_1")
    assert "**Few seeds**: 3 for a drafter." in text and "warm starts**: `kv_1` went on" in text


def test_runs_trained_again_by_hand():
    """1 + 60/100 accepted against 1 + 57/100 and 1 + 62/100; a run that was trained once only doesn't count."""
    made = lambda *rows: pd.DataFrame(rows, columns=["variant", "seed", "document", "anchors", "accepted"])
    first = made(("hidden", 0, 0, 40, 30), ("hidden", 0, 1, 60, 30), ("kv_1", 0, 0, 100, 60), ("kv_2", 0, 0, 100, 9))
    text = report_limits.trained_again(first, made(("hidden", 0, 0, 100, 57), ("kv_1", 0, 0, 100, 62)))
    assert "2 runs were" in text and "-0.030 to +0.020 (root mean square 0.025)" in text
    assert report_limits.trained_again(first, first.iloc[:0]) == ""


def test_absolute_values_are_of_another_target():
    told = report_limits.absolute(runs_of("hidden", target="smollm2-135m-instruct"))
    assert "differ from the paper's by design" in told and "`smollm2-135m-instruct` (weights Q4_1, dequantised)" in told
    assert "The target is the paper's" in report_limits.absolute(runs_of("hidden", target="Qwen3-8B"))


def test_sentences_about_some_variants_only():
    draws = draws_of(hidden=DECAYS, kv_1=FLAT, kv_2=RISES)
    assert report.decay(draws, ["kv_1"]).count("\n") == 0
    assert "`kv_2`" not in report.gaps(draws, "hidden", ["hidden", "kv_1"])
    assert "`kv_2`" not in report.lengths(draws, "hidden", ["hidden", "kv_1"])


@pytest.mark.parametrize(
    ("steps", "text"), [([0], "step 0"), ([0, 1, 2], "steps 0-2"), ([0, 2, 3, 6], "steps 0, 2-3, 6")]
)
def test_steps_in_words(steps, text):
    assert report._steps(steps) == text


def test_unknown_reference_names_the_choices():
    with pytest.raises(StudyError, match="reference_variant='hiden' is not in the tables: choose one of kv_2, hidden"):
        report.require_variant(draws_of(kv_2=FLAT, hidden=DECAYS), "hiden")
