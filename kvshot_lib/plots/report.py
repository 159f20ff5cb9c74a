"""Sentences and tables of notebook 03, written from numbers: what a run shows and what a run of its size can't show.

Every "above", "below" or "not distinguishable" is the verdict of a 95% interval over documents, never typed by hand.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ..drafters.variants import VARIANTS
from ..errors import StudyError
from ..metrics.resampling import Draws, Interval
from ..metrics.tables import in_order

LEAST_ANCHORS = 50


def markdown_table(rows: Iterable[Iterable], header: list[str]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def require_variant(draws: Draws, reference: str) -> None:
    """Refuse a reference variant that was not measured, naming those that were."""
    if reference not in draws.variants:
        raise StudyError(
            f"reference_variant={reference!r} is not in the tables: choose one of {', '.join(draws.variants)}, or "
            "train it with notebooks/03_train_drafter.ipynb and collect the tables again"
        )


def drafters(runs: pd.DataFrame) -> str:
    """What was trained: a row per variant, and a sentence about the variants of the study that were not run."""
    rows = []
    for variant in in_order(runs["variant"]):
        own = runs[runs["variant"] == variant]
        one = own.iloc[0]
        size, seconds = f"{one['parameters'] / 1e6:.2f} M", f"{own['train_s'].mean():.0f} s"
        seeds = ", ".join(str(seed) for seed in sorted(own["seed"]))
        tokens, device = span(own["trained_tokens"]), f"{' and '.join(dict.fromkeys(own['device']))}, {one['dtype']}"
        rows.append([f"`{variant}`", one["paradigm"], one["num_layers"], size, tokens, seconds, seeds, device])
    header = ["variant", "paradigm", "layers", "parameters", "trained tokens", "training", "seeds", "device"]
    absent = [f"`{variant}`" for variant in VARIANTS if variant not in set(runs["variant"])]
    told = f"Not run here: {', '.join(absent)}." if absent else "Every variant of the study was run."
    return f"{markdown_table(rows, header)}\n\n{told}"


def acceptance(draws: Draws, only: Iterable[str] | None = None) -> str:
    """The result table: acceptance at the first, middle and last step, retention and MAT, with intervals (``only`` some variants)."""
    last = int(draws.keys["draft_step"].max())
    steps = sorted({0, last // 2, last})
    columns = [("step_acceptance", step) for step in steps]
    columns += [(name, None) for name in ("retention", "chain_retention", "expected_mat", "measured_mat")]
    variants, symbols = in_order(only or draws.variants), [f"$\\alpha_{{{step}}}$" for step in steps]
    rows = [[f"`{variant}`", *(_cell(draws, variant, *column) for column in columns)] for variant in variants]
    header = ["variant", *symbols, "retention", "chain retention", "expected MAT", "measured MAT"]
    return markdown_table(rows, header)


def decay(draws: Draws, variants: Iterable[str] | None = None) -> str:
    """One sentence for each of ``variants`` (all by default): does its step acceptance decay?"""
    last = int(draws.keys["draft_step"].max())
    told = {
        "below": "it **decays** (the whole interval is below 1)",
        "above": "it **rises** (the whole interval is above 1)",
        "not distinguishable from": "**no decay** can be told from chance (the interval holds 1)",
    }
    lines = []
    for variant in in_order(variants or draws.variants):
        first, end = (draws.mean(variant, "step_acceptance", step) for step in (0, last))
        kept = draws.mean(variant, "retention")
        verdict = told[kept.verdict(1)] if np.isfinite(kept.low) else "**too few matches** for an interval"
        lines.append(f"- `{variant}` goes from {first} at step 0 to {end} at step {last}. Retention {kept}: {verdict}.")
    if "none_1" in (variants or draws.variants):
        kept = draws.mean("none_1", "retention").value
        lines.append(
            "\n`none_1` reads no target state, so what it predicts at anchor $t$, step $k$ is what it predicts at anchor "
            f"$t + k$, step 0. Its retention of {kept:.3f} has one cause: later steps are judged at later places of the answer, "
            f"which are {'harder' if kept < 1 else 'no harder'} on average. About as much of any other drafter's change is not decay."
        )
    return "\n".join(lines)


def gaps(draws: Draws, reference: str, variants: Iterable[str] | None = None) -> str:
    """One sentence for each other variant (of ``variants``): at which steps it is above the reference or below, and its retention."""
    steps = range(int(draws.keys["draft_step"].max()) + 1)
    lines = []
    for variant in in_order(variants or draws.variants):
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
            f"`{reference}`, by {signed(kept)}."
        )
    return "\n".join(lines) or f"Only `{reference}` was measured, so there is nothing to compare it with."


def lengths(draws: Draws, reference: str, variants: Iterable[str] | None = None) -> str:
    """One sentence a variant (of ``variants``): measured against expected MAT, and against the reference."""
    lines = []
    for variant in in_order(variants or draws.variants):
        bias = draws.difference((variant, "measured_mat"), (variant, "expected_mat"))
        measured = draws.mean(variant, "measured_mat")
        line = f"- `{variant}`: measured {measured}, {bias.verdict(0)} its product of marginals, by {signed(bias)}."
        if variant != reference:
            gap = draws.difference((variant, "measured_mat"), (reference, "measured_mat"))
            line += f" It is {gap.verdict(0)} that of `{reference}`, by {signed(gap)}."
        lines.append(line)
    return "\n".join(lines)


def in_short(draws: Draws, reference: str, variants: Iterable[str] | None = None) -> str:
    """The answer to the question in two sentences: who retains more than the reference, and who drafts longer runs.

    Drafters that are not among ``variants`` (all by default) are counted, not named.
    """
    named = set(variants or draws.variants)
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
            groups[draws.difference((variant, metric), (reference, metric)).verdict(0)].append(variant)
        more, less, unclear = (_named_or_counted(found, named) for found in groups.values())
        told.append(
            f"Compared with `{reference}`, these {better}: {more}; these {worse}: {less}; "
            f"not distinguishable: {unclear}."
        )
    return "\n\n".join(told)


def span(numbers: pd.Series) -> str:
    """Equal numbers as one, others as their range."""
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _named_or_counted(variants: list[str], named: set[str]) -> str:
    """Names of those in ``named``, then how many others: "`kv_1` and 3 others"."""
    known = [f"`{variant}`" for variant in variants if variant in named]
    others = len(variants) - len(known)
    counted = [f"{others} other{'s' * (others > 1)}"] if others else []
    return " and ".join([", ".join(known)] * bool(known) + counted) or "none"


def signed(found: Interval) -> str:
    return str(found) if found.value < 0 else f"+{found}"


def names(variants: Iterable[str]) -> str:
    """Variants in code type, or ``none``."""
    return ", ".join(f"`{variant}`" for variant in variants) or "none"


def _cell(draws: Draws, variant: str, metric: str, draft_step: int | None) -> str:
    """An interval on two lines, for a table; no number where it would rest on fewer than ``LEAST_ANCHORS`` anchors."""
    if draws.anchors(variant, metric, draft_step) < LEAST_ANCHORS:
        return "too few<br>anchors"
    return str(draws.mean(variant, metric, draft_step)).replace(" [", "<br>[")


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
