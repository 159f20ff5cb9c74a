"""Decoding's results from the rows of single prompts: tokens per forward, speed and parts, with intervals over prompts (no torch).

Everything is a ratio of sums over prompts, so an interval resamples prompts; the turns of a dialogue stay together.

    decoded_mat      Σ (new tokens - 1) / Σ forwards: the prefill gives the first token
    tokens_per_s     Σ new tokens / Σ seconds of whole answers, prefill and all
    speedup          tokens_per_s / that of the target alone (mode ``alone``) on the same prompts in the same run

and, of the pass that the clock of `decode_parts` measured, what the cost model is fed with:

    draft_cost       drafter (steps and prefix entries) / verifications: the model's draft_time / verify_time
    verify_cost      one verification / one forward of the target alone over a single token; the model says 1
    other_cost       bookkeeping, sampling and the rest / verifications; the model says 0
    predicted        decoded_mat / (1 + draft_cost): the cost model, design.md section 7
    predicted_whole  decoded_mat / (verify_cost · (1 + draft_cost + other_cost)): nothing left out but the prefill
    draft_step_s     seconds of the drafter's steps / levels that it drafted: what a draft step costs
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from .resampling import interval, resample_weights

RUN = ["variant", "seed", "dtype", "device"]
PLAN = ["mode", "plan"]
ALL = "all"  # the category that holds every prompt
PART_COLUMNS = ("prefill_s", "verify_s", "draft_s", "project_s", "bookkeeping_s", "sampling_s", "rest_s")
SUMS = ["new_tokens", "extra_tokens", "forwards", "drafted", "seconds", *PART_COLUMNS]
MODEL = ("draft_cost", "verify_cost", "other_cost", "predicted", "predicted_whole", "draft_step_s")


def prompt_sums(rows: pd.DataFrame, prompts: list) -> np.ndarray:
    """``SUMS`` of the turns of each of ``prompts``, float [prompts, 12]; zeros where a prompt was not measured."""
    rows = rows.assign(extra_tokens=rows["new_tokens"] - 1, drafted=rows["drafted"].fillna(0).astype(float))
    return rows.groupby("prompt")[SUMS].sum().reindex(prompts, fill_value=0).to_numpy(float)


def ratios(sums: np.ndarray, alone: np.ndarray) -> dict[str, np.ndarray]:
    """The module's ratios from sums [..., 12] of a plan and of the target alone."""
    at = {name: sums[..., SUMS.index(name)] for name in SUMS}
    base = {name: alone[..., SUMS.index(name)] for name in SUMS}
    with np.errstate(divide="ignore", invalid="ignore"):
        speed, target = at["new_tokens"] / at["seconds"], base["new_tokens"] / base["seconds"]
        mat = at["extra_tokens"] / at["forwards"]
        found = {"decoded_mat": mat, "tokens_per_s": speed, "target_tokens_per_s": target, "speedup": speed / target}
        draft = (at["draft_s"] + at["project_s"]) / at["verify_s"]
        verify = at["verify_s"] / at["forwards"] / (base["verify_s"] / base["forwards"])
        other = (at["bookkeeping_s"] + at["sampling_s"] + at["rest_s"]) / at["verify_s"]
        found |= {"draft_cost": draft, "verify_cost": verify, "other_cost": other}
        found |= {"predicted": mat / (1 + draft), "predicted_whole": mat / (verify * (1 + draft + other))}
        return found | {"draft_step_s": at["draft_s"] / at["drafted"]}


def drawn(rows: pd.DataFrame, samples: int, seed: int) -> Iterator[tuple[tuple, pd.DataFrame, np.ndarray, dict]]:
    """For each run and plan: key, its rows, sums [1 + samples, 12], and ratios float [1 + samples] (column 0: as measured).

    Only turns that the target alone answered in the same run count; all plans of all runs share the resamples of prompts.
    """
    prompts = sorted(rows["prompt"].unique())
    if not prompts:
        return
    weights = resample_weights(len(prompts), samples, seed).astype(float)
    for run, own in rows.groupby(RUN, sort=False):
        alone = own[own["mode"] == "alone"]
        for plan, part in own.groupby(PLAN, sort=False):
            part = part.merge(alone[["prompt", "turn"]], on=["prompt", "turn"])
            matching = alone.merge(part[["prompt", "turn"]], on=["prompt", "turn"])
            sums, base = (weights @ prompt_sums(table, prompts) for table in (part, matching))
            yield (*run, *plan), part, sums, ratios(sums, base)


def decoding_table(prompts: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The rows of ``decoding``: each run and plan by category and over all prompts (``all``), with 95% intervals over prompts.

    ``*_s`` are sums over the timed parts of all answers; ``same_answers`` counts those that are the target's own, token for token.
    """
    found = []
    for category in [ALL, *dict.fromkeys(prompts["category"])]:
        rows = prompts if category == ALL else prompts[prompts["category"] == category]
        for (variant, run, dtype, device, mode, plan), part, sums, ratio in drawn(rows, samples, seed):
            row = {"variant": variant, "seed": run, "mode": mode, "plan": plan, "category": category}
            for name in ("decoded_mat", "speedup"):
                edges = interval(ratio[name])
                row |= {name: edges.value, f"{name}_low": edges.low, f"{name}_high": edges.high}
            row |= {name: ratio[name][0] for name in ("tokens_per_s", "target_tokens_per_s")}
            seen = part["verify_s"].notna().all()  # a peer's parts can't be seen from outside
            row |= {name: sums[0, SUMS.index(name)] if seen else np.nan for name in PART_COLUMNS}
            row |= {"new_tokens": part["new_tokens"].sum(), "forwards": part["forwards"].sum(), "answers": len(part)}
            row |= {
                "same_answers": (part["same_tokens"] == part["new_tokens"]).sum(),
                "prompts": part["prompt"].nunique(),
            }
            row |= {"other_s": row["bookkeeping_s"] + row["sampling_s"] + row["rest_s"]}
            found.append(row | {"dtype": dtype, "device": device})
    return pd.DataFrame(found)


def model_table(prompts: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The cost model of each run and plan, over all prompts: `MODEL`, decoded_mat and speedup, each with its 95% interval.

    Columns: variant, seed, mode, plan, metric, value, low, high. Peers, whose parts can't be seen from outside, are left out.
    """
    found = []
    for (variant, run, _, _, mode, plan), part, _, ratio in drawn(prompts, samples, seed):
        if part["verify_s"].notna().all() and mode != "alone":
            for metric in ("decoded_mat", "speedup", *MODEL):
                found.append([variant, run, mode, plan, metric, *vars(interval(ratio[metric])).values()])
    return pd.DataFrame(found, columns=["variant", "seed", "mode", "plan", "metric", "value", "low", "high"])
