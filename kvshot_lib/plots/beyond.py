"""Figures of notebook 09: budgets, one change at a time, cost against depth, and the plane of acceptance and drafting cost."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from ..drafters.variants import CURES
from ..metrics.tables import in_order
from .style import STYLE, look

FAMILY_LOOKS = {
    "kv_N": ("#D55E00", "s"),
    "kv_N_from_hidden": ("#1c5d99", "s"),
    "kv_N_with_hidden": ("#7f9a2c", "s"),
    "block_kv_N": ("#CC79A7", "^"),
    "block_hidden_N": ("#5b6fb5", "v"),
    "block_both_N": ("#8064a2", "<"),
}
AROUND = [
    (np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 16, endpoint=False)
]  # directions that a label may lie in
DISTANCES = (6, 10, 15, 21, 28, 37, 48, 60, 75, 92, 112, 135, 160)  # from its point, in points of type


@mpl.rc_context(STYLE)
def draw_budgets(table: pd.DataFrame) -> Figure:
    """Validation MAT by trained tokens and by training FLOPs; ``table`` is `beyond.budget_table` of a few variants."""
    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for variant in in_order(table["variant"]):
        colour, marker = look(variant)
        dashes = (0, (4, 2)) if variant.endswith(("all_anchors", "equal_compute")) else "-"
        for _, line in table[table["variant"] == variant].groupby("seed"):
            line = line.sort_values("step")
            left.plot(line["trained_tokens"] / 1e6, line["value"], color=colour, marker=marker, ms=4.5, ls=dashes)
            right.plot(line["flops"] / 1e15, line["value"], color=colour, marker=marker, ms=4.5, ls=dashes)
        left.plot([], [], color=colour, marker=marker, ms=4.5, ls=dashes, label=variant)
    left.set(xlabel="trained tokens, millions", ylabel="MAT on validation documents", xlim=(0, None))
    left.set_title("Equal tokens")
    right.set(xlabel="training FLOPs so far, 10$^{15}$ (counted)", xlim=(0, None))
    right.set_title("Equal compute")
    figure.legend(loc="outside lower center", ncols=5)
    return figure


@mpl.rc_context(STYLE)
def draw_pairs(table: pd.DataFrame) -> Figure:
    """Forest plot of `beyond.pair_table`: a group's comparisons under its name; what lacks a run says so."""
    lines: list[tuple[str, int | None]] = []
    for group in table["group"].unique():
        lines += [(group, None), *((group, place) for place in table.index[table["group"] == group])]
    height = 1.0 + 0.29 * len(lines)
    figure = Figure(figsize=(10.8, height))
    axes = figure.add_axes((0.5, 0.62 / height, 0.31, 1 - 0.75 / height))
    beside = {"xycoords": axes.get_yaxis_transform(), "va": "center", "fontsize": 9.5, "annotation_clip": False}
    for y, (group, place) in enumerate(lines):
        if place is None:
            axes.annotate(group, (-1.58, y), weight="bold", **beside)
            continue
        row = table.loc[place]
        told = row["variant"] if group == f"Minus {row['reference']}" else f"{row['variant']} − {row['reference']}"
        axes.annotate(told, (-1.54, y), **beside)
        if np.isnan(row["value"]):
            axes.annotate("not run", (1.04, y), color="#999999", **beside)
            continue
        colour, marker = look(row["variant"])
        axes.hlines(y, row["low"], row["high"], color=colour, lw=2.2)
        axes.plot(row["value"], y, color=colour, marker=marker, ms=6)
        axes.annotate(
            f"{row['value']:+.3f} [{row['low']:.3f}, {row['high']:.3f}]".replace("-", "−"), (1.04, y), **beside
        )
    axes.axvline(0, color="#222222", lw=1, ls=(0, (4, 3)))
    axes.set(ylim=(len(lines) - 0.4, -0.7), yticks=[], xlabel="difference of measured MAT, same documents")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.spines["left"].set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def draw_depth(table: pd.DataFrame) -> Figure:
    """Drafting cost (counted bytes) and measured MAT by the drafter's layers; ``table`` is `beyond.depth_table`."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for family, (colour, marker) in FAMILY_LOOKS.items():
        own = table[table["family"] == family].sort_values("num_layers")
        if own.empty:
            continue
        left.plot(own["num_layers"], own["bytes_ratio"], color=colour, marker=marker, label=family)
        right.vlines(own["num_layers"], own["low"], own["high"], color=colour, lw=2)
        right.plot(own["num_layers"], own["value"], color=colour, marker=marker)
    left.set(ylim=(0, None), xlabel="decoder layers N", ylabel="bytes of a chain of 7 /\nbytes of a target forward")
    left.set_title("Drafting cost, counted")
    right.set(xlabel="decoder layers N", ylabel="tokens per target forward")
    right.set_title("Measured MAT, 95% interval over documents")
    left.set_xticks(sorted(table["num_layers"].unique()))
    for axes in (left, right):
        axes.grid(axis="x", visible=False)
    left.legend()
    return figure


@mpl.rc_context(STYLE)
def draw_plane(table: pd.DataFrame, cost: str, xlabel: str, ylabel: str) -> Figure:
    """Every drafter in the plane of drafting cost and tokens per target forward, over lines of equal speedup = MAT / (1 + cost).

    ``table`` has variant, value, low, high and the column ``cost``: the cost of a chain over that of one target forward. Cures of the warm hybrid
    lie around it and are not named.
    """
    figure = Figure(figsize=(9.6, 8.2), layout="constrained")
    FigureCanvasAgg(figure)  # labels are placed by their size in pixels
    axes = figure.subplots()
    right, low, high = _limits(table, cost)
    axes.set(xlim=(0, right), ylim=(low, high), xlabel=xlabel, ylabel=ylabel)
    axes.grid(visible=False)
    _iso_lines(axes, right, low, high)
    for row in table.itertuples():
        colour, marker = look(row.variant)
        axes.vlines(getattr(row, cost), row.low, row.high, color=colour, lw=1.6, alpha=0.6)
        axes.plot(getattr(row, cost), row.value, color=colour, marker=marker, ms=6.5, mec="white", mew=0.5, zorder=4)
    families = {
        "hidden states": "hidden",
        "KV cache": "kv_2",
        "both, gated": "hybrid",
        "KV made of hidden states": "states_4",
        "KV of both": "both_4",
        "a block at once": "block_kv_2",
    }
    if "X" in {look(v)[1] for v in table["variant"]}:
        families["control"] = "kv_2_zero"
    if cures := [v for v in table["variant"] if v in CURES]:
        families[f"{len(cures)} cures, unnamed"] = cures[0]
    handles = [
        Line2D([], [], color=look(v)[0], marker=look(v)[1], ls="none", label=name) for name, v in families.items()
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=-(-len(handles) // 2), columnspacing=1.4, handletextpad=0.3
    )
    _place_labels(figure, axes, table, cost)
    return figure


def _limits(table: pd.DataFrame, cost: str) -> tuple[float, float, float]:
    """Right, lower and upper end of the plane, with room for labels."""
    low, high = np.nanmin(table["low"].fillna(table["value"])), np.nanmax(table["high"].fillna(table["value"]))
    margin = 0.08 * (high - low) + 0.02
    return 1.18 * table[cost].max() + 0.02, low - margin, high + margin


def _iso_lines(axes: Axes, right: float, low: float, high: float) -> None:
    """Straight lines of equal speedup s: MAT = s (1 + cost), each named where it leaves the plane; the line of 1 is drawn firmer."""
    levels = [level for level in np.round(np.arange(0.5, 6.01, 0.1), 1) if level * (1 + right) > low and level < high]
    every = 2 if len(levels) > 12 else 1
    for level in [level for level in levels if round(10 * level) % every == 0]:
        axes.plot(
            [0, right],
            [level, level * (1 + right)],
            color="#b8b8b8" if level != 1 else "#555555",
            lw=0.9 if level != 1 else 1.4,
            zorder=0,
        )
        over_top = level * (1 + right) > high
        place = ((high / level - 1), high) if over_top else (right, level * (1 + right))
        where = (
            {"ha": "center", "va": "bottom", "xytext": (0, 2)}
            if over_top
            else {"ha": "left", "va": "center", "xytext": (3, 0)}
        )
        axes.annotate(
            f"{level:g}×",
            place,
            textcoords="offset points",
            fontsize=8.5,
            color="#777777",
            annotation_clip=False,
            **where,
        )


def _place_labels(figure: Figure, axes: Axes, table: pd.DataFrame, cost: str) -> None:
    """Write each point's name (but a cure's) at the nearest free place around it; a thread leads to a name that is not beside its point.

    Free is what no other name, no point and no edge of the plane covers. Points that have least room come first.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer, frame, dot = figure.canvas.get_renderer(), axes.get_window_extent(), figure.dpi / 72
    spots = {row.variant: axes.transData.transform((getattr(row, cost), row.value)) for row in table.itertuples()}
    taken = [Bbox.from_bounds(x - 4 * dot, y - 4 * dot, 8 * dot, 8 * dot) for x, y in spots.values()]
    for row in table.dropna(subset=["low", "high"]).itertuples():
        ends = axes.transData.transform([(getattr(row, cost), row.low), (getattr(row, cost), row.high)])
        taken.append(Bbox(ends).padded(dot))
    crowd = {v: sum(np.hypot(*(spot - other)) < 45 * dot for other in spots.values()) for v, spot in spots.items()}
    to_data = axes.transData.inverted()
    for variant in sorted((v for v in spots if v not in CURES), key=lambda v: (-crowd[v], spots[v][1])):
        colour, spot = look(variant)[0], spots[variant]
        text = axes.text(0, 0, variant, fontsize=8, color=colour, weight="bold", va="bottom", zorder=6)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        size = text.get_window_extent(renderer)
        box = _free_place(spot, size.width, size.height, taken, frame, dot)
        text.set_position(to_data.transform((box.x0, box.y0)))
        taken.append(box)
        end = np.clip(spot, (box.x0, box.y0), (box.x1, box.y1))
        if np.hypot(*(end - spot)) > 7 * dot:
            axes.plot(*to_data.transform([spot, end]).T, color=colour, lw=0.6, alpha=0.8, zorder=3)


def _free_place(spot: np.ndarray, width: float, height: float, taken: list[Bbox], frame: Bbox, dot: float) -> Bbox:
    """The label's box at the first free place, by growing distance; if nowhere is free, the one that covers least."""
    least, fallback = np.inf, Bbox.from_bounds(*spot, width, height)
    for distance in DISTANCES:
        for across, up in AROUND:
            x = spot[0] + distance * dot * across - width * (1 - across) / 2
            y = spot[1] + distance * dot * up - height * (1 - up) / 2
            box = Bbox.from_bounds(x, y, width, height)
            if box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1:
                continue
            covered = sum(box.padded(dot).overlaps(other) for other in taken)
            if not covered:
                return box
            if covered < least:
                least, fallback = covered, box
    return fallback
