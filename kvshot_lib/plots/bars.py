"""Bars with intervals, beside each other or stacked."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..errors import StudyError
from .style import PART_COLOURS, STYLE, WIDTH, look


@mpl.rc_context(STYLE)
def bars(
    table: pd.DataFrame,
    *,
    label: str,
    by: str | None = None,
    stack: bool = False,
    zero: float | None = None,
    xlabel: str = "",
    title: str = "",
    colours: Mapping[str, str] = PART_COLOURS,
    digits: int = 2,
) -> Figure:
    """Horizontal bars from 0, a row for each ``label``, its ``value`` written at the end.

    Parameters
    ----------
    label : column of the rows' names, in the table's order; their bars have the look of a variant of that name.
    by : column of several bars in a row: thin ones beneath each other, with intervals ``low`` to ``high``, or with
        ``stack`` one after the other. ``colours`` maps its values to colours.
    zero : where a dashed line is.

    Raises
    ------
    StudyError : nothing to draw.
    """
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    names, kinds = list(dict.fromkeys(table[label])), list(dict.fromkeys(table[by])) if by else [None]
    thin = by is not None and not stack
    step = 0.8 / len(kinds) if thin else 0.62
    figure = Figure(figsize=(WIDTH, 1.3 + max(0.34, 0.2 * len(kinds) * thin) * len(names)), layout="constrained")
    axes, ends, edge = figure.subplots(), dict.fromkeys(names, 0.0), 0.0
    for place, kind in enumerate(kinds):
        for _, row in (table[table[by] == kind] if by else table).iterrows():
            y = names.index(row[label]) + (step * (place - (len(kinds) - 1) / 2) if thin else 0)
            colour = colours.get(kind) if by else None
            start = ends[row[label]] if stack else 0.0
            axes.barh(y, row["value"], left=start, height=0.9 * step, color=colour or look(row[label])[0], alpha=0.85)
            ends[row[label]] = start + np.nan_to_num(row["value"])
            if stack:
                edge = max(edge, ends[row[label]])
                continue
            if np.isfinite(row.get("low", np.nan)):
                axes.hlines(y, row["low"], row["high"], color="#222222", lw=1.6)
            reach = np.nanmax([ends[row[label]], row.get("high", np.nan), 0.0])
            edge = max(edge, reach)
            told = f" {row['value']:.{digits}f}" if np.isfinite(row["value"]) else " not measured"
            axes.text(reach, y, told.replace("-", "−"), va="center", fontsize=9)
    if stack:
        for name, end in ends.items():
            axes.text(end, names.index(name), f" {end:.{digits}f}", va="center", fontsize=9)
    if zero is not None:
        axes.axvline(zero, color="#222222", lw=1, ls=(0, (4, 3)))
    axes.set(title=title, xlabel=xlabel, xlim=(None, 1.15 * edge if edge > 0 else None))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if by:
        boxes = [mpl.patches.Patch(color=colours.get(kind, "#888888"), label=str(kind)) for kind in kinds]
        figure.legend(handles=boxes, loc="outside upper left", ncols=min(6, len(kinds)))
    return figure
