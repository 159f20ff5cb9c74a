"""Sentences of notebook 03 about the whole matrix: depth, ablations, and acceptance along the text."""

import pandas as pd

from ..metrics.axes import AxisDraws, bin_names
from ..metrics.comparisons import ABLATIONS, not_measured
from ..metrics.resampling import Draws, Interval
from ..metrics.tables import in_order
from .matrix import DEPTHS
from .report import names, signed


def depth(draws: Draws, table: pd.DataFrame) -> str:
    """How MAT changes from the shallowest to the deepest `kv` drafter; ``table`` is `figures_matrix.depth_table`'s."""
    absent = [variant for variant in DEPTHS if variant not in draws.variants]
    missing = f" Not run here: {names(absent)}." if absent else ""
    if table.empty:
        return f"Depth needs two of {names(DEPTHS)} or more.{missing}"
    there = [variant for variant in DEPTHS if variant in draws.variants]
    first, last, told = there[0], there[-1], []
    for metric in ("measured_mat", "expected_mat"):
        gap = draws.difference((last, metric), (first, metric))
        told.append(f"{metric.split('_')[0]} MAT of `{last}` is {gap.verdict(0)} that of `{first}`, by {signed(gap)}")
    against = [
        f"measured MAT of `{last}` is {gap.verdict(0)} that of `{other}`, by {signed(gap)}"
        for other in ("hidden", "hybrid")
        if other in draws.variants
        for gap in [draws.difference((last, "measured_mat"), (other, "measured_mat"))]
    ]
    return "\n".join(f"- {line[0].upper()}{line[1:]}." for line in [*told, *against]) + (
        f"\n\n{missing.strip()}" if absent else ""
    )


def ablations(draws: Draws, table: pd.DataFrame) -> str:
    """One sentence for each reference: which changes raise measured MAT, which lower it; ``table`` is `ablation_table`'s.

    A change counts as raising or lowering if the whole interval and every seed are on that side of 0.
    """
    absent, lines = not_measured(draws), []
    for reference in ABLATIONS:
        rows = table[(table["reference"] == reference) & (table["metric"] == "measured_mat")]
        if rows.empty:
            continue
        groups: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable from": []}
        for row in rows.itertuples():
            groups[_verdict(row)].append(f"`{row.variant}` ({signed(Interval(row.value, row.low, row.high))})")
        higher, lower, unclear = (", ".join(found) or "none" for found in groups.values())
        lines.append(
            f"- Against `{reference}`, higher measured MAT: {higher}; lower: {lower}; not distinguishable: {unclear}."
        )
    if absent:
        lines.append(
            f"{'' if not lines else chr(10)}No comparison here for {names(absent)}: they or the drafter they change were not run."
        )
    return "\n".join(lines)


def _verdict(row) -> str:
    """``above`` or ``below`` 0 if the whole interval and all seeds are."""
    verdict = Interval(row.value, row.low, row.high).verdict(0)
    agree = row.seed_low > 0 if verdict == "above" else row.seed_high < 0
    return verdict if agree else "not distinguishable from"


def along(draws: AxisDraws, table: pd.DataFrame, axis: str) -> str:
    """One sentence a variant: acceptance at the last draft step, from the first well-filled bin of an axis to the last."""
    lines, rows = [], table[(table["axis"] == axis) & (table["draft_step"] == table["draft_step"].max())]
    for variant in in_order(rows["variant"]):
        own = rows[rows["variant"] == variant].sort_values("bin_low")
        first, last = own.iloc[0], own.iloc[-1]
        if len(own) < 2:
            continue
        cells = [(variant, axis, row["bin_low"], row["draft_step"]) for row in (last, first)]
        gap = draws.difference(*cells)
        start, end = bin_names([first["bin_low"], last["bin_low"]])
        step = first["draft_step"]
        lines.append(
            f"- `{variant}`, draft step {step}: {last['value']:.3f} at {end}, {gap.verdict(0)} {first['value']:.3f} at {start}, "
            f"by {signed(gap)}."
        )
    return "\n".join(lines) or "No drafter has two bins with enough anchors, so there is nothing to compare."


def not_recorded(runs: pd.DataFrame, axes: pd.DataFrame) -> str:
    """Which runs have no counts along the text; empty if all have."""
    absent = [variant for variant in in_order(runs["variant"]) if variant not in set(axes["variant"])]
    if not absent:
        return ""
    who = "this run" if axes.empty else names(absent)
    return f"Acceptance by generated offset and by context length was not recorded for {who}."
