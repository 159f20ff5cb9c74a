"""What notebook 07 draws: the plan chosen for each drafter, milliseconds by part, growth with the prefix, break-even costs (no torch).

A drafter's *best chain* is the measured length with the largest speedup over all prompts. Where a drafter was decoded with several seeds,
the first one is taken; number formats are not mixed: `one_dtype` picks one.

Break-even. With the cost model speedup = decoded_mat / (1 + draft_time / verify_time), a chain of L drafts whose steps cost c verifications each
is faster than the target alone if c < (decoded_mat - 1) / L. A block drafts everything in one pass: c < decoded_mat - 1.
"""

import numpy as np
import pandas as pd

from ..errors import StudyError
from .decode_tables import ALL
from .tables import in_order

PARTS = ("prefill", "verify", "draft", "project", "bookkeeping", "sampling", "rest")
STEP_PARTS = ("verify", "draft", "project", "other")
ALONE = "alone"
PEERS = "transformers"


def one_dtype(table: pd.DataFrame, dtype: str = "") -> pd.DataFrame:
    """Rows of one number format; by default of the first by name (bfloat16 before float32).

    Raises
    ------
    StudyError : a format that was not measured.
    """
    there = sorted(table["dtype"].unique())
    if dtype and dtype not in there and there:
        raise StudyError(f"dtype={dtype!r} was not measured; measured: {', '.join(there)}")
    return table[table["dtype"] == (dtype or (there or [""])[0])].reset_index(drop=True)


def first_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of each variant's first seed."""
    return table[table["seed"] == table.groupby("variant")["seed"].transform("min")].reset_index(drop=True)


def best_plans(decoding: pd.DataFrame) -> pd.DataFrame:
    """variant, mode, plan: the fastest chain of each drafter over all prompts, its tree (the fastest, if several), and the target alone."""
    own = decoding[(decoding["category"] == ALL) & (decoding["variant"] != PEERS)]
    fastest = own.sort_values("speedup", ascending=False, kind="stable").drop_duplicates(["variant", "mode"])
    found = [fastest[fastest["variant"] == variant].sort_values("mode") for variant in in_order(own["variant"])]
    return pd.concat([fastest[:0], *found], ignore_index=True)[["variant", "mode", "plan"]]


def chosen(table: pd.DataFrame, plans: pd.DataFrame, *modes: str) -> pd.DataFrame:
    """The rows of ``table`` with the plans of `best_plans`, in their order; only of some modes, if named."""
    plans = plans[plans["mode"].isin(modes)] if modes else plans
    return plans.merge(table, on=["variant", "mode", "plan"], how="left")


