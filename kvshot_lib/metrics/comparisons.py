"""Is one drafter better than another? Value, interval and verdict, of pairs or of a family that was listed beforehand.

Which pairs there are stands in the registry of variants (``against``), families in ``data/experiments``.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from ..drafters.variants import VARIANTS, in_study_order, parameters_of
from ..errors import StudyError
from .decoding import prompt_sums, ratios
from .history import validation_mat
from .resampling import Draws, Interval, interval, resample_weights

FAMILY = ["id", "a", "b", "metric", "draft_step"]
FAMILY += ["value", "low", "high", "p", "holm", "smallest_visible", "seeds", "verdict"]
TYPES = dict.fromkeys(("value", "low", "high", "p", "holm", "smallest_visible"), "float64")
TYPES |= dict.fromkeys(("draft_step", "seeds"), "Int64")
POWER = (1.96 + 0.84) / (2 * 1.96)  # of the normal distribution: 5% two-sided, 80% power; over the width of an interval


def compare(draws: Draws, a: str, b: str, metric: str = "measured_mat", *draft_step: int) -> Interval:
    """a's metric minus b's, mean over seeds, with its interval over documents and seeds."""
    return draws.contrast((1, a, metric, *draft_step), (-1, b, metric, *draft_step))


def registered_pairs(variants: Iterable[str]) -> list[tuple[str, str]]:
    """(variant, what it is compared with) of the registry, for those of ``variants``, in the study's order."""
    wanted = set(variants)
    return [(own.name, own.against) for own in VARIANTS.values() if own.against and own.name in wanted]


def comparison_table(
    draws: Draws, pairs: Sequence[tuple[str, str]] | None = None, metrics: Sequence[str] = ("measured_mat",)
) -> pd.DataFrame:
    """`compare` for each pair (variant, against), metric and draft step; without numbers where a run is missing.

    Returns
    -------
    Columns variant, against, metric, draft_step, value, low, high, p (two-sided, of this comparison alone), seeds (the
    fewest of the two) and verdict: above, below, not distinguishable from, or not run.
    """
    rows = []
    for a, b in registered_pairs(draws.variants) if pairs is None else pairs:
        for metric in metrics:
            steps = draws.keys.loc[draws.keys["metric"] == metric, "draft_step"].dropna().unique()
            for step in sorted(steps) or [None]:
                rows.append({"variant": a, "against": b, **_compared(draws, a, b, metric, step)})
    columns = ["variant", "against", "metric", "draft_step", "value", "low", "high", "p", "seeds", "verdict"]
    return pd.DataFrame(rows, columns=columns).astype({name: TYPES[name] for name in columns if name in TYPES})


def family(draws: Draws, questions: Sequence[Mapping]) -> pd.DataFrame:
    """The comparisons of a family that was listed beforehand, with verdicts at 5% for the whole family (`holm`).

    Of three comparisons with p = .01, .04, .03 and positive values only the first is ``above``: .04 and .03 are .06
    after Holm. One whose run is missing still counts as one of the family.

    Parameters
    ----------
    questions : ``id``, ``a`` and ``b`` each (a minus b), ``metric`` (``measured_mat``) and ``draft_step`` (none) where
        they are others, as the files of ``data/experiments`` list them; what else they hold follows as columns.

    Returns
    -------
    Columns id, a, b, metric, draft_step, value, low, high and p of this comparison alone, holm, smallest_visible,
    seeds (the fewest of the two) and verdict: above, below, not distinguishable from, or not run.

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
        rows.append({**question, **_compared(draws, question["a"], question["b"], metric, step)})
    table = pd.DataFrame(rows, columns=list(dict.fromkeys([*FAMILY, *(name for row in rows for name in row)])))
    table = table.astype({name: TYPES[name] for name in TYPES}).assign(holm=holm(table["p"]))
    unsure = table["verdict"].isin(["above", "below"]) & ~(table["holm"] < 0.05)
    return table.assign(verdict=table["verdict"].mask(unsure, "not distinguishable from"))


def _compared(draws: Draws, a: str, b: str, metric: str, step: int | None) -> dict:
    """One comparison; without numbers where a run is missing."""
    row = {"metric": metric, "draft_step": step, "verdict": "not run"}
    if draws.has(a, metric, step) and draws.has(b, metric, step):
        drawn = draws.contrast_draws((1, a, metric, step), (-1, b, metric, step))
        found = interval(drawn)
        row |= {**vars(found), "p": p_value(drawn), "smallest_visible": smallest_visible(found)}
        row |= {"seeds": min(draws.seeds(a), draws.seeds(b)), "verdict": found.verdict(0)}
    return row


def p_value(draws: np.ndarray) -> float:
    """Two-sided bootstrap p of "no difference", from draws [1 + samples] of one: at least 2 / (1 + samples)."""
    drawn = draws[1:][np.isfinite(draws[1:])]
    return float(min(1, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn))))


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


def smallest_visible(found: Interval) -> float:
    """The smallest true difference that would have been seen in four of five such studies, by the interval's width."""
    return POWER * (found.high - found.low)


# The best of each side: what reuses the target's cache against what reads its hidden states alone. They are chosen on
# other data than they are judged on, so that the choice can't flatter the result.

ALIKE = 0.02  # token counts that differ by less are equal: other seeds draw other documents


def reads(variant: str) -> str:
    """``kv`` if a drafter reuses the target's cache as it is, ``hidden`` if it reads hidden states alone, ``neither``.

    Controls (zeros, another document's KV, older KV, no target state) are neither, and so are drafters of others.
    """
    own = parameters_of(variant)
    control, paradigm = own.get("kv_control", ""), own.get("paradigm", "")
    if paradigm == "hidden" or control == "from_hidden" or own.get("block_context") == "hidden":
        return "hidden"
    return "kv" if paradigm and not control else "neither"


