"""Sentences and tables of notebook 03, written from numbers: what a run shows and what a run of its size can't show.

Every "above", "below" or "not distinguishable" is the verdict of a 95% interval over documents, never typed by hand.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .bootstrap import Draws, Interval
from .errors import StudyError
from .figures import LEAST_ANCHORS
from .tables import VARIANTS, in_order


def markdown_table(rows: Iterable[Iterable], header: list[str]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def require_variant(draws: Draws, reference: str) -> None:
    """Refuse a reference variant that was not measured, naming those that were."""
    if reference not in draws.variants:
        raise StudyError(
            f"reference_variant={reference!r} is not in the tables: choose one of {', '.join(draws.variants)}, or "
            "train it with notebooks/02_train_drafter.ipynb and collect the tables again"
        )


def drafters(runs: pd.DataFrame) -> str:
    """What was trained: a row per variant, and a sentence about the variants of the study that were not run."""
    rows = []
    for variant in in_order(runs["variant"]):
        own = runs[runs["variant"] == variant]
        one = own.iloc[0]
        size, seconds = f"{one['parameters'] / 1e6:.2f} M", f"{own['train_s'].mean():.0f} s"
        seeds, device = ", ".join(str(seed) for seed in sorted(own["seed"])), f"{one['device']}, {one['dtype']}"
        tokens = _span(own["trained_tokens"])
        rows.append([f"`{variant}`", one["paradigm"], one["num_layers"], size, tokens, seconds, seeds, device])
    header = ["variant", "paradigm", "layers", "parameters", "trained tokens", "training", "seeds", "device"]
    absent = [f"`{variant}`" for variant in VARIANTS if variant not in set(runs["variant"])]
    told = f"Not run here: {', '.join(absent)}." if absent else "Every variant of the study was run."
    return f"{markdown_table(rows, header)}\n\n{told}"


def acceptance(draws: Draws) -> str:
    """The result table: acceptance at the first, middle and last step, retention and MAT, with intervals."""
    last = int(draws.keys["draft_step"].max())
    steps = sorted({0, last // 2, last})
    columns = [("step_acceptance", step) for step in steps]
    columns += [(name, None) for name in ("retention", "chain_retention", "expected_mat", "measured_mat")]
    variants, symbols = in_order(draws.variants), [f"$\\alpha_{{{step}}}$" for step in steps]
    rows = [[f"`{variant}`", *(_cell(draws, variant, *column) for column in columns)] for variant in variants]
    header = ["variant", *symbols, "retention", "chain retention", "expected MAT", "measured MAT"]
    return markdown_table(rows, header)


def decay(draws: Draws) -> str:
    """One sentence a variant: does its step acceptance decay?"""
    last = int(draws.keys["draft_step"].max())
    told = {
        "below": "it **decays** (the whole interval is below 1)",
        "above": "it **rises** (the whole interval is above 1)",
        "not distinguishable from": "**no decay** can be told from chance (the interval holds 1)",
    }
    lines = []
    for variant in in_order(draws.variants):
        first, end = (draws.mean(variant, "step_acceptance", step) for step in (0, last))
        kept = draws.mean(variant, "retention")
        verdict = told[kept.verdict(1)] if np.isfinite(kept.low) else "**too few matches** for an interval"
        lines.append(f"- `{variant}` goes from {first} at step 0 to {end} at step {last}. Retention {kept}: {verdict}.")
    return "\n".join(lines)


def gaps(draws: Draws, reference: str) -> str:
    """One sentence for each other variant: at which steps it is above the reference or below, and its retention."""
    steps = range(int(draws.keys["draft_step"].max()) + 1)
    lines = []
    for variant in in_order(draws.variants):
        if variant == reference:
            continue
        verdicts = {
            step: draws.difference((variant, "step_acceptance", step), (reference, "step_acceptance", step)).verdict(0)
            for step in steps
        }
        parts = [
            f"{verdict} `{reference}` at {_steps([k for k in steps if verdicts[k] == verdict])}"
            for verdict in ("below", "above", "not distinguishable from")
            if verdict in verdicts.values()
        ]
        kept = draws.difference((variant, "retention"), (reference, "retention"))
        lines.append(
            f"- `{variant}`: step acceptance is {', '.join(parts)}. Its retention is {kept.verdict(0)} that of "
            f"`{reference}`, by {_signed(kept)}."
        )
    return "\n".join(lines) or f"Only `{reference}` was measured, so there is nothing to compare it with."


def lengths(draws: Draws, reference: str) -> str:
    """One sentence a variant: measured against expected MAT, and against the reference."""
    lines = []
    for variant in in_order(draws.variants):
        bias = draws.difference((variant, "measured_mat"), (variant, "expected_mat"))
        measured = draws.mean(variant, "measured_mat")
        line = f"- `{variant}`: measured {measured}, {bias.verdict(0)} its product of marginals, by {_signed(bias)}."
        if variant != reference:
            gap = draws.difference((variant, "measured_mat"), (reference, "measured_mat"))
            line += f" It is {gap.verdict(0)} that of `{reference}`, by {_signed(gap)}."
        lines.append(line)
    return "\n".join(lines)


def in_short(draws: Draws, reference: str) -> str:
    """The answer to the question in two sentences: who retains more than the reference, and who drafts longer runs."""
    others = [variant for variant in in_order(draws.variants) if variant != reference]
    if not others:
        return gaps(draws, reference)
    told = []
    for metric, better, worse in (
        ("retention", "retain more of their step acceptance", "retain less"),
        ("measured_mat", "have longer accepted runs", "have shorter ones"),
    ):
        groups: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable from": []}
        for variant in others:
            groups[draws.difference((variant, metric), (reference, metric)).verdict(0)].append(f"`{variant}`")
        more, less, unclear = (", ".join(names) or "none" for names in groups.values())
        told.append(
            f"Compared with `{reference}`, these {better}: {more}; these {worse}: {less}; "
            f"not distinguishable: {unclear}."
        )
    return "\n\n".join(told)


def limits(runs: pd.DataFrame, draws: Draws, reference: str) -> str:
    """What a run of this size can't show, with its own numbers."""
    documents = int(draws.keys["documents"].max())
    anchors = int(draws.keys.loc[draws.keys["metric"] == "measured_mat", "anchors"].max())
    rare = draws.keys[draws.keys["metric"] == "chain_acceptance"].sort_values("anchors").iloc[0]
    targets = ", ".join(_target(name) for name in runs["target"].unique())
    lines = [
        f"**One target**: {targets}. Another target may order the drafters differently; absolute values belong to it.",
        (
            f"**Short training**: {_span(runs['trained_tokens'])} tokens for each drafter; one that learns slowly looks "
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
        lines.append(f"**Resolution**: a difference in retention of less than about {max(widths):.2f} goes unseen.")
    seeds = runs.groupby("variant")["seed"].nunique()
    single = ", ".join(f"`{variant}`" for variant in in_order(seeds[seeds < 2].index))
    if single:
        lines.append(
            f"**One seed** for {single}: the intervals say how other documents would move a number, not how another "
            "training would. Drafters closer to each other than seeds are remain unordered."
        )
    if (seeds > 1).any():
        lines.append("**Few seeds**: their range is shown beside the intervals and is not part of them.")
    sizes = " to ".join(f"{edge / 1e6:.2f}" for edge in (runs["parameters"].min(), runs["parameters"].max()))
    lines.append(
        f"**Equal data, not equal cost**: drafters train {sizes} million parameters, and a draft step costs unequal time. "
        "Longer accepted runs are not yet speed."
    )
    outside = runs["out_of_draft_vocab_fraction"].dropna()
    if len(outside):
        lines.append(
            f"**Draft vocabulary** of {_span(runs['draft_vocab_size'])} tokens: {_percent(outside)} of the target's "
            "choices lie outside it and count as rejections, a ceiling for every drafter."
        )
    return "\n".join(f"- {line}" for line in lines)


def _target(name: str) -> str:
    """The target's name; the default target's weights went through a 4-bit format, which readers must know."""
    return f"`{name}`" + (" (weights Q4_1, dequantised)" if name.startswith("smollm2") else "")


def _span(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _percent(fractions: pd.Series) -> str:
    low, high = (f"{100 * edge:.1f}%" for edge in (fractions.min(), fractions.max()))
    return low if low == high else f"{low} to {high}"


def _cell(draws: Draws, variant: str, metric: str, draft_step: int | None) -> str:
    """An interval on two lines, for a table; no number where it would rest on fewer than ``LEAST_ANCHORS`` anchors."""
    if draws.anchors(variant, metric, draft_step) < LEAST_ANCHORS:
        return "too few<br>anchors"
    return str(draws.mean(variant, metric, draft_step)).replace(" [", "<br>[")


def _signed(found: Interval) -> str:
    return str(found) if found.value < 0 else f"+{found}"


def _steps(steps: list[int]) -> str:
    """Name draft steps with ranges: [0] → step 0; [0, 1, 2, 5] → steps 0-2, 5."""
    groups: list[list[int]] = []
    for step in steps:
        if groups and groups[-1][-1] == step - 1:
            groups[-1].append(step)
        else:
            groups.append([step])
    ranges = [str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(ranges)}"
