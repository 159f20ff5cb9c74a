"""Sentences and tables of notebook 07 about time: where it goes, what grows, what the cross branch costs, and what drafting may cost."""

import pandas as pd

from ..metrics.decode_costs import branch_price, growth
from ..metrics.tables import in_order
from .report import markdown_table, names

OTHER_GOAL, DRAFT_GOAL = 0.08, 0.1
PAPER_PRICE = (0.05, 0.10)  # extra draft latency of the cross-attention path, the paper's Table 4


def where_time_goes(parts: pd.DataFrame) -> str:
    """The share of everything that is neither target nor drafter, against the goal of 8%."""
    other = parts[parts["part"].isin(["bookkeeping", "sampling", "rest"])]
    lines = []
    for mode in ("chain", "tree"):
        share = other[other["mode"] == mode].groupby("variant")["share"].sum()
        if len(share):
            over = in_order(share[share >= OTHER_GOAL].index)
            told = f"missed by {names(over)}" if over else "met by all"
            lines.append(
                f"- {mode.capitalize()}: bookkeeping, sampling and the rest take {share.min():.1%} to {share.max():.1%} of the "
                f"time; the goal of less than {OTHER_GOAL:.0%} is {told}."
            )
    return "\n".join(lines)


def what_grows(steps: pd.DataFrame) -> str:
    """How much longer steps take at the longest prefix than at the shortest, and how much of that has no attention in it."""
    table = growth(steps)
    lines, (first, last) = [], table[["first_prefix", "last_prefix"]].iloc[0]
    for mode, own in table.groupby("mode", sort=False):
        total = own.groupby("variant")[["first", "last", "grown"]].sum()
        plain = own[own["part"].isin(["project", "other"])].groupby("variant")["grown"].sum() / total["first"]
        factor = total["last"] / total["first"]
        cells = {"min": factor.min(), "max": factor.max(), "low": plain.min(), "high": plain.max()}
        lines.append(
            f"- {mode.capitalize()}: a step takes {cells['min']:.2f} to {cells['max']:.2f} times as long after {last:,} tokens as after "
            f"{first:,}. Parts without attention over the prefix (projection, bookkeeping, sampling) changed by "
            f"{cells['low']:+.1%} to {cells['high']:+.1%} of the shorter step."
        )
    return "\n".join(lines)


def price_of_the_branch(steps: pd.DataFrame) -> str:
    """Extra draft latency of the hybrids' cross branch, beside the paper's 5-10%."""
    table = branch_price(steps)
    if table.empty:
        return "Needs `hidden` and a `hybrid`, decoded in the same run."
    rows = [
        [f"`{row.variant}`", f"{row.mode} {row.plan}", f"{row.prefix_tokens:,}", f"{row.hidden_ms:.2f}", f"{row.hybrid_ms:.2f}",
         f"{row.extra:+.0%}", f"{row.extra_with_prefix:+.0%}"]
        for row in table.itertuples()
    ]  # fmt: skip
    low, high = table["extra"].min(), table["extra"].max()
    header = [
        "variant",
        "plan",
        "prefix",
        "`hidden`, ms",
        "with the branch, ms",
        "extra",
        "extra, prefix entries included",
    ]
    return (
        f"{markdown_table(rows, header)}\n\nThe cross-attention branch adds {low:+.0%} to {high:+.0%} to the drafter's steps here; the paper "
        f"reports {PAPER_PRICE[0]:.0%} to {PAPER_PRICE[1]:.0%}."
    )


def model_errors(model: pd.DataFrame) -> str:
    """How far both forms of the cost model are from the measured speedups."""
    wide = model.pivot_table(index=["variant", "mode", "plan"], columns="metric", values="value")
    lines = []
    for metric, told in (
        ("predicted", "decoded_mat / (1 + draft time / verify time)"),
        ("predicted_whole", "with the price of verifying several tokens and of bookkeeping"),
    ):
        error = wide[metric] / wide["speedup"] - 1
        lines.append(
            f"- {told}: off by {error.abs().mean():.0%} on average, from {error.min():+.0%} to {error.max():+.0%}."
        )
    cost = wide["verify_cost"].groupby("mode").agg(["min", "max"])
    told = "; ".join(f"{mode}s {row['min']:.2f} to {row['max']:.2f}" for mode, row in cost.iterrows())
    lines.append(
        f"- The plain model takes a verification for one forward of the target alone. Here it costs: {told} forwards."
    )
    return "\n".join(lines)


def affordable(table: pd.DataFrame) -> str:
    """What a pass of each drafter may cost at the chosen plans, and what it does; ``table``: rows of `decode_costs.break_even`."""
    rows = []
    for row in table.itertuples():
        pays = "yes" if row.cost < row.affordable_here else "no"
        cells = (f"{value:.3f}" for value in (row.affordable, row.affordable_here, row.cost))
        rows.append([f"`{row.variant}`", f"{row.mode} {row.plan}", row.passes, f"{row.decoded_mat:.2f}", *cells, pays])
    cheap = table.loc[(table["mode"] == "chain") & (table["cost"] < DRAFT_GOAL), "variant"]
    header = [
        "variant",
        "plan",
        "passes",
        "decoded_mat",
        "affordable: one pass, in verifications",
        "at this machine's price of a verification",
        "measured",
        "pays",
    ]
    return f"{markdown_table(rows, header)}\n\nChains whose pass costs less than a tenth of a verification: {names(in_order(cheap))}."


def at_the_papers_scale(table: pd.DataFrame, latency: pd.DataFrame) -> str:
    """The costs at the paper's scale as a table, with what they were measured on."""
    rows = [
        [f"`{r.variant}`", r.mode, f"{r.prefix_tokens:,}", f"{r.alone_ms:.2f}", f"{r.verify:.2f}", f"{r.draft:.2f}", f"{r.project:.3f}", f"{r.break_even_mat:.2f}"]
        for r in table.itertuples()
    ]  # fmt: skip
    header = [
        "variant",
        "mode",
        "prefix",
        "target alone, ms",
        "verify",
        "draft",
        "project",
        "tokens per forward that pay",
    ]
    labels = {name: ", ".join(latency[name].unique()) for name in ("architecture", "device", "dtype", "method")}
    told = f"Architecture {labels['architecture']} with **random weights**, {labels['device']}, {labels['dtype']}, {labels['method']}."
    return f"{told}\n\n{markdown_table(rows, header)}"


def price_at_the_papers_scale(latency: pd.DataFrame) -> str:
    """Extra latency of the cross branch at the paper's scale, step by step."""
    cost = latency.set_index(["what", "tokens", "prefix_tokens"])["milliseconds"]
    extra = (
        (cost.loc["draft hybrid"] / cost.loc["draft hidden"] - 1)
        if {"draft hybrid", "draft hidden"} <= set(latency["what"])
        else pd.Series(dtype=float)
    )
    if extra.empty:
        return ""
    told = ", ".join(
        f"{value:+.0%} ({tokens} token{'s' * (tokens > 1)} after {prefix:,})"
        for (tokens, prefix), value in extra.items()
    )
    return f"A draft step of `hybrid` against one of `hidden` there: {told}; the paper reports {PAPER_PRICE[0]:.0%} to {PAPER_PRICE[1]:.0%}."