def contenders(runs: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Every drafter that may be chosen: variant, reads, tokens (of its start included), validation_mat; best first."""
    own = runs.groupby("variant")["trained_tokens"].mean()
    starts = runs.groupby("variant")["init_from"].first().fillna("") if "init_from" in runs else own.map(lambda _: "")
    ends = validation_mat(history)
    ends = ends[ends["step"] == ends.groupby(["variant", "seed"])["step"].transform("max")]
    mat = ends.groupby("variant")["value"].mean()
    before = starts.map(lambda start: own.get(start, np.nan) if start else 0)
    rows = [
        [variant, reads(variant), own[variant] + before[variant], mat[variant]]
        for variant in in_study_order(own.index)
        if variant in mat and reads(variant) != "neither"
    ]
    table = pd.DataFrame(rows, columns=["variant", "reads", "tokens", "validation_mat"]).dropna()
    return table.sort_values("validation_mat", ascending=False, kind="stable").reset_index(drop=True)


def best_pair(table: pd.DataFrame) -> tuple[str, str, str]:
    """Of `contenders` the best that reuses KV, and of equal tokens the best hidden-only one and plain `hidden`.

    Named where there is none, too, so that a scorecard says what is missing.
    """
    kv = table[table["reads"] == "kv"]
    if kv.empty:
        return "kv_4", "hidden", "hidden"
    rivals = table[(table["reads"] == "hidden") & ((table["tokens"] / kv["tokens"].iloc[0] - 1).abs() < ALIKE)]
    plain = [variant for variant in ("hidden", "hidden_continued") if variant in set(rivals["variant"])]
    return kv["variant"].iloc[0], *([*rivals["variant"], "hidden"][:1]), *([*plain, "hidden"][:1])


def comparable(prompts: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``decode_prompts`` of either side, on the device and in the number format with the most drafters."""
    rows = prompts[prompts["variant"].map(reads) != "neither"]
    if rows.empty:
        return rows
    counted = rows.groupby(["device", "dtype"])["variant"].nunique().sort_values(ascending=False, kind="stable")
    device, dtype = counted.index[0]
    return rows[(rows["device"] == device) & (rows["dtype"] == dtype)]


def fastest_chains(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(variant, chain length) of the fastest chain on some prompts of `comparable` rows, by side: kv and hidden."""
    best = {"kv": (-np.inf, "kv_4", "7"), "hidden": (-np.inf, "hidden", "7")}  # named where nothing was timed
    chains, once = rows[rows["mode"] == "chain"], np.ones((1, len(names)))
    for (variant, plan), own in chains.groupby(["variant", "plan"], sort=True):
        fast = np.mean([_speed(rows, variant, run, plan, names, once)[0] for run in sorted(own["seed"].unique())])
        best[reads(variant)] = max(best[reads(variant)], (fast, variant, plan))
    return {side: found[1:] for side, found in best.items()}


def speed_draws(
    prompts: pd.DataFrame, duel: pd.DataFrame, samples: int = 2000, seed: int = 0
) -> tuple[dict[str, tuple[str, str]], Draws]:
    """`fastest_chains` and their ``speedup`` over the target alone, on prompts that they were not chosen on.

    Chosen on all prompts of ``decode_prompts``, judged on those that only ``decode_duel`` has of both; without such
    prompts chosen on every second prompt, in the order of their names, and judged on the others.
    """
    rows = comparable(prompts)
    names = sorted(rows["prompt"].unique())
    best, judged = fastest_chains(rows, names), duel
    judging = sorted(set.intersection(*(_timed(judged, *found) for found in best.values())) - {*names})
    if not judging:
        best, judged, judging = fastest_chains(rows, names[::2]), rows, names[1::2]
    weights = resample_weights(max(1, len(judging)), samples, seed).astype(float)
    keys, values = [], []
    for variant, plan in best.values():
        chains = judged[(judged["variant"] == variant) & (judged["mode"] == "chain")]
        for run in sorted(chains["seed"].unique()) if judging else ():
            keys.append([variant, run, "speedup", pd.NA, len(judging)])
            values.append(_speed(judged, variant, run, plan, judging, weights))
    table = pd.DataFrame(keys, columns=["variant", "seed", "metric", "draft_step", "documents"])
    stacked = np.stack(values) if values else np.zeros((0, 1 + samples))
    return best, Draws(table.astype({"draft_step": "Int64"}), stacked, seed)


def _timed(rows: pd.DataFrame, variant: str, plan: str) -> set[str]:
    """Prompts on which that chain was timed."""
    return {*rows.loc[(rows["variant"] == variant) & (rows["mode"] == "chain") & (rows["plan"] == plan), "prompt"]}


def _speed(
    rows: pd.DataFrame, variant: str, seed: int, plan: str, names: Sequence[str], weights: np.ndarray
) -> np.ndarray:
    """Tokens/s of a chain over those of the target alone, same run and turns, on weighted prompts: float [weights]."""
    own = rows[(rows["variant"] == variant) & (rows["seed"] == seed)]
    alone, chain = own[own["mode"] == "alone"], own[(own["mode"] == "chain") & (own["plan"] == plan)]
    both = chain[["prompt", "turn"]].merge(alone[["prompt", "turn"]])
    sums, base = (weights @ prompt_sums(part.merge(both), list(names)) for part in (chain, alone))
    return ratios(sums, base)["speedup"]
