"""Is one drafter better than another? Value, interval and verdict, of pairs or of a family that was listed beforehand.

Which pairs there are stands in the registry of variants (``against``), families in ``data/experiments``.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from ..drafters.variants import VARIANTS
from ..errors import StudyError
from .resampling import Draws

FAMILY = ["id", "a", "b", "metric", "draft_step"]
FAMILY += ["value", "low", "high", "p", "holm", "smallest_visible", "seeds", "verdict"]
TYPES = dict.fromkeys(("value", "low", "high", "p", "holm", "smallest_visible"), "float64")
TYPES |= dict.fromkeys(("draft_step", "seeds"), "Int64")
IN_SHORT = {"above": "more", "below": "less", "not distinguishable from": "open"}  # verdicts, in tables
MANY = 1e6  # degrees of freedom from which on t is normal


def registered_pairs(variants: Iterable[str]) -> list[tuple[str, str]]:
    """(variant, what it is compared with) of the registry, for those of ``variants``, in the study's order."""
    wanted = set(variants)
    return [(own.name, own.against) for own in VARIANTS.values() if own.against and own.name in wanted]


def comparison_table(
    draws: Draws, pairs: Sequence[tuple[str, str]] | None = None, metrics: Sequence[str] = ("measured_mat",)
) -> pd.DataFrame:
    """The metrics of each pair (variant, against), at every draft step; pairs that lack a run are left out.

    Returns
    -------
    Columns variant, against, metric, draft_step, value, low, high, p (two-sided, of this comparison alone), seeds (the
    fewest of the two), verdict (above, below, not distinguishable from) and minus, the pair in words.
    """
    rows = []
    for a, b in registered_pairs(draws.variants) if pairs is None else pairs:
        for metric in metrics:
            steps = draws.keys.loc[draws.keys["metric"] == metric, "draft_step"].dropna().unique()
            rows += [{"variant": a, "against": b, **_compared(draws, a, b, metric, k)} for k in sorted(steps) or [None]]
    columns = ["variant", "against", "metric", "draft_step", "value", "low", "high", "p", "seeds", "verdict"]
    table = pd.DataFrame(rows, columns=columns).astype({name: TYPES[name] for name in columns if name in TYPES})
    table = table[table["verdict"] != "not run"].reset_index(drop=True)
    return table.assign(minus=table["variant"] + " − " + table["against"])


def family(draws: Draws, questions: Sequence[Mapping]) -> pd.DataFrame:
    """The comparisons of a family that was listed beforehand, with verdicts at 5% for the whole family (`holm`).

    Of three comparisons with p = .01, .04, .03 and positive values only the first is ``above``: .04 and .03 are .06
    after Holm. One whose run is missing still counts as one of the family. The interval has to leave out 0, too.

    Parameters
    ----------
    questions : ``id``, ``a`` and ``b`` each (a minus b; b None: a itself), ``metric`` (``measured_mat``) and
        ``draft_step`` (none) where they are others, as the files of ``data/experiments`` list them; what else they hold
        follows as columns.

    Returns
    -------
    Columns id, a, b, metric, draft_step, value, low, high and p of this comparison alone, holm, smallest_visible (the
    least true difference that four of five such studies would see as the first of this family), seeds (the fewest of
    the two) and verdict: above, below, not distinguishable from, or not run.

    Raises
    ------
    StudyError : a question without id, a or b; a metric or draft step that no run has.
    """
    rows = []
    for question in questions:
        if missing := {"id", "a", "b"} - {*question}:
            raise StudyError(f"comparison {dict(question)} has no {', '.join(sorted(missing))}: give id, a and b")
        metric, step = question.get("metric", "measured_mat"), question.get("draft_step")
        if not any(draws.has(variant, metric, step) for variant in draws.variants):
            at = "no draft_step" if step is None else f"draft_step {step}"
            raise StudyError(f"comparison {question['id']}: no run has {metric} at {at}; correct one of the two")
        rows.append({**question, **_compared(draws, question["a"], question["b"], metric, step, len(questions))})
    table = pd.DataFrame(rows, columns=list(dict.fromkeys([*FAMILY, *(name for row in rows for name in row)])))
    table = table.astype({name: TYPES[name] for name in TYPES}).assign(holm=holm(table["p"]))
    unsure = table["verdict"].isin(["above", "below"]) & ~(table["holm"] < 0.05)
    return table.assign(verdict=table["verdict"].mask(unsure, "not distinguishable from"))


def _compared(draws: Draws, a: str, b: str | None, metric: str, step: int | None, of: int = 1) -> dict:
    """One comparison ``of`` so many; without numbers where a run is missing."""
    row = {"metric": metric, "draft_step": step, "verdict": "not run"}
    sides = {1: a} if b is None else {1: a, -1: b}
    if all(draws.has(variant, metric, step) for variant in sides.values()):
        found = draws.contrast(*((sign, variant, metric, step) for sign, variant in sides.items()))
        error, freedom = standard_error(*(draws.rows(variant, metric, step) for variant in sides.values()))
        visible = error * (stdtrit(freedom, 1 - 0.025 / of) + stdtrit(freedom, 0.8))
        row |= {**vars(found), "p": p_value(found.value, error, freedom), "smallest_visible": visible}
        row |= {"seeds": min(draws.seeds(variant, metric) for variant in sides.values()), "verdict": found.verdict(0)}
    return row


def standard_error(one: np.ndarray, other: np.ndarray | float = 0.0) -> tuple[float, float]:
    """Of the difference of two variants' means over documents and seeds, or of one's, and its degrees of freedom.

    Resampling two or three seeds gives a handful of means, so tails can't be read off it. Seeds enter by Welch: each
    variant's variance over them, divided by their number (one seed has none). Documents enter by their resamples. The
    degrees are Satterthwaite's, with documents as known. Seeds at 1.0, 1.2 and at .5, .7 and nothing else: √.02, 2.

    Parameters
    ----------
    one, other : draws of a metric, a row per seed: [seeds, 1 + samples] (`Draws.rows`).
    """
    both = np.atleast_2d(one), np.atleast_2d(other)
    seeds = [(rows[:, 0].var(ddof=1) / len(rows), len(rows) - 1) for rows in both if len(rows) > 1]
    documents = np.nanvar((both[0].mean(0) - both[1].mean(0))[1:], ddof=1)
    variance, spread = documents + sum(v for v, _ in seeds), sum(v**2 / degrees for v, degrees in seeds)
    return float(np.sqrt(variance)), float(min(variance**2 / spread, MANY) if spread else MANY)


def p_value(difference: float, error: float, freedom: float) -> float:
    """Two-sided p of "no difference", by Student's t."""
    if not error:
        return float(difference == 0)
    return float(2 * stdtr(freedom, -abs(difference) / error))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values of a family that was listed beforehand, adjusted so that 5% is the chance of any false finding in it.

    The smallest is multiplied by their number n, the next by n - 1, and so on; none falls below the one before it
    (Holm 1979): .01 .04 .03 become .03 .06 .06.
    """
    p, n = np.asarray(p_values, dtype=float), len(p_values)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(n, 0, -1)))
    return adjusted
