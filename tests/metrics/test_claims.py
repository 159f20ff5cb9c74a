"""Verdicts on claims from hand-made draws whose statistics are known."""

import numpy as np
import pandas as pd
import pytest
from flat_draws import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.metrics import acceptance, claims, tables
from kvshot_lib.metrics.claims import CLAIMS, LAST, MARGIN, Claim, combine, gap, in_favour, stated, verdict
from kvshot_lib.metrics.resampling import Interval, draw
from kvshot_lib.metrics.scorecard import read_paper, scorecard

PAPER = read_paper()
BY_ID = {claim.claim: claim for claim in CLAIMS}
LEVEL = (30, 30, 30)  # matches per 100 anchors at each draft step


def card_of(runs, *ids, **how):
    """The scorecard's rows by claim; only some claims if ``ids`` are given."""
    chosen = tuple(claim for claim in CLAIMS if not ids or claim.whole in ids)
    return scorecard(draws_of(runs, **how), PAPER, chosen).set_index("claim")


# One claim


@pytest.mark.parametrize(
    ("numbers", "above", "below"),
    [
        ((0.3, 0.2, 0.4), "reproduced", "not reproduced"),
        ((-0.3, -0.4, -0.2), "not reproduced", "reproduced"),
        ((0.3, -0.1, 0.4), "inconclusive", "inconclusive"),
        ((0.3, 0.0, 0.4), "inconclusive", "inconclusive"),
        ((0.3, np.nan, np.nan), "inconclusive", "inconclusive"),
    ],
)
def test_flipping_the_direction_flips_the_verdict(numbers, above, below):
    for direction, told in (("above", above), ("below", below)):
        assert verdict(Interval(*numbers), Claim("C1", "", gap("a", "b"), direction)) == told


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((0.01, -0.04, 0.04), "reproduced"),
        ((-0.02, -0.04, -0.01), "reproduced"),
        ((0.04, 0.02, 0.06), "inconclusive"),
        ((-0.04, -0.06, -0.02), "inconclusive"),
        ((0.01, -0.07, 0.08), "inconclusive"),  # a wide interval shows no equality
        ((0.08, 0.06, 0.1), "not reproduced"),
        ((-0.08, -0.1, -0.06), "not reproduced"),
        ((0.0, np.nan, np.nan), "inconclusive"),
    ],
)
def test_equivalence_needs_the_whole_interval_inside_the_margin(numbers, told):
    assert BY_ID["C7"].direction == "within"
    assert verdict(Interval(*numbers), BY_ID["C7"]) == told


def test_does_not_help_has_a_margin():
    """A gain of .03 for certain is less than .05, one of .06 for certain is not, and .02 to .08 can't be told."""
    for numbers, told in (
        ((0.03, 0.02, 0.04), "reproduced"),
        ((0.07, 0.06, 0.08), "not reproduced"),
        ((0.05, 0.02, 0.08), "inconclusive"),
        ((-0.5, -0.6, -0.4), "reproduced"),
    ):
        for name in ("C10a", "C11", "C12a"):
            assert (BY_ID[name].direction, BY_ID[name].threshold) == ("below", MARGIN)
            assert verdict(Interval(*numbers), BY_ID[name]) == told


def test_distance_in_favour_of_a_claim():
    found = Interval(0.02, -0.01, 0.08)
    for direction, threshold, wanted in (
        ("above", 0.0, (0.02, -0.01, 0.08)),
        ("below", 0.0, (-0.02, -0.08, 0.01)),
        ("below", 0.05, (0.03, -0.03, 0.06)),
        ("within", 0.05, (0.03, -0.03, 0.05)),
    ):
        favour = in_favour(found, direction, threshold)
        assert (favour.value, favour.low, favour.high) == pytest.approx(wanted)
    assert in_favour(Interval(-0.08, -0.1, -0.06), "within", 0.05).high == pytest.approx(-0.01)
    with pytest.raises(ValueError, match="direction='over' must be one of above, below, within"):
        in_favour(found, "over", 0)


def test_controls_have_words_of_their_own():
    """Controls are not the paper's claims, so nothing of the paper's is reproduced or not by them."""
    assert verdict(Interval(-0.2, -0.3, -0.1), BY_ID["K1"]) == "as expected"
    assert verdict(Interval(0.2, 0.1, 0.3), BY_ID["K1"]) == "not as expected"
    assert {claim.kind for claim in CLAIMS if claim.claim.startswith("C")} == {"claim"}


# The claims of the study


