"""What a run of notebook 03's size can't show, with its own numbers, and which of its numbers can be held against the paper's."""

import numpy as np
import pandas as pd

from ..metrics.resampling import Draws
from ..metrics.tables import in_order
from .report import names, span

PAPER_TARGET = "Qwen3-8B"


def absolute(runs: pd.DataFrame) -> str:
    """Why absolute values are not the paper's."""
    targets = " and ".join(_target(name) for name in runs["target"].unique())
    same = {name.lower() for name in runs["target"]} == {PAPER_TARGET.lower()}
    if same:
        return f"The target is the paper's, {PAPER_TARGET}; training data and budget are the study's own."
    return (
        f"**Absolute values differ from the paper's by design**: the target here is {targets}, the paper's is "
        f"{PAPER_TARGET}, with other training data and more of it; what can be compared are signs, orders and shapes."
    )


def limits(runs: pd.DataFrame, draws: Draws, reference: str) -> str:
    """What a run of this size can't show, with its own numbers."""
    documents = int(draws.keys["documents"].max())
    anchors = int(draws.keys.loc[draws.keys["metric"] == "measured_mat", "anchors"].max())
    rare = draws.keys[draws.keys["metric"] == "chain_acceptance"].sort_values("anchors").iloc[0]
    targets = ", ".join(_target(name) for name in runs["target"].unique())
    lines = [
        f"**One target**: {targets}. Another target may order the drafters differently; absolute values belong to it.",
        (
            f"**Short training**: {span(runs['trained_tokens'])} tokens for each drafter; one that learns slowly looks "
            "worse here than it is."
        ),
        (
            f"**Few anchors late in the chain**: {documents} answers have {anchors:,} anchors valid at every step, but "
            f"chain acceptance of `{rare['variant']}` at step {rare['draft_step']} rests on {rare['anchors']:,}."
        ),
    ]
    others = [variant for variant in draws.variants if variant != reference]
    widths = [draws.difference((variant, "retention"), (reference, "retention")) for variant in others]
    widths = [(width.high - width.low) / 2 for width in widths if np.isfinite(width.low)]
    if widths:
        low, high = (f"{edge:.2f}" for edge in (min(widths), max(widths)))
        told = low if low == high else f"{low} to {high}, depending on the drafter,"
        lines.append(f"**Resolution**: a difference in retention of less than about {told} goes unseen.")
    seeds = runs.groupby("variant")["seed"].nunique()
    single = in_order(seeds[seeds < 2].index)
    if single:
        told = names(single) if len(single) <= 4 else f"{len(single)} of {len(seeds)} drafters"
        lines.append(
            f"**One seed** for {told}: the intervals say how other documents would move a number, not how another "
            "training would. Drafters closer to each other than seeds are remain unordered."
        )
    if (seeds > 1).any():
        told = span(seeds[seeds > 1])
        lines.append(
            f"**Few seeds**: {told} for a drafter. Their range is shown beside the intervals and is not part of them, so a "
            "difference smaller than that range may be one of training and not of the drafter."
        )
    starts = runs.get("init_from", pd.Series("", runs.index))
    warm = in_order(runs.loc[starts.notna() & starts.ne(""), "variant"])
    if warm:
        lines.append(
            f"**Longer training behind warm starts**: {names(warm)} went on from a trained drafter, whose tokens are not "
            "in the count above."
        )
    sizes = " to ".join(dict.fromkeys(f"{n / 1e6:.2f}" for n in (runs["parameters"].min(), runs["parameters"].max())))
    lines.append(
        f"**Equal data, not equal cost**: drafters train {sizes} million parameters, and a draft step costs unequal time. "
        "Longer accepted runs are not yet speed."
    )
    outside = runs["out_of_draft_vocab_fraction"].dropna()
    if len(outside):
        lines.append(
            f"**Draft vocabulary** of {span(runs['draft_vocab_size'])} tokens: {_percent(outside)} of the target's "
            "choices lie outside it and count as rejections, a ceiling for every drafter."
        )
    return "\n".join(f"- {line}" for line in lines)


def trained_again(run_lengths: pd.DataFrame, again: pd.DataFrame) -> str:
    """How far a training lands from itself: measured MAT of runs trained a second time with the same seed; empty if none was."""
    key = ["variant", "seed"]
    first, second = (table.groupby(key)[["accepted", "anchors"]].sum() for table in (run_lengths, again))
    moved = (second["accepted"] / second["anchors"] - first["accepted"] / first["anchors"]).dropna()
    if moved.empty:
        return ""
    return (
        f"**The same training twice**: {len(moved)} runs were trained again from scratch with their own seed, on the same kind of "
        f"card. Arithmetic on a GPU does not come out the same twice, and measured MAT moved by {moved.min():+.3f} to "
        f"{moved.max():+.3f} (root mean square {np.sqrt((moved**2).mean()):.3f}). A smaller difference between two single trainings says nothing, "
        "whatever its interval over documents."
    )


def _target(name: str) -> str:
    """The target's name; the default target's weights went through a 4-bit format, which readers must know."""
    return f"`{name}`" + (" (weights Q4_1, dequantised)" if name.startswith("smollm2") else "")


def _percent(fractions: pd.Series) -> str:
    low, high = (f"{100 * edge:.1f}%" for edge in (fractions.min(), fractions.max()))
    return low if low == high else f"{low} to {high}"
