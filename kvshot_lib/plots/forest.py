"""Differences (or values) with their intervals, a row each."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import StudyError
from .style import STYLE, WIDTH, look

LINE, MOST = 0.3, 6.8  # inches of a row, and of all rows


@mpl.rc_context(STYLE)
def forest(
    table: pd.DataFrame,
    *,
    label: str,
    group: str | None = None,
    zero: float | None = 0.0,
    told: str | None = None,
    xlabel: str = "",
    title: str = "",
    digits: int = 3,
    looks: Callable[[pd.Series], tuple[str, str]] | None = None,
) -> Figure:
    """A row for each row of the table: name, marker with interval, and the numbers at the right.

    Parameters
    ----------
    table : ``value`` with its interval ``low`` to ``high`` (thin lines), and the range over seeds ``seed_low`` to
        ``seed_high`` (thick ones) where it has it.
    label : column of the rows' names; a name may have several lines.
    group : column by which rows stand together, under its value in bold.
    zero : where the dashed line is; differences are written with their sign if it is 0. None: no line.
    told : column of what is written at the right, by default value and interval.
    looks : (colour, marker) of a row; by default those of its ``variant``, and black without one.

    Raises
    ------
    StudyError : nothing to draw.
    """
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    table = table.reset_index(drop=True)
    looks = looks or (lambda row: look(row["variant"]) if "variant" in row else ("#222222", "o"))
    rows, heads, y = _places(table, [label, *([told] if told else [])], group)
    names = [line for name in table[label] for line in str(name).splitlines()]
    longest = max(len(name) for name in [*names, *(str(head) for _, head in heads)])
    left, right = min(0.48, 0.06 + 0.0091 * longest), 0.78 if told is None else 0.72
    margin = 0.4 if title else 0.1
    height = 0.75 + margin + min(LINE * y, MOST)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left, 0.65 / height, right - left, 1 - (0.65 + margin) / height))
    axes.set_ylim(y - 0.5, -0.5)
    for at, head in heads:
        _write(axes, 0.012, at, head, weight="bold")
    for at, (_, row) in zip(rows, table.iterrows()):
        _write(axes, 0.03 if heads else 0.012, at, row[label])
        if not np.isfinite(row["value"]):
            _write(axes, right + 0.012, at, "not measured", color="#888888")
            continue
        colour, marker = looks(row)
        if "seed_low" in row and np.isfinite(row["seed_low"]):
            axes.hlines(at, row["seed_low"], row["seed_high"], color=colour, lw=8, alpha=0.3)
        axes.hlines(at, row["low"], row["high"], color=colour, lw=1.8)
        axes.plot(row["value"], at, color=colour, marker=marker, ms=5.5)
        sign = "+" if zero == 0 else ""
        numbers = f"{row['value']:{sign}.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        _write(axes, right + 0.012, at, row[told] if told else numbers, color=colour if told else "black")
    if zero is not None:
        axes.axvline(zero, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set(yticks=[], xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.spines["left"].set_visible(False)
    figure.text(0.012, 1 - 0.1 / height, title, va="top", fontsize=10.5)
    return figure


def _places(table: pd.DataFrame, texts: list[str], group: str | None) -> tuple[list[float], list[tuple], float]:
    """Heights of the rows, (height, name) of the groups, and the height of all, in lines of text."""
    rows, heads, y = [], [], 0.0
    for place, row in table.iterrows():
        if group and (place == 0 or row[group] != table[group][place - 1]):
            heads.append((y, row[group]))
            y += 1
        lines = 0.4 + 0.6 * max(len(str(row[name]).splitlines()) for name in texts)
        rows.append(y + (lines - 1) / 2)
        y += lines
    return rows, heads, y


def _write(axes: Axes, x: float, y: float, text: str, **how) -> None:
    """Text at ``x`` of the figure's width, beside the row ``y``."""
    place = {"xycoords": ("figure fraction", "data"), "va": "center", "fontsize": 9.5, "annotation_clip": False}
    axes.annotate(str(text).replace("-0.", "−0."), (x, y), linespacing=1.0, **place, **how)