def test_every_claim_is_there_once_and_about_variants_of_the_study():
    wanted = [*(f"C{i}" for i in range(1, 19)), *(f"K{i}" for i in range(1, 7)), "H1", "B1", "B2"]
    assert list(dict.fromkeys(c.whole for c in CLAIMS)) == wanted
    assert len(BY_ID) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.direction in claims.HOLDS and set(claim.variants) <= set(VARIANTS)
        assert (claim.direction == "within") <= (claim.threshold > 0)
    assert [claim.claim for claim in stated("C14", "B2")] == ["C14a", "C14b", "C14c", "B2"]


def test_the_papers_own_numbers_support_its_claims():
    """A claim with the sign the wrong way round would contradict the paper's tables."""
    values = card_of({"hidden": (30,) * 7})["paper_value"]
    known = {c.claim: values[c.claim] for c in CLAIMS if np.isfinite(values[c.claim])}
    wanted = "C1 C2 C3 C4 C5 C8a C8b C9a C10b C11 C12a C12b C12c C13 C14a C15b"
    assert " ".join(known) == wanted
    for name, value in known.items():
        assert verdict(Interval(value, value, value), BY_ID[name]) == "reproduced", name
    assert known["C1"] == 0.735 and known["C3"] == pytest.approx(0.494 - 0.638)
    assert known["C4"] == pytest.approx((2.23 - 1.84) - (2.34 - 2.23))
    assert known["C8b"] == pytest.approx((0.490 - 0.469) - (0.650 - 0.638))


def test_statistics_in_words():
    assert BY_ID["C1"].statistic == "retention(hidden)"
    assert BY_ID["C3"].statistic == "step_acceptance[0](kv_1) - step_acceptance[0](hidden)"
    assert BY_ID["C4"].statistic == "2 expected_mat(kv_2) - expected_mat(kv_1) - expected_mat(kv_4)"
    assert BY_ID["C8b"].statistic.startswith("step_acceptance[last](hybrid) - step_acceptance[last](hidden) + step_")
    assert BY_ID["C4"].measured().statistic == BY_ID["C4"].statistic.replace("expected", "measured")
    assert BY_ID["C5"].measured() is None


# The scorecard


def test_decay_is_reproduced_and_a_rise_refutes_it():
    for matches, value, told in (
        ((40, 30, 20), 0.5, "reproduced"),
        ((20, 30, 40), 2.0, "not reproduced"),
        (LEVEL, 1.0, "inconclusive"),
    ):
        row = card_of({"hidden": matches}, "C1").loc["C1"]
        assert (row["value"], row["verdict"], row["threshold"], row["seeds"]) == (value, told, 1, 1)


def test_second_layer_claim_by_hand():
    """One draft step, so that MAT is 1 + α: .2 → .5 → .6 gains .3, then .1; .2 → .3 → .6 gains .1, then .3."""
    for kv_2, value, told in ((50, 0.2, "reproduced"), (30, -0.2, "not reproduced")):
        card = card_of({"kv_1": (20,), "kv_2": (kv_2,), "kv_4": (60,)}, "C4")
        row = card.loc["C4"]
        assert (row["value"], row["low"], row["high"]) == pytest.approx((value,) * 3)
        assert (row["verdict"], row["measured_verdict"]) == (told, told)


def test_gain_at_the_last_step_against_that_at_step_0():
    """hybrid gains .05 at step 0 and .15 at the last step; with the two exchanged it is refuted, though MAT gains."""
    card = card_of({"hidden": (40, 30, 20), "hybrid": (45, 40, 35)}, "C8")
    assert card.loc["C8b", "value"] == pytest.approx(0.1)
    assert card["verdict"].tolist() == ["reproduced"] * 3
    card = card_of({"hidden": (40, 30, 20), "hybrid": (55, 40, 25)}, "C8")
    assert card.loc["C8b", "value"] == pytest.approx(-0.1)
    assert card["verdict"].to_dict() == {"C8": "not reproduced", "C8a": "reproduced", "C8b": "not reproduced"}


def test_missing_variants_are_not_run_and_named():
    card = card_of({"hidden": (40, 30, 20), "kv_2": LEVEL})
    ran = card[~card["verdict"].eq("not run")]
    assert list(ran.index) == ["C1"]
    row = card.loc["C4"]
    assert row["missing"] == "kv_1 kv_4" and np.isnan(row["value"]) and pd.isna(row["seeds"])
    assert card.loc["C9", "missing"] == "hybrid_warm hybrid hidden_continued"