def parts_table(decoding: pd.DataFrame, plans: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds per new token of each part, of the chosen plans over all prompts: variant, mode, plan, part, milliseconds, share."""
    rows = []
    for row in chosen(decoding[decoding["category"] == ALL], plans).itertuples():
        seconds = {part: getattr(row, f"{part}_s") for part in PARTS}
        total = sum(seconds.values())
        for part, value in seconds.items():
            rows.append([row.variant, row.mode, row.plan, part, 1000 * value / row.new_tokens, value / total])
    return pd.DataFrame(rows, columns=["variant", "mode", "plan", "part", "milliseconds", "share"])


def step_parts(steps: pd.DataFrame) -> pd.DataFrame:
    """``decode_steps`` with bookkeeping, sampling and the rest summed up as ``other``."""
    part = steps["part"].where(steps["part"].isin(STEP_PARTS), "other")
    by = ["variant", "mode", "plan", "prefix_tokens", "part"]
    return steps.assign(part=part).groupby(by, sort=False)["milliseconds"].sum().reset_index()


def growth(steps: pd.DataFrame) -> pd.DataFrame:
    """Of each part of a step: milliseconds at the shortest and the longest prefix, and what share of the whole step's growth is its own."""
    table = step_parts(steps)
    first, last = table["prefix_tokens"].min(), table["prefix_tokens"].max()
    wide = table.pivot_table(
        index=["variant", "mode", "plan", "part"], columns="prefix_tokens", values="milliseconds", sort=False
    )
    found = pd.DataFrame({"first": wide[first], "last": wide[last]}).reset_index()
    return found.assign(first_prefix=first, last_prefix=last, grown=found["last"] - found["first"])


def branch_price(steps: pd.DataFrame, hybrids=("hybrid", "hybrid_warm"), against: str = "hidden") -> pd.DataFrame:
    """Extra time of a hybrid's drafting over that of `hidden`, a row a plan and prefix; both fractions.

    ``extra`` is of the draft steps alone, ``extra_with_prefix`` with the entries of accepted tokens.
    """
    columns = ["variant", "mode", "plan", "prefix_tokens", "hidden_ms", "hybrid_ms", "extra", "extra_with_prefix"]
    found = [pd.DataFrame(columns=columns)]
    at = ["mode", "plan", "prefix_tokens"]
    wide = steps[steps["mode"] != ALONE].pivot_table(
        index=at, columns=["variant", "part"], values="milliseconds", sort=False
    )
    for variant in hybrids:
        if {variant, against} <= set(steps["variant"]):
            mine, base = wide[variant], wide[against]
            made = {"hidden_ms": base["draft"], "hybrid_ms": mine["draft"], "extra": mine["draft"] / base["draft"] - 1}
            both = (mine["draft"] + mine["project"]) / (base["draft"] + base["project"]) - 1
            made = pd.DataFrame(made | {"extra_with_prefix": both}).reset_index()
            found.append(made.assign(variant=variant)[columns])
    return pd.concat(found[1:] or found, ignore_index=True)


def passes(variant: str, mode: str, plan: str) -> int:
    """How often the drafter runs for one proposal: L of a chain, depth + 1 of a tree, once of a block."""
    if variant.startswith("block"):
        return 1
    return int(plan) if mode == "chain" else int(plan.split("/")[0]) + 1


def break_even(model: pd.DataFrame) -> pd.DataFrame:
    """What a pass of the drafter may cost, in verifications, and what it did cost: a row a drafter and plan.

    Columns: variant, mode, plan, passes, decoded_mat, affordable (by the cost model), affordable_here (with this machine's price of verifying
    several tokens at once), cost (measured, prefix entries included), verify_cost.
    """
    wide = model.pivot_table(
        index=["variant", "mode", "plan"], columns="metric", values="value", sort=False
    ).reset_index()
    if wide.empty:
        return pd.DataFrame(
            columns=[
                "variant",
                "mode",
                "plan",
                "passes",
                "decoded_mat",
                "affordable",
                "affordable_here",
                "cost",
                "verify_cost",
            ]
        )
    wide["passes"] = [passes(*row) for row in wide[["variant", "mode", "plan"]].itertuples(index=False, name=None)]
    wide["affordable"] = (wide["decoded_mat"] - 1) / wide["passes"]
    wide["affordable_here"] = (wide["decoded_mat"] / wide["verify_cost"] - 1) / wide["passes"]
    wide["cost"] = wide["draft_cost"] / wide["passes"]
    return wide[
        ["variant", "mode", "plan", "passes", "decoded_mat", "affordable", "affordable_here", "cost", "verify_cost"]
    ]


def break_even_curves(table: pd.DataFrame, points: int = 81) -> pd.DataFrame:
    """The cost model's speedup against the cost of a pass, of each drafter at its best measured chain length for that cost.

    ``table`` is that of `break_even`. Columns: variant, cost, speedup.
    """
    costs, rows = np.geomspace(0.005, 2.0, points), []
    for variant in in_order(table["variant"]):
        own = table[(table["variant"] == variant) & (table["mode"] == "chain")]
        speedups = own["decoded_mat"].to_numpy()[:, None] / (1 + own["passes"].to_numpy()[:, None] * costs)
        rows += [[variant, cost, speedup] for cost, speedup in zip(costs, speedups.max(0))]
    return pd.DataFrame(rows, columns=["variant", "cost", "speedup"])


def paper_scale(latency: pd.DataFrame) -> pd.DataFrame:
    """From ``step_latency``: what one proposal costs at that scale, in forwards of the target over one token.

    A row a drafter, mode and prefix: a chain of 8 drafts, the tree 8/10/60, or a block. ``verify`` is the verification, ``draft`` the drafter's
    passes, ``project`` the entries of accepted tokens; ``break_even_mat`` is their sum, the tokens per target forward from which on it pays.
    """
    cost = {(row.what, row.tokens, row.prefix_tokens): row.milliseconds for row in latency.itertuples()}
    rows = []
    for what, prefix in dict.fromkeys((what, prefix) for what, _, prefix in cost):
        kind, _, variant = what.partition(" ")
        if kind == "block":
            slots = max(tokens for name, tokens, _ in cost if name == what)
            proposals = {"chain": (slots + 1, {slots: 1})}
        else:  # tokens verified, and how often the drafter runs over how many tokens
            proposals = {"chain": (9, {1: 8}), "tree": (61, {1: 1, 10: 8})} if kind == "draft" else {}
        for mode, (verified, runs) in proposals.items():
            parts = {"verify": cost.get(("verify", verified, prefix), np.nan)}
            parts["draft"] = sum(times * cost.get((what, width, prefix), np.nan) for width, times in runs.items())
            parts["project"] = next((ms for (name, *_), ms in cost.items() if name == f"project {variant}"), np.nan)
            alone = cost.get(("verify", 1, prefix), np.nan)
            rows.append([variant, mode, prefix, alone, *(part / alone for part in parts.values())])
    table = pd.DataFrame(rows, columns=["variant", "mode", "prefix_tokens", "alone_ms", "verify", "draft", "project"])
    return table.assign(break_even_mat=table["verify"] + table["draft"] + table["project"])
