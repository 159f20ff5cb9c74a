"""Decoding's results from rows of single answers: tokens per forward, speed, costs, claims C14 and B2 (no torch).

Everything is a ratio of sums over prompts, so an interval resamples prompts; the turns of a dialogue stay
together.

    decoded_mat      Σ (new tokens - 1) / Σ forwards: the prefill gives the first token
    tokens_per_s     Σ new tokens / Σ seconds of whole answers, prefill and all
    speedup          tokens_per_s / that of the target alone (mode ``alone``) on the same prompts in the same run

and, of the pass that a clock measured part by part, what the cost model, decoded_mat / (1 + draft_cost),
is fed with:

    draft_cost       drafter (steps and prefix entries) / verifications: the model's draft_time / verify_time
    verify_cost      one verification / one forward of the target alone over a single token; the model says 1
    other_cost       bookkeeping, sampling and the rest / verifications; the model says 0
    draft_step_s     seconds of the drafter's steps / levels that it drafted: what a draft step costs
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ..drafters.variants import in_study_order
from .claims import stated
from .resampling import Draws, drawn_as, interval, resample_weights
from .tables import PARTS

RUN = ["variant", "seed", "dtype", "device"]
PLAN = ["mode", "plan"]
ALL = "all"  # the category that holds every prompt
PEERS = "transformers"  # the name under which `generate` stands among the variants
PART_COLUMNS = tuple(f"{part}_s" for part in PARTS)
SUMS = ["new_tokens", "extra_tokens", "forwards", "drafted", "seconds", *PART_COLUMNS]


def ratios(sums: np.ndarray, alone: np.ndarray) -> dict[str, np.ndarray]:
    """The module's ratios from sums [..., 12] of a plan and of the target alone."""
    at, base = (dict(zip(SUMS, np.moveaxis(summed, -1, 0))) for summed in (sums, alone))
    with np.errstate(divide="ignore", invalid="ignore"):
        speed, target = at["new_tokens"] / at["seconds"], base["new_tokens"] / base["seconds"]
        verify, verify_alone = at["verify_s"] / at["forwards"], base["verify_s"] / base["forwards"]
        return {
            "decoded_mat": at["extra_tokens"] / at["forwards"],
            "tokens_per_s": speed,
            "target_tokens_per_s": target,
            "speedup": speed / target,
            "draft_cost": (at["draft_s"] + at["project_s"]) / at["verify_s"],
            "verify_cost": verify / verify_alone,
            "other_cost": (at["bookkeeping_s"] + at["sampling_s"] + at["rest_s"]) / at["verify_s"],
            "draft_step_s": at["draft_s"] / at["drafted"],
        }


def drawn(rows: pd.DataFrame, samples: int, seed: int) -> Iterator[tuple[tuple, pd.DataFrame, np.ndarray, dict]]:
    """For each run and plan: key, its rows, sums [1 + samples, 12], ratios float [1 + samples] (column 0: as measured).

    Only turns that the target alone answered in the same run count; all plans of all runs share the
    resamples of prompts.
    """
    prompts = sorted(rows["prompt"].unique())
    if not prompts:
        return
    weights = resample_weights(len(prompts), samples, seed).astype(float)
    rows = rows.assign(extra_tokens=rows["new_tokens"] - 1, drafted=rows["drafted"].fillna(0).astype(float))
    for run, own in rows.groupby(RUN, sort=False):
        alone = own[own["mode"] == "alone"]
        for plan, part in own.groupby(PLAN, sort=False):
            part = part.merge(alone[["prompt", "turn"]], on=["prompt", "turn"])
            matching = alone.merge(part[["prompt", "turn"]], on=["prompt", "turn"])
            each = (table.groupby("prompt")[SUMS].sum() for table in (part, matching))
            sums, base = (weights @ found.reindex(prompts, fill_value=0).to_numpy(float) for found in each)
            yield (*run, *plan), part, sums, ratios(sums, base)


