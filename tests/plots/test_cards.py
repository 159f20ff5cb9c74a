"""A scorecard shows each verdict where its statistic lies."""

import numpy as np
import pytest
from flat_draws import draws_of

from kvshot_lib.metrics.claims import in_favour
from kvshot_lib.metrics.resampling import Interval
from kvshot_lib.metrics.scorecard import read_paper, scorecard
from kvshot_lib.plots.cards import LOOKS, cards

RUNS = {"hidden": [(40, 30, 20), (42, 32, 20)], "kv_1": (30, 30, 30), "hybrid": (45, 41, 35), "kv_2": (35, 35, 34)}
RUNS |= {"kv_2_unrotate": (34, 35, 34), "kv_2_zero": (10, 10, 10), "hybrid_warm": (44, 40, 35)}


@pytest.fixture(scope="module")
def card():
    return scorecard(draws_of(RUNS, noise=2), read_paper())


def test_markers_stand_on_the_claims_side_and_look_like_the_verdict(card):
    judged = card[(card["direction"] != "") & card["value"].notna()]
    markers = [line for line in cards(card).axes[0].lines if line.get_marker() in ("o", "X", "s")]
    assert len(markers) == len(judged)
    for marker, row in zip(markers, judged.itertuples()):
        favour = in_favour(Interval(row.value, row.low, row.high), row.direction, row.threshold)
        assert marker.get_xdata()[0] == pytest.approx(favour.value)
        assert (marker.get_color(), marker.get_marker()) == LOOKS[row.verdict]


def test_plain_numbers_and_what_is_asked_stand_beside_them(card):
    texts = " ".join(text.get_text() for text in cards(card).axes[0].texts)
    row = card.set_index("claim").loc["C1"]
    assert f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]\nreproduced: < 1 asked" in texts
    assert "C7  Un-rotating RoPE changes MAT by less than .05" in texts and "within ±0.05 asked" in texts
    assert "not measured" in texts, "what was not run"


def test_nothing_run_is_drawn_too(card):
    figure = cards(card[card["verdict"] == "not run"])
    low, high = figure.axes[0].get_xlim()
    assert low == -high and np.isfinite(high)
