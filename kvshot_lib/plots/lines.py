"""Lines with bands: one panel or several side by side."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..drafters.variants import in_study_order
from ..errors import StudyError
from .style import STYLE, WIDTH, look

MOST_LINES = 7  # more in one panel can't be told apart
SOLID, DASHED = ("-", None), ((0, (3, 2)), "white")  # dashes, and the marker's filling


@mpl.rc_context(STYLE)
def lines(
    table: pd.DataFrame,
    x: str,
    y: str = "value",
    *,
    by: str = "variant",
    panels: str | None = None,
    dashes: str | None = None,
    low: str = "low",
    high: str = "high",
    xlabel: str = "",
    ylabel: str = "",
    title: str | Mapping = "",
    logx: bool = False,
    logy: bool = False,
    level: float | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    ticks: Sequence | None = None,
    columns: int = 4,
    share_x: bool = True,
    share_y: bool = True,
    legend: bool | None = None,
    looks: Callable[[str], tuple[str, str]] = look,
    height: float = 3.6,
) -> Figure:
    """Lines over ``x`` with bands from ``low`` to ``high``; thick bars are the range over seeds, where the table has it.

    Parameters
    ----------
    table
        One row a point, in the order of panels. Columns that are missing (``low``, ``seed_low`` …) or empty are not drawn.
    x, y
        Columns of the axes. An ``x`` of words (bins, say) is drawn in the order in which they stand in the table.
    by
        Column that has a line for each value, at most `MOST_LINES`; ``looks`` gives its (colour, marker).
    panels
        Column that has a panel for each value, ``columns`` a row; ``title`` may map values to titles.
    dashes
        Column whose first value is drawn solid and whose second is drawn dashed, with open markers.
    level
        A dashed level line: 0 for differences, 1 for ratios.
    ticks
        Values of the x axis that are written.
    share_x, share_y
        Whether all panels have the same axis.
    legend
        Names above the picture instead of at the lines' ends; by default only where there are several panels of single lines.
    height
        Inches of one row of panels.

    Raises
    ------
    StudyError
        If there is nothing to draw or there are too many lines.
    """
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    names = in_study_order(table[by]) if by == "variant" else list(dict.fromkeys(table[by]))
    if len(names) > MOST_LINES and panels != by:
        raise StudyError(f"{len(names)} lines can't be told apart: choose at most {MOST_LINES}")
    words = list(dict.fromkeys(table[x])) if not pd.api.types.is_numeric_dtype(table[x]) else []
    values = list(dict.fromkeys(table[panels])) if panels else [None]
    rows, across = -(-len(values) // columns), min(columns, len(values))
    figure = Figure(figsize=(WIDTH, 0.4 + height * rows), layout="constrained")
    grid = figure.subplots(rows, across, sharex=share_x, sharey=share_y, squeeze=False)
    styles = dict(zip(dict.fromkeys(table[dashes]) if dashes else [None], (SOLID, DASHED)))
    ends: dict[Axes, list] = {}
    for axes, value in zip(grid.flat, values):
        own = table[table[panels] == value] if panels else table
        ends[axes] = []
        for name in names:
            for kind, style in styles.items():
                line = own[(own[by] == name) & (own[dashes] == kind)] if dashes else own[own[by] == name]
                line = line.dropna(subset=[y])
                if len(line):
                    at = [words.index(word) for word in line[x]] if words else line[x].to_numpy(float)
                    _line(axes, np.asarray(at), line, y, low, high, looks(str(name)), style)
                    ends[axes].append((at[-1], line[y].iloc[-1], str(name), looks(str(name))[0]))
    for axes in list(grid.flat)[len(values) :]:
        axes.set_axis_off()
    for axes, value in zip(grid.flat, values):  # once every line is in place: a limit that is set once stays
        told = title.get(value, value) if isinstance(title, Mapping) else title or value
        axes.set(title=told or "", xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        axes.grid(axis="x", visible=False)
        if level is not None:
            axes.axhline(level, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
        if words or ticks is not None:
            shown = range(len(words)) if words else ticks
            axes.set_xticks(shown, words or [f"{tick:,g}" for tick in ticks])
            axes.tick_params(axis="x", rotation=40 if len("".join(words)) > 60 / across else 0)
            axes.minorticks_off()
        axes.set_ylim(*ylim)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    figure.supxlabel(xlabel, fontsize=10)
    _name(figure, ends, styles, dashes, legend, names, looks)
    return figure


def _line(axes: Axes, at: np.ndarray, line: pd.DataFrame, y, low, high, look_, style) -> None:
    """One line with its band, its bars over seeds and its markers."""
    (colour, marker), (dash, face) = look_, style
    if {low, high} <= set(line) and line[low].notna().any():
        axes.fill_between(at, line[low].to_numpy(float), line[high].to_numpy(float), color=colour, alpha=0.15, lw=0)
        if len(at) == 1:
            axes.vlines(at, line[low], line[high], color=colour, lw=1.8)
    if {"seed_low", "seed_high"} <= set(line):
        axes.vlines(at, line["seed_low"], line["seed_high"], color=colour, lw=5, alpha=0.35)
    axes.plot(at, line[y], color=colour, ls=dash, marker=marker, ms=5, mfc=face or colour, clip_on=False)


def _name(figure: Figure, ends, styles, dashes, legend, names, looks) -> None:
    """Names at the ends of the lines, or above the picture."""
    several = len(names) > 1
    if legend is None:
        legend = len(ends) > 3
    handles = []
    if legend and several and any(len({end[2] for end in own}) > 1 for own in ends.values()):
        handles = [Line2D([], [], color=c, marker=m, ms=5, label=n) for n in map(str, names) for c, m in [looks(n)]]
    if dashes:
        handles += [
            Line2D(
                [], [], color="#555555", ls=d, marker="o", ms=5, mfc=f or "#555555", label=str(kind).replace("_", " ")
            )
            for kind, (d, f) in styles.items()
        ]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))
    if not legend and several:
        for axes, own in ends.items():
            _label_ends(axes, own, max(end[0] for end in own))


def _label_ends(axes: Axes, ends: list[tuple], right: float) -> None:
    """Write each line's name right of x = ``right``, (x, y, name, colour) each; names that would overlap move apart.

    A dotted thread leads from the line's end to a name that is not beside it.
    """
    low, high = axes.get_ylim()
    width = right - axes.get_xlim()[0]
    ends = sorted(ends, key=lambda end: end[1])
    gap, limit = 0.065 * (high - low), high
    heights = _spread([y for _, y, _, _ in ends], gap)
    for place in reversed(range(len(heights))):  # none above the axis, where the title is
        heights[place] = min(heights[place], limit)
        limit = heights[place] - gap
    for (x, y, name, colour), height in zip(ends, heights):
        where = (right + 0.055 * width, height)
        axes.annotate(name, where, color=colour, va="center", fontsize=9.5, weight="bold", annotation_clip=False)
        if x < right or abs(y - height) > 0.02 * (high - low):
            thread = ([x, right + 0.045 * width], [y, height])
            axes.plot(*thread, color=colour, lw=0.8, ls=(0, (1, 2)), clip_on=False, scalex=False, scaley=False)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move ascending heights until neighbours are ``gap`` apart; those that collide stay centred on their mean.

    With gap 1: [0, 5, 5.2] becomes [0, 4.6, 5.6].
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _slots(groups[-2], gap)[-1] + gap > _slots(groups[-1], gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [slot for group in groups for slot in _slots(group, gap)]


def _slots(group: list[float], gap: float) -> list[float]:
    return [float(np.mean(group) + gap * (i - (len(group) - 1) / 2)) for i in range(len(group))]
