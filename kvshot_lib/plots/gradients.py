"""Figures of notebook 05: gradient norms, draft-side share and attention, Adam's steps, and the gate (style: `figures`)."""

from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..drafters.variants import CURES
from ..metrics.gradients import CLAIM_AT
from ..metrics.tables import in_order
from .style import STYLE, look

# Places of the norm figure: (matrix, side) and what it is called.
PLACES = {
    ("q_proj", "draft"): "q",
    ("o_proj", "draft"): "o",
    ("k_proj", "draft"): "k\ndraft",
    ("v_proj", "draft"): "v\ndraft",
    ("k_proj", "prefix"): "k\nprefix",
    ("v_proj", "prefix"): "v\nprefix",
    ("fusion.keys", "prefix"): "fusion\nkeys",
    ("fusion.values", "prefix"): "fusion\nvalues",
}
PROJECTIONS = {
    "q_proj": ("q", "#0072B2"),
    "o_proj": ("o", "#56B4E9"),
    "k_proj": ("k", "#D55E00"),
    "v_proj": ("v", "#E69F00"),
    "fusion.keys": ("fusion, keys", "#666666"),
    "fusion.values": ("fusion, values", "#aaaaaa"),
}
LINES = {"self": (0, (4, 2)), "cross": "-"}


@mpl.rc_context(STYLE)
def draw_missing(told: str) -> Figure:
    """A figure that says what is missing, in the place of the one that can't be drawn."""
    figure = Figure(figsize=(9.6, 1.6))
    figure.text(0.5, 0.5, told, ha="center", va="center", color="#777777", fontsize=10.5, wrap=True)
    return figure


