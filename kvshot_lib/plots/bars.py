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
    value: str = "value",
    low: str = "low",
    high: str = "high",
    by: str | None = None,
    stack: bool = False,
    panels: str | None = None,
    zero: float | None = None,
    xlabel: str = "",
    title: str | Mapping = "",
    colours: Mapping[str, str] | None = None,
    digits: int = 2,
) -> Figure:
    """Horizontal bars from 0, a row for each ``label``, its value written at the end.

    Parameters
    ----------
    label
        Column of the rows' names, in the table's order; their bars have the look of a variant of that name.
    by
        Column of several bars in a row: thin ones beneath each other or, with ``stack``, one after the other.
        ``colours`` maps its values to colours (by default `PART_COLOURS`, for parts of a step).
    panels
        Column that has a panel for each value; ``title`` may map values to titles.
    zero
        Where a dashed line is.

    Raises
    ------
    StudyError
        If there is nothing to draw.
    """
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    names, kinds = list(dict.fromkeys(table[label])), list(dict.fromkeys(table[by])) if by else [None]
    values = list(dict.fromkeys(table[panels])) if panels else [None]
    thin = by is not None and not stack
    step = 0.8 / len(kinds) if thin else 0.62
    figure = Figure(figsize=(WIDTH, 1.3 + max(0.34, 0.2 * len(kinds) * thin) * len(names)), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(values), sharey=True, squeeze=False)[0], values):
        own = table[table[panels] == panel] if panels else table
        ends, edge = dict.fromkeys(names, 0.0), 0.0
        for place, kind in enumerate(kinds):
            for _, row in (own[own[by] == kind] if by else own).iterrows():
                y = names.index(row[label]) + (step * (place - (len(kinds) - 1) / 2) if thin else 0)
                colour = (colours or PART_COLOURS).get(kind) if by else None
                start = ends[row[label]] if stack else 0.0
                axes.barh(y, row[value], left=start, height=0.9 * step, color=colour or look(row[label])[0], alpha=0.85)
                ends[row[label]] = start + np.nan_to_num(row[value])
                if low in row and np.isfinite(row[low]) and not stack:
                    axes.hlines(y, row[low], row[high], color="#222222", lw=1.6)
                reach = np.nanmax([ends[row[label]], row.get(high, np.nan), 0.0])
                edge = max(edge, reach)
                if not stack:
                    told = f" {row[value]:.{digits}f}" if np.isfinite(row[value]) else " not measured"
                    axes.text(reach, y, told.replace("-", "−"), va="center", fontsize=9)
        if stack:
            for name, end in ends.items():
                axes.text(end, names.index(name), f" {end:.{digits}f}", va="center", fontsize=9)
        if zero is not None:
            axes.axvline(zero, color="#222222", lw=1, ls=(0, (4, 3)))
        told = title.get(panel, panel) if isinstance(title, Mapping) else title or panel
        axes.set(title=told or "", xlabel=xlabel, xlim=(None, 1.15 * edge if edge > 0 else None))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    if by:
        boxes = [mpl.patches.Patch(color=(colours or PART_COLOURS).get(k, "#888888"), label=str(k)) for k in kinds]
        figure.legend(handles=boxes, loc="outside upper left", ncols=min(6, len(kinds)))
    return figure
