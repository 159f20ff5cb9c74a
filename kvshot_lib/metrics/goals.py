"""The study's own goals, B1 and B2: the best drafter that reuses the target's KV against the best that reads its hidden states alone.

"Best" is chosen on other data than it is judged on, so that the choice can't flatter the result:

    B1  chosen by the acceptance on *validation* documents at the end of training (``history``), judged on the evaluation documents
    B2  chosen, with the length of its chain, by the speed on the prompts that all drafters were timed on, judged on others (`duel`)

The rival must have been trained on as many tokens, those of a drafter that it started from included. It is chosen among all drafters that
read hidden states and no cache, whatever their training (`hidden` and its kin, blocks over hidden states, keys and values made from hidden
states): a goal against the weakest of them would be no goal. B1a keeps the plain `hidden` of equal tokens beside it.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ..drafters.variants import parameters_of
from . import tables
from .claims import Claim
from .decode_tables import prompt_sums, ratios
from .resampling import Draws, resample_weights
from .tables import in_order

GAIN = 1.1  # ten per cent more
STEPS = (
    7  # draft steps of the validation acceptance that are compared; a drafter that was validated on fewer is not chosen
)
ALIKE = 0.02  # token counts that differ by less are equal: other seeds draw other documents


def reads(variant: str) -> str:
    """``kv`` if the drafter reuses the target's cache as it is, ``hidden`` if it reads hidden states alone, else ``neither``.

    Controls (zeros, another document's KV, older KV, no target state) are neither, and so are drafters that the study does not name.
    """
    own = parameters_of(variant)
    control, paradigm = own.get("kv_control", ""), own.get("paradigm", "")
    if paradigm == "hidden" or control == "from_hidden" or own.get("block_context") == "hidden":
        return "hidden"
    return "kv" if paradigm and not control else "neither"


def total_tokens(runs: pd.DataFrame) -> dict[str, float]:
    """Tokens that a variant was trained on (mean over seeds), those of the drafter that it started from included."""
    own = runs.groupby("variant")["trained_tokens"].mean().to_dict()
    starts = runs.groupby("variant")["init_from"].first().to_dict() if "init_from" in runs else {}
    start = {v: starts.get(v) if isinstance(starts.get(v), str) else "" for v in own}
    return {v: own[v] + (own.get(start[v], np.nan) if start[v] else 0) for v in own}


def validation_mat(history: pd.DataFrame) -> dict[str, float]:
    """1 + Σ_i Π_{j ≤ i} α_j on the validation documents after the last optimiser step, mean over seeds; K = 7 for all."""
    rows = history[(history["split"] == "validation") & (history["draft_step"] < STEPS)]
    rows = rows[rows["step"] == rows.groupby(["variant", "seed"])["step"].transform("max")]
    found: dict[str, list[float]] = {}
    for (variant, _), own in rows.groupby(["variant", "seed"], sort=False):
        accepted = own.sort_values("draft_step")["acceptance"].to_numpy(float)
        if len(accepted) == STEPS:
            found.setdefault(variant, []).append(1 + accepted.cumprod().sum())
    return {variant: float(np.mean(each)) for variant, each in found.items()}


def contenders(runs: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Every drafter that may be chosen: variant, reads, tokens, validation_mat; best first."""
    tokens, chosen_by = total_tokens(runs), validation_mat(history)
    rows = [
        [v, reads(v), tokens[v], chosen_by[v]] for v in in_order(tokens) if v in chosen_by and reads(v) != "neither"
    ]
    table = pd.DataFrame(rows, columns=["variant", "reads", "tokens", "validation_mat"]).dropna()
    return table.sort_values("validation_mat", ascending=False, kind="stable").reset_index(drop=True)


def best_pair(table: pd.DataFrame) -> tuple[str, str]:
    """The best KV-reusing drafter of `contenders` and the best hidden-only one of equal tokens; ``""`` where there is none."""
    kv = table[table["reads"] == "kv"]
    if kv.empty:
        return "", ""
    best = kv.iloc[0]
    rivals = table[(table["reads"] == "hidden") & _alike(table["tokens"], best["tokens"])]
    return best["variant"], rivals["variant"].iloc[0] if len(rivals) else ""


def _alike(tokens: pd.Series, other: float) -> pd.Series:
    return (tokens / other - 1).abs() < ALIKE


def acceptance_goals(table: pd.DataFrame) -> tuple[Claim, ...]:
    """B1 about the drafters that `contenders` names: measured MAT, ten per cent over plain `hidden` (B1a) and over the best rival (B1b)."""
    best, rival = best_pair(table)
    best, rival = (
        best or "kv_4",
        rival or "hidden",
    )  # nothing trained: named, so that the scorecard says what is missing
    tokens = table.set_index("variant")["tokens"]
    plain = [v for v in ("hidden", "hidden_continued") if v in tokens and _alike(tokens[[v]], tokens[best]).all()]
    plain = plain[0] if plain else "hidden"
    told = f"`{best}`, best with KV, has a tenth more MAT than"
    return (
        Claim("B1a", f"{told} `{plain}`, equal tokens", _tenth_more(best, plain, "measured_mat"), "above"),
        Claim("B1b", f"{told} `{rival}`, best without", _tenth_more(best, rival, "measured_mat"), "above"),
    )


def _tenth_more(a: str, b: str, metric: str) -> tuple[tuple, ...]:
    return (1, a, metric), (-GAIN, b, metric)


def speed_goal(
    prompts: pd.DataFrame, duel: pd.DataFrame | None = None, samples: int = 2000, seed: int = 0
) -> tuple[Claim, Draws]:
    """B2 and its draws: `speed` of the fastest chain over KV against the fastest hidden-only chain, over the target alone in the same run.

    ``prompts`` is ``decode_prompts``; of several devices or number formats that with the most drafters counts. The two are chosen on all of its
    prompts and judged on those that only ``duel`` (`decode_duel`, rows of the same kind) has of both. Without such prompts they are chosen on
    every second prompt, in the order of their names, and judged on the others. The statistic has a row for each variant and seed.
    """
    rows = comparable(prompts)
    names = sorted(rows["prompt"].unique())
    best, judged = fastest_chains(rows, names), tables.empty("decode_prompts") if duel is None else duel
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
    table = pd.DataFrame(keys, columns=["variant", "seed", "metric", "draft_step", "prompts"])
    draws = Draws(
        table.astype({"draft_step": "Int64"}), np.stack(values) if values else np.zeros((0, 1 + samples)), seed
    )
    (a, chain_a), (b, chain_b) = best["kv"], best["hidden"]
    statement = f"`{a}`, chains of {chain_a}, gives a tenth more tokens/s than `{b}`, chains of {chain_b}"
    return Claim("B2", statement, _tenth_more(a, b, "speedup"), "above"), draws


def fastest_chains(rows: pd.DataFrame, names: list[str]) -> dict[str, tuple[str, str]]:
    """(variant, chain length) of the fastest chain over KV (``kv``) and of the fastest hidden-only one (``hidden``) on some prompts of `comparable` rows."""
    best = {"kv": (-np.inf, "kv_4", "7"), "hidden": (-np.inf, "hidden", "7")}  # named where nothing was timed
    chains, once = rows[rows["mode"] == "chain"], np.ones((1, len(names)))
    for (variant, plan), own in chains.groupby(["variant", "plan"], sort=True):
        fast = np.mean([_speed(rows, variant, run, plan, names, once)[0] for run in sorted(own["seed"].unique())])
        best[reads(variant)] = max(best[reads(variant)], (fast, variant, plan))
    return {side: found[1:] for side, found in best.items()}


def _timed(rows: pd.DataFrame, variant: str, plan: str) -> set[str]:
    """Prompts on which that chain was timed."""
    return {*rows.loc[(rows["variant"] == variant) & (rows["mode"] == "chain") & (rows["plan"] == plan), "prompt"]}


def comparable(prompts: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``decode_prompts`` that are of either side, on the device and in the number format with which most drafters were timed."""
    rows = prompts[prompts["variant"].map(reads) != "neither"]
    if rows.empty:
        return rows
    counted = rows.groupby(["device", "dtype"])["variant"].nunique().sort_values(ascending=False, kind="stable")
    device, dtype = counted.index[0]
    return rows[(rows["device"] == device) & (rows["dtype"] == dtype)]


def _speed(
    rows: pd.DataFrame, variant: str, seed: int, plan: str, names: Iterable[str], weights: np.ndarray
) -> np.ndarray:
    """Tokens/s of a chain over those of the target alone, same run and turns, on weighted prompts: float [weights]."""
    own = rows[(rows["variant"] == variant) & (rows["seed"] == seed)]
    alone, chain = own[own["mode"] == "alone"], own[(own["mode"] == "chain") & (own["plan"] == plan)]
    both = chain[["prompt", "turn"]].merge(alone[["prompt", "turn"]])
    sums, base = (weights @ prompt_sums(part.merge(both), list(names)) for part in (chain, alone))
    return ratios(sums, base)["speedup"]