@mpl.rc_context(STYLE)
def draw_norms(table: pd.DataFrame) -> Figure:
    """Gradient per parameter and per entry, a place for each matrix and side; ``table`` is `gradient_statistics.norm_table`."""
    titles = {
        "per_parameter": "Gradient per parameter: $\\Vert \\partial L / \\partial W \\Vert / \\sqrt{numel}$",
        "per_entry": "Gradient per contributing entry: r.m.s. of $\\Vert \\partial L / \\partial y \\Vert$, $y = Wx$",
    }
    shown = [(v, b) for v in in_order(table["variant"]) for b in ("self", "cross")]
    shown = [pair for pair in shown if ((table["variant"] == pair[0]) & (table["branch"] == pair[1])).any()]
    figure = Figure(figsize=(9.6, 6.6), layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(2, 1, sharex=True), titles.items()):
        for place, (variant, branch) in enumerate(shown):
            own = table[(table["variant"] == variant) & (table["branch"] == branch) & (table["quantity"] == quantity)]
            own = own.set_index(["matrix", "side"]).reindex(PLACES)
            x = np.arange(len(PLACES)) + 0.7 * ((place + 0.5) / len(shown) - 0.5)
            colour, marker = look(variant)
            axes.vlines(x, own["low"], own["high"], color=colour, lw=2)
            filled = colour if branch == "cross" else "white"
            axes.plot(x, own["value"], ls="none", color=colour, marker=marker, mfc=filled, label=f"{variant}, {branch}")
        axes.set(title=title, yscale="log")
        axes.set_xticks(range(len(PLACES)), PLACES.values())
        axes.grid(axis="x", visible=False)
        for edge in np.arange(len(PLACES) - 1) + 0.5:
            axes.axvline(edge, color="#eeeeee", lw=1, zorder=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


@mpl.rc_context(STYLE)
def draw_contexts(table: pd.DataFrame) -> Figure:
    """Left: share of draft-side entries at the last draft step; right: attention on them; over the context length.

    ``table`` is `gradient_statistics.attention_table` at its last draft step.
    """
    figure, last = Figure(figsize=(9.6, 4.4), layout="constrained"), int(table["draft_step"].max())
    left, right = figure.subplots(1, 2, sharex=True)
    drawn = table[table["draft_step"] == last]
    share = drawn[drawn["quantity"] == "draft_share"]
    lengths = np.array([64, 4096])
    for offset, told in ((1, "one for each draft step: K / (n + K)"), (0, "`hidden`, self: one fewer")):
        entries = last + offset
        dashes = "-" if offset else (0, (4, 2))
        grid = np.geomspace(*lengths)
        left.plot(grid, entries / (grid + entries), color="#888888", lw=1.2, ls=dashes, label=told.replace("`", ""))
    for (variant, branch), line in share.groupby(["variant", "branch"], sort=False):
        colour, marker = look(variant)
        entries = last + (branch == "cross")
        seen = entries * (1 / line["value"] - 1)  # anchors see up to so many entries as the context is long
        left.plot(seen, line["value"], ls="none", color=colour, marker=marker, mfc="none")
    value = (last + 1) / (4096 + last + 1)
    left.annotate(
        f"{last + 1} of {4096 + last + 1:,}",
        (4096, value),
        (-14, -16),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    left.set(title=f"Share of visible entries that are draft-side\nat draft step {last}", ylabel="share", yscale="log")
    left.set_ylim(0.5 * value, None)
    for (variant, branch, layer), line in drawn[drawn["quantity"] == "draft_mass"].groupby(
        ["variant", "branch", "layer"], sort=False
    ):
        _band(right, line, "context_length_tokens", variant, branch)
    right.set(title=f"Attention on draft-side entries\nat draft step {last}, mean over heads", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([128, 512, 2048, 4096], ["128", "512", "2,048", "4,096"])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_xlabel("context length, tokens")
    left.legend(fontsize=9)
    figure.legend(handles=_variant_handles(drawn), loc="outside lower center", ncols=5)
    return figure


@mpl.rc_context(STYLE)
def draw_mass(table: pd.DataFrame) -> Figure:
    """Attention on draft-side entries by draft step, a panel a context length; every layer has its line."""
    contexts = sorted(table["context_length_tokens"].unique())
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    mass = table[table["quantity"] == "draft_mass"]
    for axes, context in zip(figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0], contexts):
        here = mass[mass["context_length_tokens"] == context]
        for (variant, branch, layer), line in here.groupby(["variant", "branch", "layer"], sort=False):
            _band(axes, line, "draft_step", variant, branch)
        axes.set(title=f"{context:,} tokens", xlabel="draft step $k$", ylim=(0, None))
        axes.set_xticks(sorted(mass["draft_step"].unique())[::2])
    figure.axes[0].set_ylabel("attention on draft-side entries")
    figure.legend(handles=_variant_handles(mass), loc="outside lower center", ncols=5)
    return figure


@mpl.rc_context(STYLE)
def draw_training(table: pd.DataFrame) -> Figure:
    """Gradient and Adam step per parameter over the training, a column a variant (six at most); of the last seed of each.

    ``table`` is `gradient_statistics.training_table`.
    """
    variants = in_order(table["variant"])[:6]
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    panels = figure.subplots(2, len(variants), sharex="col", sharey="row", squeeze=False)
    titles = {"gradient": "gradient per parameter", "adam_step": "Adam step per parameter"}
    for column, variant in enumerate(variants):
        own = table[table["variant"] == variant]
        own = own[own["seed"] == own["seed"].max()]
        for row, quantity in enumerate(titles):
            axes = panels[row, column]
            for (matrix, branch), line in own.groupby(["matrix", "branch"], sort=False):
                _, colour = PROJECTIONS[matrix]
                axes.plot(line["trained_tokens"] / 1000, line[quantity], color=colour, ls=LINES[branch], lw=1.3)
            axes.set_yscale("log")
            if row == 0:
                axes.set_title(variant)
            else:
                axes.set_xlabel("trained tokens,\nthousands")
        panels[0, 0].set_ylabel(titles["gradient"])
        panels[1, 0].set_ylabel(titles["adam_step"])
    seen = set(table["matrix"])
    handles = [Line2D([], [], color=c, label=name) for m, (name, c) in PROJECTIONS.items() if m in seen]
    handles += [Line2D([], [], color="#333333", ls=LINES[b], label=f"{b} branch") for b in ("cross", "self")]
    figure.legend(handles=handles, loc="outside upper left", ncols=8)
    return figure


@mpl.rc_context(STYLE)
def draw_scaling(table: pd.DataFrame, scale: float = 50.0) -> Figure:
    """What scaling the gradient of draft-side K and V does to gradients and to Adam's steps; ``table`` is `scaling_table`."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    titles = {"gradient": "Gradient", "adam_step": "Adam step"}
    for axes, (quantity, title) in zip(figure.subplots(1, 2), titles.items()):
        for matrix, (name, colour) in PROJECTIONS.items():
            line = table[table["matrix"] == matrix]
            if len(line):
                axes.plot(line["step"], line[quantity], color=colour, marker=".", label=name)
        axes.axhline(1, color="#222222", lw=1, ls=(0, (4, 3)))
        axes.axhline(scale, color="#bbbbbb", lw=1, ls=(0, (1, 2)))
        axes.set(title=f"{title}: kv_2_grad50 over kv_2", xlabel="optimiser step", yscale="log")
    figure.axes[0].legend()
    return figure


@mpl.rc_context(STYLE)
def draw_gates(table: pd.DataFrame) -> Figure:
    """The gate and the gradient ratio of the branches over the share of training; ``table`` is `gradient_statistics.gate_table`.

    Cures of the warm hybrid have a row of their own, beside the hybrid that they should cure.
    """
    variants = in_order(table["variant"])
    groups = [[v for v in variants if v not in CURES], [v for v in variants if v in ("hybrid_warm", *CURES)]]
    groups = [group for group in groups if set(group) - {"hybrid_warm"}] or [variants]
    figure = Figure(figsize=(9.6, 4.2 * len(groups)), layout="constrained")
    for pair, group in zip(figure.subplots(len(groups), 2, squeeze=False), groups):
        cures = [v for v in group if v in CURES]
        hues = dict(zip(cures, sns.color_palette("tab10", len(cures))))
        _draw_gates(*pair, table, {v: (hues[v], "") if v in hues else look(v) for v in group})
    return figure


def _draw_gates(left: Axes, right: Axes, table: pd.DataFrame, looks: dict[str, tuple]) -> None:
    """One row of `draw_gates`: variants with their (colour, marker); the spread is drawn of a few only."""
    few = len(looks) <= 4
    for variant, (colour, marker) in looks.items():
        own = table[table["variant"] == variant]
        whole = own["step"].max()
        mean, spread = (own[own["quantity"] == name].sort_values("step") for name in ("gate_mean", "gate_spread"))
        x, half = (mean["step"] / whole).to_numpy(), spread["value"].to_numpy()
        if few:
            left.fill_between(x, mean["value"] - half, mean["value"] + half, color=colour, alpha=0.12, lw=0)
        left.vlines(x, mean["low"], mean["high"], color=colour, lw=3, alpha=0.6)
        left.plot(x, mean["value"], color=colour, marker=marker, ms=4, label=variant)
        ratio = own[own["quantity"] == "branch_ratio"].sort_values("step")
        right.plot(ratio["step"] / whole, ratio["value"], color=colour, marker=marker, ms=4)
    left.axvline(CLAIM_AT, color="#999999", lw=1, ls=(0, (1, 2)))
    left.plot([CLAIM_AT], [0.2], color="#222222", marker="_", ms=14, ls="none")
    told = "Gate: mean, and ± one standard deviation over\nanchors and channels" if few else "Gate: mean"
    left.set(title=f"{told} (dash: .2 at a tenth)", ylim=(0, 1))
    right.axhline(1, color="#222222", lw=1, ls=(0, (4, 3)))
    right.set(title="Gradient at the cross branch's output\nover that at the self branch's", yscale="log")
    low, high = right.dataLim.intervaly
    right.set_ylim(min(0.5, 0.8 * low), max(1.25, 1.25 * high))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.set_xlabel("share of training")
    left.legend(ncols=1 + (len(looks) > 6), fontsize=8)


def _band(axes: Axes, line: pd.DataFrame, x: str, variant: str, branch: str) -> None:
    """A line with its 95% interval."""
    line, (colour, marker) = line.sort_values(x), look(variant)
    places = line[x].to_numpy(float)
    axes.fill_between(places, line["low"].to_numpy(), line["high"].to_numpy(), color=colour, alpha=0.15, lw=0)
    axes.plot(places, line["value"], color=colour, marker=marker, ms=4.5, ls=LINES[branch])


def _variant_handles(table: pd.DataFrame) -> Iterable[Line2D]:
    pairs = [(v, b) for v in in_order(table["variant"]) for b in ("self", "cross")]
    there = set(table[["variant", "branch"]].itertuples(index=False, name=None))
    return [
        Line2D([], [], color=look(v)[0], marker=look(v)[1], ms=4.5, ls=LINES[b], label=f"{v}, {b}")
        for v, b in pairs
        if (v, b) in there
    ]