def test_part_of_a_claim_that_was_not_run_leaves_it_open_unless_another_refutes_it():
    runs = {"hybrid": LEVEL, "hybrid_warm": (40, 40, 40)}
    card = card_of(runs, "C9")
    assert card["verdict"].to_dict() == {"C9": "inconclusive", "C9a": "reproduced", "C9b": "not run"}
    card = card_of(runs | {"hybrid_warm": (20, 20, 20)}, "C9")
    assert card["verdict"].to_dict() == {"C9": "not reproduced", "C9a": "not reproduced", "C9b": "not run"}


def test_a_part_that_stands_aside_is_shown_and_does_not_count():
    """C10: against `hidden` of as many tokens nothing is gained, against plain `hidden` much; the first decides."""
    card = card_of({"hidden": (20,), "hidden_continued": (40,), "cross_only_warm": (35,)}, "C10")
    wanted = {"C10": "reproduced", "C10a": "reproduced", "C10b": "not reproduced"}
    assert card["verdict"].to_dict() == wanted and "half the tokens" in card.loc["C10b", "note"]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ("reproduced|reproduced", "reproduced"),
        ("reproduced|inconclusive", "inconclusive"),
        ("inconclusive|not reproduced|reproduced", "not reproduced"),
        ("not run|not reproduced", "not reproduced"),
        ("not run|reproduced", "inconclusive"),
        ("not run|not run", "not run"),
    ],
)
def test_combined_verdicts(parts, told):
    assert combine(parts.split("|")) == told


def test_measured_mat_can_tell_otherwise():
    """Nested matches of .4 .3 .2 make runs of .9, independent ones of .6 .1 .1 about .67: the two disagree."""
    match = np.zeros((100, 3), dtype=bool)
    match[:60, 0] = match[60:70, 1] = match[60:70, 2] = True  # after a match, never another
    made = [acceptance.count_run("hybrid", 0, [(match, np.ones_like(match))] * 6)]
    nested = np.arange(100)[:, None] < np.array([40, 30, 20])
    made.append(acceptance.count_run("hidden", 0, [(nested, np.ones_like(nested))] * 6))
    draws = draw(*(pd.concat(parts, ignore_index=True) for parts in zip(*made)), samples=20)
    row = scorecard(draws, PAPER, (BY_ID["C8a"],)).iloc[0]
    assert row["value"] == pytest.approx(0.6 + 0.06 + 0.006 - (0.4 + 0.12 + 0.024))
    assert row["measured_value"] == pytest.approx(0.6 - 0.9)
    assert (row["verdict"], row["measured_verdict"]) == ("reproduced", "not reproduced")


def test_seeds_are_counted_and_their_spread_can_undo_a_verdict():
    """Without spread between documents, .01 on average is certain with one seed, lost in seeds that are .1 apart."""
    one = card_of({"kv_2": (30,), "kv_2_no_ttt": (29,)}, "C13").loc["C13"]
    assert (one["verdict"], one["seeds"], one["value"]) == ("reproduced", 1, pytest.approx(-0.01))
    many = card_of({"kv_2": [(30,)] * 3, "kv_2_no_ttt": [(19,), (29,), (39,)]}, "C13").loc["C13"]
    assert (many["verdict"], many["seeds"], many["value"]) == ("inconclusive", 3, pytest.approx(-0.01))


def test_scorecard_is_the_same_twice_and_fits_its_schema():
    runs = {"hidden": [(40, 30, 20), (42, 30, 20)], "hybrid": [(45, 41, 30), (41, 40, 30)]}
    first, second = (scorecard(draws_of(runs, noise=3), PAPER) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert list(first.columns) == [*tables.SCHEMAS["scorecard"], "note"]
    assert tables.check(first, "scorecard", "test").shape == first.shape


def test_written_scorecard_is_read_back(tmp_path):
    card = scorecard(draws_of({"hidden": (40, 30, 20), "hybrid": (45, 41, 30)}), PAPER)
    card.to_csv(tmp_path / "scorecard.csv", index=False)
    read = tables.read(tmp_path, "scorecard")
    assert read["verdict"].tolist() == card["verdict"].tolist()
    assert read["missing"].fillna("").tolist() == card["missing"].tolist()
    np.testing.assert_allclose(read["value"], card["value"])


def test_last_step_is_that_of_the_tables():
    claim = Claim("C1", "", ((1, "hidden", "step_acceptance", LAST),), "above")
    for matches in ((40, 30), (40, 30, 20)):
        row = scorecard(draws_of({"hidden": matches}), PAPER, (claim,)).iloc[0]
        assert row["value"] == pytest.approx(matches[-1] / 100)
