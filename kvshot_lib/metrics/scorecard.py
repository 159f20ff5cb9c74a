"""Verdicts: every claim, control, hypothesis and goal judged on the table that it is about, and the paper's numbers.

The paper's target is Qwen3-8B, trained on 70,000 dialogues; another target has other absolute values. What can be
compared is the *ordering*: the sign of a variant's difference from the baseline that the paper compares it with.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import StudyError
from . import tables
from .acceptance import SCALAR_METRICS
from .claims import (
    CLAIMS, DECODE_CLAIMS, FLOW_CLAIMS, GATE_CLAIMS, KINDS, LAST, Claim, combine, query_claims, shift_claim, verdict,
)  # fmt: skip
from .comparisons import best_pair, contenders, speed_draws
from .decoding import c14_draws
from .diagnostics import flow_draws, gate_draws, query_draws
from .interaction import shift_draws
from .resampling import Draws, Interval, draw

PAPER = Path(__file__).parents[2] / "data/paper/results.csv"
PAPER_METRICS = {"decoded_mat_tree": "tree_decoded_mat", "gate_mean_late": "gate_at_the_end"}  # theirs, and ours
GAIN = 1.1  # ten per cent more, the study's own goal
NOTHING = Draws(pd.DataFrame(columns=["variant", "seed", "metric", "draft_step"]), np.zeros((0, 1)))


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
    """The paper's numbers on metrics of ``draws``, ours beside them, and whether signs against the baseline agree.

    Intervals are over documents and seeds. ``ordering`` is yes or no where our whole interval of the difference lies on
    one side of 0, else "not distinguishable"; "baseline" for the baseline itself, "not run" and "paper value not known"
    where one side is missing.
    """
    rows = []
    paper = paper[(paper["study_variant"] != "") & paper["metric"].isin(set(draws.keys["metric"]))]
    for row in paper.itertuples():
        step = None if pd.isna(row.draft_step) else int(row.draft_step)
        ours, base = ((name, row.metric, step) for name in (row.study_variant, row.study_baseline))
        found, gap = Interval(*[np.nan] * 3), Interval(*[np.nan] * 3)
        if draws.has(*ours):
            found = draws.contrast((1, *ours))
            if draws.has(*base):
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
    told = gap.verdict(0)
    if told == "not distinguishable from" or paper_gap == 0:
        return "not distinguishable"
    return "yes" if (told == "above") == (paper_gap > 0) else "no"


def scorecard(draws: Draws, paper: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """A row for each claim, part of a claim and control: its statistic with interval, threshold and verdict.

    Intervals are over documents and seeds; ``seeds`` is the fewest seeds of a variant involved. ``measured_*`` is the
    same about measured MAT (empty where a claim is not about MAT), ``paper_value`` the statistic in the paper.
    A claim of several parts has a further row with the combined verdict and no statistic, ahead of them.
    """
    steps = draws.keys["draft_step"].dropna()
    last = int(steps.max()) if len(steps) else 0
    rows = []
    for whole in dict.fromkeys(claim.whole for claim in claims):
        own = [claim for claim in claims if claim.whole == whole]
        parts = [_row(claim, draws, paper, last) for claim in own]
        if len(parts) > 1:
            rows.append(_combined(whole, [part for part, claim in zip(parts, own) if not claim.aside]))
        rows += parts
    columns = [*tables.SCHEMAS["scorecard"], "note"]
    return pd.DataFrame(rows, columns=columns).astype({"seeds": "Int64"})


def _row(claim: Claim, draws: Draws, paper: pd.DataFrame, last: int) -> dict:
    """The row of one claim."""
    told = ("claim", "kind", "statement", "statistic", "direction", "threshold", "note")
    row = {name: getattr(claim, name) for name in told}
    row["paper_value"] = sum(weight * paper_value(paper, *term) for weight, *term in _at_last(claim.terms, last))
    missing = [variant for variant in claim.variants if variant not in draws.variants]
    measured = claim.measured()
    row |= {"measured_verdict": "", "missing": " ".join(missing)}
    if missing:
        return row | {"verdict": "not run", "measured_verdict": "not run" if measured else ""}
    found = draws.contrast(*_at_last(claim.terms, last))
    row |= {**vars(found), "verdict": verdict(found, claim), "seeds": min(map(draws.seeds, claim.variants))}
    if measured:
        found = draws.contrast(*_at_last(measured.terms, last))
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


def _at_last(terms: tuple[tuple, ...], last: int) -> list[tuple]:
    """Terms with the number of the last draft step in place of ``LAST``."""
    return [(*term[:3], *(last if step == LAST else step for step in term[3:])) for term in terms]


def acceptance_goals(runs: pd.DataFrame, history: pd.DataFrame) -> tuple[Claim, ...]:
    """B1: the best over the cache, by validation, has a tenth more MAT than drafters of equal tokens without."""
    best, rival, plain = best_pair(contenders(runs, history))
    told = f"`{best}`, best with KV, has a tenth more MAT than"
    return (
        Claim("B1a", f"{told} `{plain}`, equal tokens", _tenth_more(best, plain, "measured_mat")),
        Claim("B1b", f"{told} `{rival}`, best without", _tenth_more(best, rival, "measured_mat")),
    )


def speed_goal(best: dict[str, tuple[str, str]]) -> Claim:
    """B2 about the chains that `speed_draws` names."""
    (a, chain_a), (b, chain_b) = best["kv"], best["hidden"]
    statement = f"`{a}`, chains of {chain_a}, gives a tenth more tokens/s than `{b}`, chains of {chain_b}"
    return Claim("B2", statement, _tenth_more(a, b, "speedup"))


def _tenth_more(a: str, b: str, metric: str) -> tuple[tuple, ...]:
    return (1, a, metric), (-GAIN, b, metric)


def whole_scorecard(
    tables_dir: str | Path, paper: pd.DataFrame, samples: int = 2000, seed: int = 0
) -> tuple[pd.DataFrame, tuple[Claim, ...]]:
    """Rows of `scorecard` for all that is stated, and the claims as stated; *not run* without their tables."""

    def read(name: str) -> pd.DataFrame:
        return tables.read(tables_dir, name)

    how = {"samples": samples, "seed": seed}
    counts, shift, matches = read("counts"), read("attention_shift"), read("attention_matches")
    prompts, duel = read("decode_prompts"), read("decode_duel")
    queries = query_draws(read("attention_overlap"), read("query_oracle"), **how)
    shifts = shift_draws(shift, matches, counts["document"].nunique(), **how) if len(shift) else NOTHING
    best, speeds = speed_draws(prompts, duel, **how)
    judged = [
        (draw(counts, read("run_lengths"), **how), (*CLAIMS, *acceptance_goals(read("runs"), read("history")))),
        (c14_draws(pd.concat([prompts, duel]), **how), DECODE_CLAIMS),
        (queries, query_claims(queries.variants)),
        (flow_draws(read("gradient_flow"), **how), FLOW_CLAIMS),
        (gate_draws(read("gradients"), **how), GATE_CLAIMS),
        (shifts, (shift_claim(set(matches["variant"])),)),
        (speeds, (speed_goal(best),)),
    ]
    card = pd.concat([scorecard(draws, paper, claims) for draws, claims in judged], ignore_index=True)
    card = card.iloc[sorted(range(len(card)), key=lambda row: _place(card["claim"][row]))].reset_index(drop=True)
    return card, tuple(sorted((c for _, claims in judged for c in claims), key=lambda claim: _place(claim.claim)))


def _place(claim: str) -> tuple[int, int, str]:
    """Where a claim stands: by kind, then C9a after C9 and before C10."""
    kind, number, part = re.fullmatch(r"([A-Z])(\d+)([a-z]?)", claim).groups()
    return [*KINDS].index(kind), int(number), part