def decoding_table(prompts: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """The rows of ``decoding``: each run and plan by category and over ``all`` prompts, with 95% intervals.

    ``*_s`` are sums over the timed parts of all answers; ``same_answers`` counts those that are the
    target's own, token for token.
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
            row |= {name: part[name].sum() for name in ("new_tokens", "forwards")}
            same = (part["same_tokens"] == part["new_tokens"]).sum()
            row |= {"answers": len(part), "same_answers": same, "prompts": part["prompt"].nunique()}
            row |= {"other_s": row["bookkeeping_s"] + row["sampling_s"] + row["rest_s"]}
            found.append(row | {"dtype": dtype, "device": device})
    return pd.DataFrame(found)


def fastest(decoding: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``decoding`` over all prompts: the target alone, the fastest chain and the fastest tree of each drafter.

    Of a drafter that was decoded with several seeds the first one counts.
    """
    own = decoding[(decoding["category"] == ALL) & (decoding["variant"] != PEERS)]
    own = own[own["seed"] == own.groupby("variant")["seed"].transform("min")]
    best = own.sort_values("speedup", ascending=False, kind="stable").drop_duplicates(["variant", "mode"])
    found = [best[best["variant"] == variant].sort_values("mode") for variant in in_study_order(own["variant"])]
    return pd.concat([best[:0], *found], ignore_index=True)


def parts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows of ``decoding``: variant, mode, plan, part, milliseconds per new token, share."""
    kept = [*PLAN, "variant", "new_tokens"]
    parts = rows.melt(kept, [*PART_COLUMNS], "part", "seconds")
    parts["part"] = parts["part"].str.removesuffix("_s")
    whole = parts.groupby(["variant", *PLAN])["seconds"].transform("sum")
    parts = parts.assign(milliseconds=1000 * parts["seconds"] / parts["new_tokens"], share=parts["seconds"] / whole)
    return parts[["variant", *PLAN, "part", "milliseconds", "share"]]


def passes(variant: str, mode: str, plan: str) -> int:
    """How often the drafter runs for one proposal: L of a chain, depth + 1 of a tree, once of a block."""
    if variant.startswith("block"):
        return 1
    return int(plan) if mode == "chain" else int(plan.split("/")[0]) + 1


def break_even(prompts: pd.DataFrame) -> pd.DataFrame:
    """What a pass of the drafter may cost, in verifications, and what it did cost: a row a drafter and plan.

    With speedup = decoded_mat / (1 + draft_time / verify_time) a chain of L, whose steps cost c
    verifications each, is faster than the target alone if c < (decoded_mat - 1) / L. A block drafts
    everything in one pass: c < decoded_mat - 1. Columns variant, mode, plan, decoded_mat, draft_cost, verify_cost,
    passes, ``affordable`` by the model, ``affordable_here`` with the measured price of verifying several tokens at
    once, and the measured ``cost``, prefix entries included. Peers, whose parts can't be seen from outside, are left
    out.
    """
    names, rows = ["decoded_mat", "draft_cost", "verify_cost"], []
    for (variant, *_, mode, plan), part, _, ratio in drawn(prompts, 1, 0):
        if part["verify_s"].notna().all() and mode != "alone":
            rows.append([variant, mode, plan, *(ratio[name][0] for name in names), passes(variant, mode, plan)])
    table = pd.DataFrame(rows, columns=["variant", *PLAN, *names, "passes"])
    table = table.groupby(["variant", *PLAN], sort=False).mean().reset_index()
    runs, mat = table["passes"], table["decoded_mat"]
    here = (mat / table["verify_cost"] - 1) / runs
    return table.assign(affordable=(mat - 1) / runs, affordable_here=here, cost=table["draft_cost"] / runs)


def paper_scale(latency: pd.DataFrame, drafts: int = 7) -> pd.DataFrame:
    """From ``step_latency``: what a proposal of ``drafts`` tokens costs, in forwards of the target over one token.

    A row a drafter and prefix: a chain, or a block. ``verify`` is the verification, ``draft`` the drafter's
    passes, ``project`` the entries of accepted tokens; ``break_even_mat`` is their sum, the tokens per
    target forward from which on it pays.
    """
    cost = latency.set_index(["what", "tokens", "prefix_tokens"])["milliseconds"]
    project = {what.removeprefix("project "): ms for (what, *_), ms in cost.items() if what.startswith("project")}
    rows = []
    for (what, tokens, prefix), milliseconds in cost.items():
        kind, _, variant = what.partition(" ")
        if (kind, tokens) in (("draft", 1), ("block", drafts)):
            alone, verify = (cost.get(("verify", verified, prefix), np.nan) for verified in (1, drafts + 1))
            parts = verify, milliseconds * (drafts if kind == "draft" else 1), project[variant]
            rows.append([variant, kind, prefix, alone, *(part / alone for part in parts)])
    table = pd.DataFrame(rows, columns=["variant", "kind", "prefix_tokens", "alone_ms", "verify", "draft", "project"])
    return table.assign(break_even_mat=table["verify"] + table["draft"] + table["project"])


STATISTICS = {  # of a claim about decoded answers: by what mode, of which ratio
    "tree_decoded_mat": ("tree", "decoded_mat"),
    "chain_decoded_mat": ("chain", "decoded_mat"),
    "log_draft_step_s": ("chain", "draft_step_s"),
    "speedup": ("chain", "speedup"),
}


def decode_draws(prompts: pd.DataFrame, duel: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """What claims C14 and B2 are about, each on the prompts that all its drafters answered.

    tree_decoded_mat, chain_decoded_mat : tokens per target forward, by the tree, and by the longest chain that all had.
    log_draft_step_s : natural log of the seconds of one draft step of that chain: a difference is the log of a ratio.
    speedup : of chains of 2 over the target alone, on the prompts of ``decode_duel``: the others chose the chains.
    """
    keys, values = [], []
    for claim in stated("C14", "B2"):
        metric = claim.terms[0][2]
        (wanted, name), rows = STATISTICS[metric], duel if metric == "speedup" else pd.concat([prompts, duel])
        own = rows[rows["variant"].isin(claim.variants)]
        answered = own.groupby("variant")["prompt"].agg(set)
        own = own[own["prompt"].isin(set.intersection(*answered) if len(answered) else ())]
        chains = own[own["mode"] == "chain"].groupby("variant")["plan"].agg(set)
        longest = max(set.intersection(*chains) if len(chains) else (), key=int, default=None)
        chain = "2" if metric == "speedup" else longest
        for (variant, run, _, _, mode, plan), _, _, ratio in drawn(own, samples, seed):
            if mode == wanted and (mode == "tree" or plan == chain):
                keys.append([variant, run, metric, None])
                values.append(np.log(ratio[name]) if metric.startswith("log") else ratio[name])
    return drawn_as(keys, values, samples, seed)
