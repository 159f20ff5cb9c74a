"""The whole scorecard: nothing stated is left out, and its order; the paper's numbers, and ours beside them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flat_draws import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.resampling import draw
from kvshot_lib.metrics.scorecard import (
    all_draws,
    compare_with_paper,
    paper_value,
    read_paper,
    scorecard,
)

RECORDED = Path(__file__).parents[2] / "data/recorded/full"


@pytest.fixture(scope="module")
def whole():
    return scorecard(all_draws(RECORDED, samples=50), read_paper())


def test_every_claim_has_one_row_and_they_stand_in_order(whole):
    names = whole["claim"].tolist()
    assert len(set(names)) == len(names)
    assert {f"C{number}" for number in range(1, 19)} <= set(names)
    assert names[0] == "C1" and names.index("C9") < names.index("C9a") < names.index("C10") < names.index("K1")
    assert names[-1] == "B2" and names.index("K5") < names.index("H1") < names.index("B1")


def test_rows_are_those_of_the_claims_on_their_own(whole):
    """C1-C13 and the controls, judged here and by `claims.scorecard`."""
    read = (tables.read(RECORDED, name) for name in ("counts", "run_lengths"))
    own = scorecard(draw(*read, samples=50, seed=0), read_paper()).set_index("claim").query("verdict != 'not run'")
    found = whole.set_index("claim").loc[own.index]
    assert len(own) > 30
    pd.testing.assert_frame_equal(found[["value", "low", "high", "verdict"]], own[["value", "low", "high", "verdict"]])


def test_claims_without_their_tables_are_not_run(tmp_path):
    for name in ("runs", "counts", "run_lengths", "history"):
        tables.write(tmp_path, name, tables.read(RECORDED, name))
    told = scorecard(all_draws(tmp_path, samples=20), read_paper()).set_index("claim")["verdict"]
    missing = ["C14", "C15a", "C15c", "C16", "C17", "H1", "B2"]
    assert (told.loc[missing] == "not run").all() and told["C1"] == "reproduced"


# The paper's numbers


def test_recorded_numbers_are_the_papers():
    table = read_paper()
    assert paper_value(table, "kv_2", "expected_mat") == 2.23
    assert paper_value(table, "hidden", "step_acceptance", 6) == 0.469
    assert paper_value(table, "kv_1layer_linear", "retention", name="variant") == 0.715
    fourth = [paper_value(table, v, "tree_decoded_mat") for v in ("hidden", "hidden_continued", "hybrid_warm")]
    assert fourth == [4.76, 5.01, 5.04] and paper_value(table, "hybrid_warm", "gate_at_the_end") == 0.1
    assert np.isnan(paper_value(table, "kv_2_heads", "expected_mat"))  # a row without a value
    assert np.isnan(paper_value(table, "kv_2", "retention"))  # no row
    assert {*table["study_variant"]} - {""} <= set(VARIANTS) and set(table["study_baseline"]) - {""} <= set(VARIANTS)
    assert set(table["baseline"]) - {""} <= set(table["variant"])
    assert not table[table["study_variant"] != ""].duplicated(["study_variant", "metric", "draft_step"]).any()


def test_recorded_numbers_agree_with_one_another():
    """Retention is α_6 / α_0 to the third digit, and MAT lies where α falls from α_0 to α_6 puts it."""
    table = read_paper()
    for variant in ("kv_1", "kv_4", "hidden", "hybrid", "hybrid_warm", "cross_only_warm"):
        first, middle, last = (paper_value(table, variant, "step_acceptance", step) for step in (0, 3, 6))
        assert paper_value(table, variant, "retention") == pytest.approx(last / first, abs=0.0015)
        falls = np.interp(range(7), [0, 3, 6], [first, middle, last])
        assert paper_value(table, variant, "expected_mat") == pytest.approx(1 + np.cumprod(falls).sum(), abs=0.06)


def write(path, *lines):
    header = "table,variant,metric,value,unit,note,study_variant,baseline,study_baseline"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_comparison_by_hand(tmp_path):
    """One draft step, MAT = 1 + α; our kv_2 is below hidden by .1 for certain, our hybrid above it by .1."""
    path = write(
        tmp_path / "p.csv",
        "3,base,expected_mat,2.0,,,hidden,,",
        "3,cache,expected_mat,1.5,,,kv_2,base,hidden",
        "3,both,expected_mat,1.9,,,hybrid,base,hidden",
        "3,more,expected_mat,2.2,,,hybrid_warm,base,hidden",
        "3,heads,expected_mat,,,,kv_2_heads,cache,kv_2",
        "3,alone,expected_mat,1.1,,,,,",
        "4,base,decoded_mat_tree,4.0,,,hidden,,",
    )
    draws = draws_of({"hidden": (40,), "kv_2": (30,), "hybrid": (50,), "kv_2_heads": (20,)})
    found = compare_with_paper(draws, read_paper(path)).set_index("variant")
    assert found["ordering"].to_dict() == {"kv_2": "yes", "hybrid": "no", "hybrid_warm": "not run"}
    row = found.loc["kv_2"]
    wanted = (-0.1, -0.1, -0.1, -0.5)
    assert row[["difference", "low", "high", "paper_difference"]].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (2.1, (50,), "yes"),
        (1.9, (50,), "no"),
        (1.9, (30,), "yes"),
        (2.1, [(30,), (50,)], "not distinguishable"),
        (2.0, (50,), "not distinguishable"),
    ],
)
def test_ordering(tmp_path, theirs, ours, told):
    """The paper's kv_2 against its hidden at 2.0; our hidden lies at 1.4."""
    lines = "3,base,expected_mat,2.0,,,hidden,,", f"3,cache,expected_mat,{theirs},,,kv_2,base,hidden"
    draws = draws_of({"hidden": (40,), "kv_2": ours})
    assert compare_with_paper(draws, read_paper(write(tmp_path / "p.csv", *lines)))["ordering"].tolist() == [told]


def test_steps_that_were_not_judged_are_not_run():
    """With two draft steps there is no α_3 and no α_6."""
    found = compare_with_paper(draws_of({"hidden": (40, 30), "kv_1": (30, 30)}), read_paper())
    kv_1 = found[(found["variant"] == "kv_1") & (found["metric"] == "step_acceptance")]
    assert dict(zip(kv_1["draft_step"], kv_1["ordering"])) == {0: "yes", 3: "not run", 6: "not run"}


def test_missing_and_double_numbers_are_refused(tmp_path):
    with pytest.raises(StudyError, match="absent.csv is not there"):
        read_paper(tmp_path / "absent.csv")
    path = write(tmp_path / "p.csv", *["3,base,expected_mat,2.0,,,hidden,,"] * 2)
    with pytest.raises(StudyError, match="two values for one metric of one variant"):
        read_paper(path)
    assert isinstance(read_paper(), pd.DataFrame)
