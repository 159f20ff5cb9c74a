"""Points in a plane: what a drafter costs against what it yields."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..errors import StudyError
from .labels import name_points
from .style import STYLE, WIDTH, look

MOST_NAMES = 10


@mpl.rc_context(STYLE)
def plane(table: pd.DataFrame, x: str, *, xlabel: str = "", ylabel: str = "", named: list[str] | None = None) -> Figure:
    """A point for each row, its interval, its name (adjustText moves them apart); lines of speedup = value / (1 + x).

    Parameters
    ----------
    table : columns variant, ``x``, value (tokens per target forward) and, for intervals, low and high.
    x : column of the drafting cost, in target forwards.
    named : variants that are written, at most `MOST_NAMES`; all by default. Others are small and pale.

    Raises
    ------
    StudyError : nothing to draw, or too many points to be named.
    """
    table = table.dropna(subset=[x, "value"])
    named = list(dict.fromkeys(table["variant"])) if named is None else [n for n in named if n in set(table["variant"])]
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    if len(named) > MOST_NAMES:
        raise StudyError(f"{len(named)} names can't be read in one figure: choose at most {MOST_NAMES}")
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    FigureCanvasAgg(figure)  # names are placed by their size in pixels
    axes = figure.subplots()
    for _, row in table.iterrows():
        (colour, marker), pale = look(row["variant"]), row["variant"] not in named
        if "low" in row and np.isfinite(row["low"]):
            axes.vlines(row[x], row["low"], row["high"], color=colour, lw=1.6, alpha=0.2 if pale else 0.7)
        axes.plot(
            row[x], row["value"], c=colour, marker=marker, ms=4 if pale else 7, alpha=0.3 if pale else 1, zorder=3
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=False)
    axes.margins(0.12)
    axes.set_xlim(0, None)
    _equal_speedup(axes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    name_points(axes, table, named, x)
    return figure


def _equal_speedup(axes: Axes) -> None:
    """Straight lines of equal speedup s: y = s (1 + x), named where they leave the plane; that of 1 is firmer."""
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    levels = [s for s in np.round(np.arange(0.5, 6.01, 0.1), 1) if s * (1 + right) > low and s < high]
    for s in [s for s in levels if len(levels) <= 12 or round(10 * s) % 2 == 0]:
        axes.plot([0, right], [s, s * (1 + right)], color="#555555" if s == 1 else "#c4c4c4", lw=0.9, zorder=0)
        over = s * (1 + right) > high
        where = {"ha": "center", "va": "bottom", "xytext": (0, 2)} if over else {"va": "center", "xytext": (3, 0)}
        place = (high / s - 1, high) if over else (right, s * (1 + right))
        axes.annotate(f"{s:g}×", place, textcoords="offset points", fontsize=8.5, color="#777777", **where)
    axes.set(xlim=(0, right), ylim=(low, high))
