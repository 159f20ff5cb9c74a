"""The paper's numbers as recorded, and ours beside them."""

import numpy as np
import pandas as pd
import pytest
from test_claims import draws_of

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import paper
from kvshot_lib.metrics.resampling import Interval


def test_recorded_numbers_are_the_papers():
    table = paper.read_paper()
    assert paper.paper_value(table, "kv_2", "expected_mat") == 2.23
    assert paper.paper_value(table, "hidden", "step_acceptance", 6) == 0.469
    assert paper.paper_value(table, "kv_1layer_linear", "retention", name="variant") == 0.715
    assert np.isnan(paper.paper_value(table, "kv_2_heads", "expected_mat"))  # a row without a value
    assert np.isnan(paper.paper_value(table, "kv_2", "retention"))  # no row
    assert set(table["study_variant"]) - {""} <= set(VARIANTS) and set(table["study_baseline"]) - {""} <= set(VARIANTS)
    assert set(table["baseline"]) - {""} <= set(table["variant"])
    assert not table[table["study_variant"] != ""].duplicated(["study_variant", "metric", "draft_step"]).any()


def test_recorded_numbers_agree_with_one_another():
    """Retention is α_6 / α_0 to the third digit, and MAT lies where α falls from α_0 to α_6 puts it."""
    table = paper.read_paper()
    for variant in ("kv_1", "kv_4", "hidden", "hybrid", "hybrid_warm", "cross_only_warm"):
        first, middle, last = (paper.paper_value(table, variant, "step_acceptance", step) for step in (0, 3, 6))
        assert paper.paper_value(table, variant, "retention") == pytest.approx(last / first, abs=0.0015)
        falls = np.interp(range(7), [0, 3, 6], [first, middle, last])
        assert paper.paper_value(table, variant, "expected_mat") == pytest.approx(1 + np.cumprod(falls).sum(), abs=0.06)


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
    found = paper.compare_with_paper(draws, paper.read_paper(path)).set_index("variant")
    assert found["ordering"].to_dict() == {
        "hidden": "baseline",
        "kv_2": "yes",
        "hybrid": "no",
        "hybrid_warm": "not run",
        "kv_2_heads": "paper value not known",
    }
    row = found.loc["kv_2"]
    assert (row["value"], row["difference"], row["paper_difference"]) == pytest.approx((1.3, -0.1, -0.5))
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((-0.1, -0.1))
    assert found.loc["kv_2_heads", "difference"] == pytest.approx(-0.1) and np.isnan(found.loc["hybrid_warm", "value"])


@pytest.mark.parametrize(
    ("paper_gap", "numbers", "told"),
    [
        (0.1, (0.2, 0.1, 0.3), "yes"),
        (-0.1, (0.2, 0.1, 0.3), "no"),
        (-0.1, (-0.2, -0.3, -0.1), "yes"),
        (0.1, (0.2, -0.1, 0.3), "not distinguishable"),
        (0.1, (0.2, np.nan, np.nan), "not distinguishable"),
        (0.0, (0.2, 0.1, 0.3), "not distinguishable"),
        (0.1, (np.nan,) * 3, "not run"),
        (np.nan, (0.2, 0.1, 0.3), "paper value not known"),
    ],
)
def test_ordering(paper_gap, numbers, told):
    assert paper.ordering(paper_gap, Interval(*numbers)) == told


def test_steps_that_were_not_judged_are_not_run():
    """With two draft steps there is no α_3 and no α_6."""
    found = paper.compare_with_paper(draws_of({"hidden": (40, 30), "kv_1": (30, 30)}), paper.read_paper())
    kv_1 = found[(found["variant"] == "kv_1") & (found["metric"] == "step_acceptance")]
    assert dict(zip(kv_1["draft_step"], kv_1["ordering"])) == {0: "yes", 3: "not run", 6: "not run"}


def test_missing_and_double_numbers_are_refused(tmp_path):
    with pytest.raises(StudyError, match="absent.csv is not there"):
        paper.read_paper(tmp_path / "absent.csv")
    path = write(tmp_path / "p.csv", *["3,base,expected_mat,2.0,,,hidden,,"] * 2)
    with pytest.raises(StudyError, match="two values for one metric of one variant"):
        paper.read_paper(path)
    assert isinstance(paper.read_paper(), pd.DataFrame)
