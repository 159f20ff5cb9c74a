"""The paper's own numbers (``data/paper/results.csv``) and this study's beside them (no torch).

The paper's target is Qwen3-8B, trained on 70,000 dialogues; another target has other absolute values. What can be
compared is the *ordering*: the sign of a variant's difference from the baseline that the paper compares it with.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import StudyError
from .acceptance import SCALAR_METRICS
from .resampling import Draws, Interval

PAPER = Path(__file__).parents[2] / "data/paper/results.csv"
TEXT = ["table", "variant", "metric", "unit", "note", "study_variant", "baseline", "study_baseline"]


def read_paper(path: str | Path = PAPER) -> pd.DataFrame:
    """The paper's acceptance metrics: variant, metric, draft_step, value (NaN if unknown), study_variant, baselines.

    ``step_acceptance_6`` becomes metric ``step_acceptance`` at draft_step 6. Settings and decoding figures are left out.

    Raises
    ------
    StudyError : no such file, or two values for one metric of one variant
    """
    if not Path(path).is_file():
        raise StudyError(f"{path} is not there: it is part of the repository, restore it with git")
    table = pd.read_csv(path, dtype="str", keep_default_na=False).set_index(TEXT[:3], drop=False)
    steps = table["metric"].str.extract(r"^(step_acceptance)_(\d+)$")
    table["metric"] = steps[0].fillna(table["metric"]).to_numpy()
    table["draft_step"] = pd.to_numeric(steps[1]).astype("Int64").to_numpy()
    table = table[table["metric"].isin(["step_acceptance", *SCALAR_METRICS])].reset_index(drop=True)
    table["value"] = pd.to_numeric(table["value"])
    columns = ["variant", "metric", "draft_step", "value", "study_variant", "baseline", "study_baseline"]
    if table.duplicated(columns[:3]).any():
        raise StudyError(f"{path} has two values for one metric of one variant: remove one")
    return table[columns]


def paper_value(
    paper: pd.DataFrame, variant: str, metric: str, step: int | None = None, *, name="study_variant"
) -> float:
    """One number of the paper, NaN if it is not known; ``variant`` is the study's name (or the paper's, ``name="variant"``)."""
    same_step = paper["draft_step"].isna() if step is None else paper["draft_step"].eq(step).fillna(False)
    found = paper.loc[paper[name].eq(variant) & paper["metric"].eq(metric) & same_step.astype(bool), "value"]
    return float(found.iloc[0]) if len(found) else np.nan


def compare_with_paper(draws: Draws, paper: pd.DataFrame) -> pd.DataFrame:
    """Each number of the paper that has a counterpart here, and whether its difference from the baseline has the same sign.

    Intervals are over documents and seeds. ``ordering`` is yes or no where our whole interval of the difference lies on
    one side of 0, else "not distinguishable"; "baseline" for the baseline itself, "not run" and "paper value not known"
    where one side is missing.
    """
    rows = []
    for row in paper[paper["study_variant"] != ""].itertuples():
        step = None if pd.isna(row.draft_step) else int(row.draft_step)
        ours, base = ((name, row.metric, step) for name in (row.study_variant, row.study_baseline))
        found, gap = Interval(*[np.nan] * 3), Interval(*[np.nan] * 3)
        if _measured(draws, *ours):
            found = draws.contrast((1, *ours))
            if _measured(draws, *base):
                gap = draws.contrast((1, *ours), (-1, *base))
        paper_gap = row.value - paper_value(paper, row.baseline, row.metric, step, name="variant")
        told = "baseline" if not row.baseline else ordering(paper_gap, gap)
        record = [row.study_variant, row.metric, row.draft_step, row.value, found.value, found.low, found.high]
        rows.append([*record, row.study_baseline, paper_gap, gap.value, gap.low, gap.high, told])
    columns = ["variant", "metric", "draft_step", "paper_value", "value", "low", "high"]
    columns += ["baseline", "paper_difference", "difference", "difference_low", "difference_high", "ordering"]
    return pd.DataFrame(rows, columns=columns).astype({"draft_step": "Int64"})


def ordering(paper_gap: float, gap: Interval) -> str:
    """Does our difference have the sign of the paper's?"""
    if np.isnan(paper_gap):
        return "paper value not known"
    if np.isnan(gap.value):
        return "not run"
    verdict = gap.verdict(0)
    if verdict == "not distinguishable from" or paper_gap == 0:
        return "not distinguishable"
    return "yes" if (verdict == "above") == (paper_gap > 0) else "no"


def _measured(draws: Draws, variant: str, metric: str, step: int | None) -> bool:
    keys = draws.keys
    same_step = keys["draft_step"].isna() if step is None else keys["draft_step"].eq(step).fillna(False)
    return bool((keys["variant"].eq(variant) & keys["metric"].eq(metric) & same_step).any())
