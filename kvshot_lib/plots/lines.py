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
from .labels import name_ends
from .style import STYLE, WIDTH, look

MOST_LINES = 7  # more in one panel can't be told apart
ACROSS = 4  # panels in a row
SOLID, DASHED = ("-", None), ((0, (3, 2)), "white")  # dashes, and the marker's filling


@mpl.rc_context(STYLE)
def lines(
    table: pd.DataFrame, x: str, y: str = "value", *, by: str = "variant", panels: str | None = None,
    dashes: str | None = None, xlabel: str = "", ylabel: str = "", title: str | Mapping = "", logx: bool = False,
    logy: bool = False, level: float | None = None, ylim: tuple[float | None, float | None] = (None, None),
    ticks: Sequence | None = None, share_x: bool = True, legend: bool | None = None,
    looks: Callable[[str], tuple[str, str]] = look, height: float = 3.6,
) -> Figure:  # fmt: skip
    """Lines over ``x`` with bands from ``low`` to ``high``; thick bars are the range over seeds.

    Parameters
    ----------
    table : a row a point, in the order of panels. Bands (``low``, ``high``) and bars (``seed_low``, ``seed_high``) are
        drawn where it has them.
    x, y : columns of the axes. An ``x`` of words (bins, say) is drawn in the order in which they stand in the table.
    by : column that has a line for each value, at most `MOST_LINES`; ``looks`` gives its (colour, marker).
    panels : column that has a panel for each value, `ACROSS` a row; ``title`` may map values to titles.
    dashes : column whose first value is drawn solid and whose second is drawn dashed, with open markers.
    level : a dashed level line: 0 for differences, 1 for ratios.
    ticks : values of the x axis that are written.
    share_x : whether all panels have the same x axis.
    legend : names above the picture, not at the lines' ends; by default where there are more than three panels.
    height : inches of one row of panels.

    Raises
    ------
    StudyError : nothing to draw, or too many lines.
    """
    if not len(table):
        raise StudyError("nothing to draw: the table is empty")
    names = in_study_order(table[by]) if by == "variant" else list(dict.fromkeys(table[by]))
    if len(names) > MOST_LINES and panels != by:
        raise StudyError(f"{len(names)} lines can't be told apart: choose at most {MOST_LINES}")
    words = list(dict.fromkeys(table[x])) if not pd.api.types.is_numeric_dtype(table[x]) else []
    values = list(dict.fromkeys(table[panels])) if panels else [None]
    rows, across = -(-len(values) // ACROSS), min(ACROSS, len(values))
    figure = Figure(figsize=(WIDTH, 0.4 + height * rows), layout="constrained")
    grid = figure.subplots(rows, across, sharex=share_x, sharey=True, squeeze=False)
    kinds = [*dict.fromkeys(table[dashes])] if dashes else [None]
    if len(kinds) > 2:
        raise StudyError(f"{len(kinds)} kinds of {dashes} can't be told apart by dashes: choose at most 2")
    styles = dict(zip(kinds, (SOLID, DASHED)))
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
                    _line(axes, np.asarray(at), line, y, looks(str(name)), style)
                    ends[axes].append((at[-1], line[y].iloc[-1], str(name), looks(str(name))[0]))
    for axes in list(grid.flat)[len(values) :]:
        axes.set_axis_off()
    for axes, value in zip(grid.flat, values):  # once every line is in place: a limit that is set once stays
        told = title.get(value, value) if isinstance(title, Mapping) else title or value
        axes.set(title=told or "", xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        axes.set_ylim(*ylim)
        axes.grid(axis="x", visible=False)
        if level is not None:
            axes.axhline(level, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
        if words or ticks is not None:
            _tick(axes, words, ticks, across)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    figure.supxlabel(xlabel, fontsize=10)
    legend = len(values) > 3 if legend is None else legend
    handles = []
    if len(names) > 1 and not legend:
        for axes, own in ends.items():
            name_ends(axes, own, height - 0.7)
    elif len(names) > 1 and panels != by:
        handles = [_handle(looks(str(name)), SOLID, name) for name in names]
    if dashes:
        handles += [_handle(("#555555", "o"), style, kind.replace("_", " ")) for kind, style in styles.items()]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)))
    return figure


def _line(axes: Axes, at: np.ndarray, line: pd.DataFrame, y: str, look_: tuple[str, str], style: tuple) -> None:
    """One line with its band, its bars over seeds and its markers."""
    (colour, marker), (dash, face) = look_, style
    if {"low", "high"} <= set(line) and line["low"].notna().any():
        axes.fill_between(at, line["low"].to_numpy(float), line["high"].to_numpy(float), color=colour, alpha=0.15, lw=0)
        if len(at) == 1:
            axes.vlines(at, line["low"], line["high"], color=colour, lw=1.8)
    if {"seed_low", "seed_high"} <= set(line):
        axes.vlines(at, line["seed_low"], line["seed_high"], color=colour, lw=5, alpha=0.35)
    axes.plot(at, line[y], color=colour, ls=dash, marker=marker, ms=5, mfc=face or colour, clip_on=False)


def _tick(axes: Axes, words: list[str], ticks: Sequence | None, across: int) -> None:
    """Write the words, or the values of ``ticks``; slanted where many stand in a row."""
    axes.set_xticks(range(len(words)) if words else ticks, words or [f"{tick:,g}" for tick in ticks])
    axes.tick_params(axis="x", rotation=40 if len("".join(words)) > 60 / across else 0)
    axes.minorticks_off()


def _handle(look_: tuple[str, str], style: tuple, label: str) -> Line2D:
    (colour, marker), (dash, face) = look_, style
    return Line2D([], [], color=colour, ls=dash, marker=marker, ms=5, mfc=face or colour, label=str(label))
