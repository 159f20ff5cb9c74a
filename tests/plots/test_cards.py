"""What notebook 08 shows says what the scorecard says."""

import numpy as np
import pandas as pd
import pytest
from test_claims import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.metrics import paper
from kvshot_lib.metrics.claims import CLAIMS
from kvshot_lib.metrics.claims import scorecard as scorecard_of
from kvshot_lib.plots import cards as scorecard
from kvshot_lib.plots import style as figures

PAPER = paper.read_paper()
RUNS = {"hidden": [(40, 30, 20), (42, 32, 20)], "kv_1": (30, 30, 30), "hybrid": (45, 41, 35), "kv_2": (35, 35, 34)}
RUNS |= {"kv_2_unrotate": (34, 35, 34), "kv_2_zero": (10, 10, 10), "hybrid_warm": (44, 40, 35)}


@pytest.fixture(scope="module")
def draws():
    return draws_of(RUNS, noise=2)


@pytest.fixture(scope="module")
def card(draws):
    return scorecard_of(draws, PAPER)


def line_of(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith((f"| {name} |", f"| **{name}** |"))]
    return line


def test_every_claim_is_stated_with_its_threshold():
    text = scorecard.claims_table()
    assert len(text.splitlines()) == 2 + len(CLAIMS)
    assert "`retention(hidden)` | < 1 |" in line_of(text, "C1")
    assert "| within ±0.05 |" in line_of(text, "C7")


def test_verdicts_are_those_of_the_card(card):
    text = scorecard.verdict_table(card)
    assert len(text.splitlines()) == 2 + len(card)
    row = card.set_index("claim").loc["C8a"]
    numbers = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    assert f"| 0.070 | {numbers} | **reproduced** |" in line_of(text, "C8a")
    assert "**not run**<br>needs `kv_4`" in line_of(text, "C4") + line_of(text, "C5")
    assert "| **as expected** |" in line_of(text, "K1")
    assert "| C8a and C8b | all parts |" in line_of(text, "C8")


def test_in_short_counts_whole_claims(card):
    first, second = scorecard.in_short(card).splitlines()
    assert first.startswith("- Of 13 claims of the paper: **reproduced** 4 (C1, C3, C7, C8);")
    assert "**not reproduced** 1 (C9)" in first and "**not run** 8 (C2, C4, C5, C6, C10, C11, C12, C13)" in first
    assert second.startswith("- Of 5 controls: **as expected** 1 (K1); **not as expected** 0;")


def test_disagreement_of_the_two_mats_is_told(card):
    assert scorecard.disagreements(card).startswith("Expected and measured MAT lead to the same verdict in all")
    other = card.copy()
    other.loc[other["claim"] == "C8a", "measured_verdict"] = "inconclusive"
    assert "C8a is reproduced by expected MAT and inconclusive by measured MAT" in scorecard.disagreements(other)
    assert scorecard.disagreements(card[card["verdict"] == "not run"]) == "No claim about MAT was run."


def runs_of(tokens=1000, **seeds):
    rows = [
        {"variant": v, "seed": s, "trained_tokens": tokens, "init_from": ""} for v, n in seeds.items() for s in range(n)
    ]
    return pd.DataFrame(rows)


def test_coverage_tells_seeds_budgets_and_starts():
    runs = runs_of(hidden=1, kv_1=3, hybrid_warm=3)
    runs.loc[runs["variant"] == "hybrid_warm", "init_from"] = "hidden"
    text = scorecard.coverage(runs)
    assert "- 1 seed of `hidden`: intervals cover documents only" in text
    assert "- 3 seeds of `kv_1`, `hybrid_warm`: intervals cover documents and seeds." in text
    assert "- Every drafter was trained on 1,000 tokens." in text
    assert "- `hybrid_warm` started from the trained `hidden`" in text
    assert "3 seeds" not in scorecard.coverage(runs_of(hidden=2)) and "started" not in scorecard.coverage(
        runs_of(hidden=2)
    )
    by_seed = runs.assign(trained_tokens=1000 + runs["seed"])
    told = "- Every drafter was trained on 1,000 to 1,002 tokens, those of the same seed on equally many."
    assert told in scorecard.coverage(by_seed)
    runs.loc[0, "trained_tokens"] = 900
    assert "**Training was not equal**, in tokens: `hidden` 900; `kv_1` 1,000;" in scorecard.coverage(runs)
    assert "started" not in scorecard.coverage(runs.drop(columns="init_from"))


def test_paper_table_and_orderings(draws):
    compared = paper.compare_with_paper(draws, PAPER)
    text = scorecard.paper_table(compared)
    (row,) = [line for line in text.splitlines() if line.startswith("| `hybrid` | expected MAT |")]
    assert "| 2.440 |" in row and "| +0.070 |" in row and row.endswith("| yes |")
    assert "| `kv_1` | $\\alpha_{0}$ | 0.494 |" in text
    told = scorecard.orderings(compared)
    assert f"yes {(compared['ordering'] == 'yes').sum()}, no {(compared['ordering'] == 'no').sum()}" in told
    assert "retention of `kv_1`" in told.split("Reversed here: ")[1]


# The figure


def text_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_figure_names_every_claim_and_shows_its_verdict(card):
    figure = scorecard.draw_scorecard(card)
    texts = text_of(figure)
    drawn = card[card["direction"] != ""]
    assert [text for text in texts if text in set(drawn["claim"])] == drawn["claim"].tolist()
    assert texts.count("not run") == (drawn["verdict"] == "not run").sum()
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["reproduced / as expected", "not reproduced"]


def test_marker_is_right_of_the_line_where_the_claim_holds(card):
    figure = scorecard.draw_scorecard(card)
    ran = card[(card["direction"] != "") & (card["verdict"] != "not run")]
    points = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 1]
    assert len(points) == len(ran)
    for point, row in zip(points, ran.itertuples()):
        assert point.get_color() == scorecard.LOOKS[row.verdict][0]
        if row.verdict in ("reproduced", "not reproduced", "as expected"):
            assert (point.get_xdata()[0] > 0) == (not row.verdict.startswith("not")), row.claim


def test_figure_has_the_same_bytes_twice_with_its_table_beside(card, tmp_path):
    paths = [figures.save_figure(scorecard.draw_scorecard(card), card, tmp_path / n, "scorecard") for n in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    beside = pd.read_csv(paths[0].with_suffix(".csv"))
    np.testing.assert_allclose(beside["value"], card["value"], rtol=1e-5)


@pytest.mark.parametrize("variants", [["none_1"], list(VARIANTS)], ids=["nothing run", "everything run"])
def test_any_set_of_variants_can_be_drawn(variants, tmp_path):
    card = scorecard_of(draws_of(dict.fromkeys(variants, (30, 29, 28)), noise=3), PAPER)
    assert (card["verdict"] == "not run").all() == (len(variants) == 1)
    figures.save_figure(scorecard.draw_scorecard(card), card, tmp_path, "scorecard")
    assert len(scorecard.verdict_table(card).splitlines()) == 2 + len(card)
