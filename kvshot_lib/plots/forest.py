"""Differences (or values) with their intervals, a row each."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import StudyError
from .style import STYLE, look


@mpl.rc_context(STYLE)
def forest(
    table: pd.DataFrame,
    *,
    label: str,
    value: str = "value",
    low: str = "low",
    high: str = "high",
    group: str | None = None,
    zero: float | None = 0.0,
    xlabel: str = "",
    title: str = "",
    digits: int = 3,
    looks: Callable[[pd.Series], tuple[str, str]] | None = None,
) -> Figure:
    """A row for each row of the table: its name, marker and interval, and value and interval in figures at the right.

    Thin lines are intervals over documents, thick ones the range over seeds (``seed_low``, ``seed_high``) where the table has it.

    Parameters
    ----------
    label
        Column of the rows' names.
    group
        Column by which rows stand together, under its value in bold.
    zero
        Where the dashed line is; differences are written with their sign if it is 0. None: no line.
    looks
        (colour, marker) of a row; by default those of its ``variant``, and black without one.

    Raises
    ------
    StudyError
        If there is nothing to draw.
    """
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    looks = looks or (lambda row: look(row["variant"]) if "variant" in row else ("#222222", "o"))
    places, heads, y = [], [], 0.0
    for place, (_, row) in enumerate(table.iterrows()):
        if group and (place == 0 or row[group] != table[group].iloc[place - 1]):
            heads.append((y, row[group]))
            y += 1
        places.append(y)
        y += 1
    names = [str(name) for name in table[label]]
    left = min(0.5, 0.05 + 0.0088 * max([*map(len, names), *(0.9 * len(str(head)) for _, head in heads)]))
    height = 1.05 + 0.3 * y + (0.3 if title else 0)
    figure = Figure(figsize=(9.6, height))
    axes = figure.add_axes((left, 0.65 / height, 0.77 - left, 1 - (0.75 + (0.3 if title else 0)) / height))
    beside = {"xycoords": ("figure fraction", "data"), "va": "center", "fontsize": 9.5, "annotation_clip": False}
    for at, head in heads:
        axes.annotate(str(head), (0.015, at), weight="bold", **beside)
    for at, name, (_, row) in zip(places, names, table.iterrows()):
        axes.annotate(name, (0.03 if heads else 0.015, at), **beside)
        if not np.isfinite(row[value]):
            axes.annotate("not measured", (0.785, at), color="#888888", **beside)
            continue
        colour, marker = looks(row)
        if "seed_low" in row and np.isfinite(row["seed_low"]):
            axes.hlines(at, row["seed_low"], row["seed_high"], color=colour, lw=6, alpha=0.35)
        axes.hlines(at, row[low], row[high], color=colour, lw=1.8)
        axes.plot(row[value], at, color=colour, marker=marker, ms=6)
        sign = "+" if zero == 0 else ""
        told = f"{row[value]:{sign}.{digits}f} [{row[low]:.{digits}f}, {row[high]:.{digits}f}]".replace("-", "−")
        axes.annotate(told, (0.785, at), **beside)
    if zero is not None:
        axes.axvline(zero, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set(ylim=(y - 0.4, -0.7), yticks=[], xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.spines["left"].set_visible(False)
    if title:
        figure.text(0.015, 1 - 0.2 / height, title, va="top", fontsize=10.5)
    return figure
