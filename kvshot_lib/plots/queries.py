"""Figures of notebook 04: attention overlap, the linear probe, and the oracle's arms (style: `figures`)."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..metrics.resampling import Draws
from ..metrics.tables import in_order
from .style import STYLE, look, top

REFERENCES = {
    "row_t": ("target's own row at t", (0, (1, 1.5))),
    "other_document": ("another document's row", (0, (5, 3))),
}
ARM_LOOKS = {
    "as_trained": ("#777777", "x", "as trained"),
    "own": ("#222222", "o", "own query"),
    "oracle": ("#0072B2", "s", "true query"),
    "perfect": ("#009E73", "D", "perfect re-attention"),
    "random": ("#D55E00", "v", "random query"),
}


def _layers(table: pd.DataFrame, variant: str) -> list[int]:
    return sorted(table.loc[table["variant"] == variant, "layer"].dropna().unique())


def _lines(axes, table: pd.DataFrame, variant: str) -> None:
    """A line for each drafter layer over the draft steps: the last layer solid, earlier ones thinner and dashed."""
    (colour, marker), layers = look(variant), _layers(table, variant)
    for layer in layers:
        own = table[(table["variant"] == variant) & (table["layer"] == layer)].sort_values("draft_step")
        last = layer == layers[-1]
        style = (
            {"ls": "-", "lw": 1.8} if last else {"ls": (0, (4, 2)), "lw": 1.0, "alpha": 0.4 + 0.5 * layer / len(layers)}
        )
        axes.plot(own["draft_step"], own["value"], color=colour, marker=marker, ms=5 if last else 3.5, **style)
        if last:
            axes.fill_between(
                own["draft_step"], own["low"].to_numpy(), own["high"].to_numpy(), color=colour, alpha=0.15, lw=0
            )


def _layer_handles(variants: list[str]) -> list[Line2D]:
    found = [Line2D([], [], color=look(v)[0], marker=look(v)[1], ms=5, label=v) for v in variants]
    return [*found, Line2D([], [], color="#777777", lw=1.0, ls=(0, (4, 2)), label="earlier layers")]


@mpl.rc_context(STYLE)
def draw_overlap(table: pd.DataFrame) -> Figure:
    """Recall and divergence by draft step, each without and with the sink; the target alone as the scale."""
    titles = {
        "recall": "Recall of the target's 8 largest\nprefix entries, without the sink",
        "recall_with_sink": "Recall of the target's 8 largest\nprefix entries, with the sink",
        "js": "JS divergence from the target's row,\nnats, without the sink",
        "js_with_sink": "JS divergence from the target's row,\nnats, with the sink",
    }
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    variants = in_order(table.loc[table["source"] == "drafter", "variant"])
    for axes, (measure, title) in zip(figure.subplots(2, 2).flat, titles.items()):
        shown = table[table["measure"] == measure]
        for source, (_, style) in REFERENCES.items():
            own = shown[shown["source"] == source].sort_values("draft_step")
            axes.plot(own["draft_step"], own["value"], color="#222222", lw=1.3, ls=style)
        for variant in variants:
            _lines(axes, shown[shown["source"] == "drafter"], variant)
        axes.set(title=title, xlabel="draft step k", ylim=(0, 1 if "recall" in measure else None))
        axes.set_xticks(sorted(shown["draft_step"].unique()))
    handles = _layer_handles(variants)
    handles += [Line2D([], [], color="#222222", lw=1.3, ls=style, label=name) for name, style in REFERENCES.values()]
    figure.legend(handles=handles, loc="outside upper left", ncols=6, columnspacing=1.2)
    return figure


@mpl.rc_context(STYLE)
def draw_probe(table: pd.DataFrame) -> Figure:
    """R² of the probe by draft step (left) and by drafter layer at the last draft step (right); the floor in grey."""
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    true, floor = (table[table["labels"] == labels] for labels in ("true", "shuffled"))
    variants = in_order(table["variant"])
    last = table["draft_step"].max()
    for place, variant in enumerate(variants):
        _lines(left, true, variant)
        colour, marker = look(variant)
        own = true[(true["variant"] == variant) & (true["draft_step"] == last)].sort_values("layer")
        bars = np.abs(own[["low", "high"]].to_numpy() - own[["value"]].to_numpy()).T
        beside = own["layer"] + 1 + 0.05 * (place - (len(variants) - 1) / 2)  # first layers of `kv` are much alike
        right.errorbar(beside, own["value"], bars, color=colour, marker=marker, ms=5, capsize=2)
    for axes, by in ((left, "draft_step"), (right, "layer")):
        rows = floor if by == "draft_step" else floor[floor["draft_step"] == last]
        means = rows.groupby(by)["value"].agg(["min", "max"])
        axes.fill_between(means.index + (by == "layer"), means["min"], means["max"], color="#999999", alpha=0.5, lw=2)
        axes.axhline(0, color="#222222", lw=0.8)
    left.set(title="By draft step", xlabel="draft step k", ylabel="R² for the target's true query")
    left.set_xticks(sorted(table["draft_step"].unique()))
    right.set(title=f"By drafter layer, at draft step {last}", xlabel="drafter layer (1: first)")
    right.set_xticks(range(1, int(table["layer"].max()) + 2))
    handles = [*_layer_handles(variants), Line2D([], [], color="#999999", lw=5, alpha=0.5, label="shuffled labels")]
    figure.legend(handles=handles, loc="outside upper left", ncols=7)
    return figure


@mpl.rc_context(STYLE)
def draw_arms(table: pd.DataFrame) -> Figure:
    """Step acceptance by draft step of every arm, a panel a drafter; drafters without further arms are left out where another has them."""
    rows = table[table["metric"] == "step_acceptance"]
    variants = in_order(rows.loc[rows["arm"] != "as_trained", "variant"]) or in_order(rows["variant"])
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for axes, variant in zip(np.atleast_1d(figure.subplots(1, len(variants), sharey=True)), variants):
        for arm, (colour, marker, name) in ARM_LOOKS.items():
            own = rows[(rows["variant"] == variant) & (rows["arm"] == arm)].sort_values("draft_step")
            axes.fill_between(
                own["draft_step"].astype(int),
                own["low"].to_numpy(),
                own["high"].to_numpy(),
                color=colour,
                alpha=0.1,
                lw=0,
            )
            axes.plot(own["draft_step"].astype(int), own["value"], color=colour, marker=marker, ms=5, label=name)
        axes.set(title=variant, xlabel="draft step k", ylim=(0, top(rows)))
    figure.axes[0].set_ylabel("step acceptance")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(ARM_LOOKS))
    return figure


def gain_table(draws: Draws) -> pd.DataFrame:
    """Gains of every drafter's arms over its own query, with intervals over documents and seeds: variant, metric, value, low, high."""
    metrics = [f"{arm}_{what}" for what in ("gain", "last") for arm in ("random", "oracle", "perfect")]
    rows = [
        [variant, metric, *vars(draws.contrast((1, variant, metric))).values()]
        for variant in in_order(draws.keys.loc[draws.keys["metric"] == "oracle_gain", "variant"])
        for metric in ("own_gain", *metrics, "returned")
    ]
    return pd.DataFrame(rows, columns=["variant", "metric", "value", "low", "high"])


