"""Verdicts: every claim, control, hypothesis and goal judged on the tables that it is about, and the paper's numbers.

The paper's target is Qwen3-8B, trained on 70,000 dialogues; another target has other absolute values. What can be
compared is the *ordering*: the sign of a variant's difference from the baseline that the paper compares it with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import StudyError
from . import tables
from .acceptance import SCALAR_METRICS
from .claims import CLAIMS, LAST, Claim, combine, verdict
from .decoding import decode_draws
from .diagnostics import flow_draws, gate_draws, overlap_draws
from .interaction import shift_draws
from .resampling import Draws, Interval, draw, drawn_as, joined

PAPER = Path(__file__).parents[2] / "data/paper/results.csv"
NOTHING = drawn_as([], [], 1, 0)  # draws of an experiment that is not at hand
PAPER_METRICS = {"decoded_mat_tree": "tree_decoded_mat", "gate_mean_late": "gate_at_the_end"}  # theirs, and ours


def read_paper(path: str | Path = PAPER) -> pd.DataFrame:
    """The paper's measurements: variant, metric, draft_step, value (NaN if unknown), study_variant, baselines.

    ``step_acceptance_6`` becomes metric ``step_acceptance`` at draft_step 6. Settings are left out.

    Raises
    ------
    StudyError : no such file, or two values for one metric of one variant
    """
    if not Path(path).is_file():
        raise StudyError(f"{path} is not there: it is part of the repository, restore it with git")
    table = pd.read_csv(path, dtype="str", keep_default_na=False)
    steps = table["metric"].str.extract(r"^(step_acceptance)_(\d+)$")
    table["metric"] = steps[0].fillna(table["metric"]).replace(PAPER_METRICS)
    table["draft_step"] = pd.to_numeric(steps[1]).astype("Int64")
    table = table[table["metric"].isin(["step_acceptance", *SCALAR_METRICS, *PAPER_METRICS.values()])]
    table = table.assign(value=pd.to_numeric(table["value"])).reset_index(drop=True)
    columns = ["variant", "metric", "draft_step", "value", "study_variant", "baseline", "study_baseline"]
    if table.duplicated(columns[:3]).any():
        raise StudyError(f"{path} has two values for one metric of one variant: remove one")
    return table[columns]


def paper_value(
    paper: pd.DataFrame, variant: str, metric: str, step: int | None = None, *, name="study_variant"
) -> float:
    """One number of the paper, NaN if not known; ``variant`` is the study's name, the paper's with name="variant"."""
    same_step = paper["draft_step"].isna() if step is None else paper["draft_step"].eq(step).fillna(False)
    found = paper.loc[paper[name].eq(variant) & paper["metric"].eq(metric) & same_step.astype(bool), "value"]
    return float(found.iloc[0]) if len(found) else np.nan


def compare_with_paper(draws: Draws, paper: pd.DataFrame) -> pd.DataFrame:
    """Differences from the paper's baselines in metrics of ``draws``, the paper's and ours, and whether signs agree.

    Intervals are over documents and seeds. ``ordering`` is yes or no where our whole interval lies on one side of 0,
    else "not distinguishable"; "not run" where we have no such run. Where the paper has no number there is no row.
    """
    rows = []
    paper = paper[(paper["study_variant"] != "") & paper["metric"].isin(set(draws.keys["metric"]))]
    for row in paper[paper["baseline"] != ""].itertuples():
        step = None if pd.isna(row.draft_step) else int(row.draft_step)
        theirs = row.value - paper_value(paper, row.baseline, row.metric, step, name="variant")
        ours, base = ((name, row.metric, step) for name in (row.study_variant, row.study_baseline))
        found, told = Interval(*[np.nan] * 3), "not run"
        if draws.has(*ours) and draws.has(*base):
            found = draws.contrast((1, *ours), (-1, *base))
            sign = {"above": 1, "below": -1}.get(found.verdict(0), 0) * theirs
            told = "yes" if sign > 0 else "no" if sign < 0 else "not distinguishable"
        rows.append(
            [row.study_variant, row.metric, row.draft_step, row.study_baseline, theirs, *vars(found).values(), told]
        )
    columns = ["variant", "metric", "draft_step", "baseline"]
    columns += ["paper_difference", "difference", "low", "high", "ordering"]
    return pd.DataFrame(rows, columns=columns).astype({"draft_step": "Int64"}).dropna(subset="paper_difference")


def scorecard(
    draws: Draws, paper: pd.DataFrame, claims: Sequence[Claim] = CLAIMS, experiments: Mapping[str, Draws] | None = None
) -> pd.DataFrame:
    """A row for each claim, part of a claim and control: its statistic with interval, threshold and verdict.

    Intervals are over documents and seeds; ``seeds`` is the fewest seeds of a variant involved. ``measured_*`` is the
    same about measured MAT (empty where a claim is not about MAT), ``paper_value`` the statistic in the paper.
    A claim of several parts has a further row with the combined verdict and no statistic, ahead of them.
    ``experiments`` are the draws of those that some claims are judged on, by name; without them these are not run.
    """
    judged_on, rows = {"": draws, **(experiments or {})}, []
    for whole in dict.fromkeys(claim.whole for claim in claims):
        own = [claim for claim in claims if claim.whole == whole]
        parts = [_row(claim, judged_on.get(claim.experiment, NOTHING), paper) for claim in own]
        if len(parts) > 1:
            rows.append(_combined(whole, [part for part, claim in zip(parts, own) if not claim.aside]))
        rows += parts
    columns = [*tables.SCHEMAS["scorecard"], "note"]
    return pd.DataFrame(rows, columns=columns).astype({"seeds": "Int64"})


def _row(claim: Claim, draws: Draws, paper: pd.DataFrame) -> dict:
    """The row of one claim."""
    steps = draws.keys["draft_step"].dropna()
    last = int(steps.max()) if len(steps) else 0
    told = ("claim", "kind", "statement", "statistic", "direction", "threshold", "note")
    terms, measured = _at_last(claim, last), claim.measured()
    row = {name: getattr(claim, name) for name in told}
    row["paper_value"] = sum(weight * paper_value(paper, *which) for weight, *which in terms)
    row["missing"] = " ".join(dict.fromkeys(variant for _, variant, *which in terms if not draws.has(variant, *which)))
    if row["missing"]:
        return row | {"verdict": "not run", "measured_verdict": "not run" if measured else ""}
    found = draws.contrast(*terms)
    seeds = min(draws.seeds(variant, metric) for _, variant, metric, *_ in terms)
    row |= {**vars(found), "verdict": verdict(found, claim), "measured_verdict": "", "seeds": seeds}
    if measured:
        found = draws.contrast(*_at_last(measured, last))
        row |= {f"measured_{name}": number for name, number in vars(found).items()}
        row["measured_verdict"] = verdict(found, measured)
    return row


def _combined(whole: str, parts: list[dict]) -> dict:
    """The row of a claim of several parts; a part that is not about MAT has one verdict for both columns."""
    names = [part["claim"] for part in parts]
    return {
        "claim": whole,
        "kind": parts[0]["kind"],
        "statement": " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0],
        "statistic": "all parts",
        "verdict": combine([part["verdict"] for part in parts]),
        "measured_verdict": combine([part["measured_verdict"] or part["verdict"] for part in parts]),
        "seeds": min((part["seeds"] for part in parts if "seeds" in part), default=pd.NA),
        "direction": "",
        "threshold": np.nan,
        "missing": " ".join(dict.fromkeys(name for part in parts for name in part["missing"].split())),
        "note": "",
    }


def _at_last(claim: Claim, last: int) -> list[tuple]:
    """A claim's terms with the number of the last draft step in place of ``LAST``."""
    return [(*term[:3], *(last if step == LAST else step for step in term[3:])) for term in claim.terms]


def all_draws(tables_dir: str | Path, samples: int = 2000, seed: int = 0) -> Draws:
    """Every statistic that claims are about, from the tables of a folder; of tables that are not there, none."""

    def read(*names: str) -> list[pd.DataFrame]:
        return [tables.read(tables_dir, name) for name in names]

    how, shifts = {"samples": samples, "seed": seed}, read("attention_shift", "attention_matches")
    parts = [draw(*read("counts", "run_lengths"), **how), decode_draws(*read("decode_prompts", "decode_duel"), **how)]
    parts += [overlap_draws(*read("attention_overlap"), **how)]
    parts += [flow_draws(*read("gradient_flow"), **how), gate_draws(*read("gradients"), **how)]
    parts += [shift_draws(*shifts, **how)] if len(shifts[0]) else []
    return joined([part for part in parts if len(part.keys)])
