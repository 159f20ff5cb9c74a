"""The scorecard shows every claim on the side of its verdict."""

import pytest
from flat_draws import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.metrics.scorecard import read_paper, scorecard
from kvshot_lib.plots import cards
from kvshot_lib.plots.style import show

RUNS = {"hidden": [(40, 30, 20), (42, 32, 20)], "kv_1": (30, 30, 30), "hybrid": (45, 41, 35), "kv_2": (35, 35, 34)}
RUNS |= {"kv_2_unrotate": (34, 35, 34), "kv_2_zero": (10, 10, 10), "hybrid_warm": (44, 40, 35)}


@pytest.fixture(scope="module")
def card():
    return scorecard(draws_of(RUNS, noise=2), read_paper())


def test_every_claim_is_named_with_its_value_or_not_measured(card):
    figure = cards.cards(card)
    texts = [text.get_text() for text in figure.axes[0].texts]
    drawn = card[card["direction"] != ""]
    assert [text.split()[0] for text in texts[::2]] == drawn["claim"].tolist()
    assert texts.count("not measured") == (drawn["verdict"] == "not run").sum()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["reproduced / as expected", "not reproduced"]


def test_marker_is_right_of_the_line_where_the_claim_holds(card):
    ran = card[(card["direction"] != "") & (card["verdict"] != "not run")]
    points = [line for line in cards.cards(card).axes[0].get_lines() if len(line.get_xdata()) == 1]
    assert len(points) == len(ran)
    for point, row in zip(points, ran.itertuples()):
        assert point.get_color() == cards.LOOKS[row.verdict][0]
        if row.verdict != "inconclusive":
            assert (point.get_xdata()[0] > 0) == (not row.verdict.startswith("not")), row.claim


@pytest.mark.parametrize("variants", [["none_1"], list(VARIANTS)], ids=["nothing run", "everything run"])
def test_any_set_of_variants_can_be_drawn(variants, tmp_path):
    card = scorecard(draws_of(dict.fromkeys(variants, (30, 29, 28)), noise=3), read_paper())
    assert (card["verdict"] == "not run").all() == (len(variants) == 1)
    assert show(cards.cards(card), card, tmp_path, "scorecard", "").path.is_file()