@mpl.rc_context(STYLE)
def draw_gains(table: pd.DataFrame, margin: float) -> Figure:
    """Forest plot of the arms' gains over the own query: expected MAT, and acceptance at the last draft step."""
    variants = in_order(table["variant"])
    figure = Figure(figsize=(9.6, 1.9 + 0.6 * len(variants)), layout="constrained")
    titles = {"gain": "Expected MAT, tokens", "last": "Step acceptance at the last draft step"}
    for axes, (what, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for place, arm in enumerate(("random", "oracle", "perfect")):
            colour, marker, _ = ARM_LOOKS[arm]
            own = table[table["metric"] == f"{arm}_{what}"].set_index("variant").loc[variants]
            y = np.arange(len(variants)) + 0.22 * (place - 1)
            axes.hlines(y, own["low"], own["high"], color=colour, lw=2)
            axes.plot(own["value"], y, color=colour, marker=marker, ms=5, ls="")
        axes.axvline(0, color="#222222", lw=1)
        axes.set(title=title, xlabel="arm minus own query")
        axes.grid(axis="y", visible=False)
    figure.axes[0].axvline(margin, color="#222222", lw=1, ls=(0, (4, 3)))
    figure.axes[0].set_yticks(range(len(variants)), variants)
    figure.axes[0].set_ylim(len(variants) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=ARM_LOOKS[arm][0], marker=ARM_LOOKS[arm][1], ms=5, lw=2, label=ARM_LOOKS[arm][2])
        for arm in ("random", "oracle", "perfect")
    ]
    handles.append(Line2D([], [], color="#222222", lw=1, ls=(0, (4, 3)), label=f"margin of the claim, {margin}"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure
