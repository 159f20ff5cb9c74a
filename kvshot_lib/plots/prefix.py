"""Figures of notebook 06: acceptance by attention shift, the interaction, and what can be read back (style: `figures`)."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..metrics.interaction import ENTROPY_BINS, SHIFT_BINS
from ..metrics.resampling import Draws, interval, resample_weights
from ..metrics.tables import in_order
from .style import STYLE, look, top

SHOWN = ("hidden", "kv_1", "kv_2", "hybrid", "hybrid_warm", "none_1")
ENTROPIES = ("lowest", "second", "third", "highest")  # names of the entropy bins
SOURCE_LOOKS = {"hidden": ("#0072B2", "o"), "kv": ("#D55E00", "s"), "floor": ("#777777", "")}


def pairs(variants) -> list[tuple[str, str]]:
    """The comparisons with `hidden`, in order: every `kv` variant (controls too), every `hybrid`, and `hidden_post_norm`."""
    if "hidden" not in variants:
        return []
    return [
        (v, "hidden") for v in in_order(variants) if v.startswith(("kv", "hybrid", "cross")) or v == "hidden_post_norm"
    ]


def interaction_table(draws: Draws) -> pd.DataFrame:
    """Each comparison's differences of slopes and of falls at every draft step, with intervals over documents and seeds.

    ``shift_slope`` and ``entropy_slope``: variant minus hidden; ``standardised_fall``: hidden minus variant. So shift_slope and
    standardised_fall are above 0 where hidden loses more with shift.
    """
    rows = []
    for variant, reference in pairs(draws.variants):
        for metric in ("shift_slope", "entropy_slope", "standardised_fall"):
            sign = -1 if metric == "standardised_fall" else 1
            for step in sorted(draws.keys["draft_step"].unique()):
                found = draws.contrast((sign, variant, metric, step), (-sign, reference, metric, step))
                rows.append([variant, metric, step, *vars(found).values()])
    return pd.DataFrame(rows, columns=["variant", "metric", "draft_step", "value", "low", "high"])


@mpl.rc_context(STYLE)
def draw_shift(shift: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How the shift is distributed at each draft step; the table behind it has the histogram's counts."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    axes, rows = figure.subplots(), []
    edges = np.linspace(0, max(1e-6, float(shift["shift"].max())), 41)
    steps = sorted(shift["draft_step"].unique())
    for place, step in enumerate(steps):
        counts, _ = np.histogram(shift.loc[shift["draft_step"] == step, "shift"].dropna(), edges)
        colour = mpl.colormaps["viridis"](0.85 * place / max(1, len(steps) - 1))
        axes.stairs(counts / max(1, counts.sum()), edges, color=colour, lw=1.8, label=f"draft step {step}")
        rows += [[step, low, high, count] for low, high, count in zip(edges[:-1], edges[1:], counts)]
    axes.set(
        xlabel="attention shift between t and t + 1 + k, nats (0 … 0.69)", ylabel="share of anchors", xlim=(0, None)
    )
    axes.legend()
    return figure, pd.DataFrame(rows, columns=["draft_step", "low", "high", "anchors"])


@mpl.rc_context(STYLE)
def draw_by_shift(binned: pd.DataFrame) -> Figure:
    """Step acceptance against shift: as it is (faint, dashed) and at equal entropy (solid, with a 95% band), a panel a draft step."""
    binned = binned[binned["kind"].isin(["raw", "standardised"])]
    steps, highest = sorted(binned["draft_step"].unique()), top(binned)
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for axes, step in zip(np.atleast_1d(figure.subplots(1, len(steps), sharey=True)), steps):
        for variant in in_order(binned["variant"]):
            colour, marker = look(variant)
            own = binned[(binned["variant"] == variant) & (binned["draft_step"] == step)]
            raw, even = (own[own["kind"] == kind].sort_values("shift_bin") for kind in ("raw", "standardised"))
            axes.plot(raw["mean_shift"], raw["value"], color=colour, lw=1, ls=(0, (4, 3)), alpha=0.6)
            axes.fill_between(
                even["mean_shift"].to_numpy(),
                even["low"].to_numpy(),
                even["high"].to_numpy(),
                color=colour,
                alpha=0.15,
                lw=0,
            )
            axes.plot(even["mean_shift"], even["value"], color=colour, marker=marker, ms=5, label=variant)
        axes.set(title=f"Draft step {step}", ylim=(0, highest))
    figure.axes[0].set_ylabel("step acceptance")
    figure.supxlabel("mean attention shift of the bin, nats", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    handles += [
        Line2D([], [], color="#555555", lw=1, ls=(0, (4, 3))),
        Line2D([], [], color="#555555", marker="o", ms=5),
    ]
    figure.legend(
        handles, [*names, "as it is", "at equal entropy"], loc="outside upper left", ncols=8, columnspacing=1.2
    )
    return figure


@mpl.rc_context(STYLE)
def draw_two_way(binned: pd.DataFrame) -> Figure:
    """Step acceptance at the last draft step by shift, a panel for each entropy bin: the two-way table as curves."""
    cells = binned[(binned["kind"] == "cell") & (binned["draft_step"] == binned["draft_step"].max())]
    figure, highest = Figure(figsize=(9.6, 3.7), layout="constrained"), top(cells)
    for e, axes in enumerate(figure.subplots(1, ENTROPY_BINS, sharey=True)):
        for variant in in_order(cells["variant"]):
            colour, marker = look(variant)
            line = cells[(cells["variant"] == variant) & (cells["entropy_bin"] == e)].sort_values("shift_bin")
            axes.fill_between(
                line["shift_bin"], line["low"].to_numpy(), line["high"].to_numpy(), color=colour, alpha=0.13, lw=0
            )
            axes.plot(line["shift_bin"], line["value"], color=colour, marker=marker, ms=5, label=variant)
        axes.set(title=f"{ENTROPIES[e].capitalize()} quarter\nof entropy", ylim=(0, highest))
        axes.set_xticks(range(SHIFT_BINS), range(1, SHIFT_BINS + 1))
    figure.axes[0].set_ylabel(f"step acceptance, draft step {binned['draft_step'].max()}")
    figure.supxlabel("fifth of the attention shift (1: smallest)", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=8)
    return figure


@mpl.rc_context(STYLE)
def draw_interaction(table: pd.DataFrame) -> Figure:
    """Forest plot of `interaction_table`: slope differences (log-odds) and standardised falls, a colour a draft step."""
    titles = {
        "shift_slope": "Log-odds per sd of shift,\nvariant minus hidden",
        "standardised_fall": "Fall from lowest to highest shift,\nhidden minus variant (equal entropy)",
    }
    variants, steps = in_order(table["variant"]), sorted(table["draft_step"].unique())
    figure = Figure(figsize=(9.6, 1.7 + 0.55 * len(variants)), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for row in table[table["metric"] == metric].itertuples():
            place = steps.index(row.draft_step)
            colour = mpl.colormaps["viridis"](0.85 * place / max(1, len(steps) - 1))
            y = variants.index(row.variant) + 0.2 * (place - (len(steps) - 1) / 2)
            axes.hlines(y, row.low, row.high, color=colour, lw=2)
            axes.plot(row.value, y, color=colour, marker="o", ms=5)
        axes.axvline(0, color="#222222", lw=1, ls=(0, (4, 3)))
        axes.set(title=title, xlabel="← hidden loses less | hidden loses more →")
        axes.set_yticks(range(len(variants)), variants)
        axes.set_ylim(len(variants) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
    colours = [mpl.colormaps["viridis"](0.85 * place / max(1, len(steps) - 1)) for place in range(len(steps))]
    handles = [Line2D([], [], color=colour, marker="o", ms=5, lw=2) for colour in colours]
    figure.legend(handles, [f"draft step {step}" for step in steps], loc="outside upper left", ncols=len(steps))
    return figure


def recoverable_table(rows: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Accuracy and cross-entropy (nats) of each source at each distance, and how far it is below the floor, with 95% intervals over documents."""
    documents = int(rows["document"].max()) + 1
    weights, drawn, found = resample_weights(documents, samples, seed).astype(float), {}, []
    for (source, distance), own in rows.groupby(["source", "distance"]):
        counts = np.zeros((documents, 3))
        counts[own["document"]] = own[["positions", "correct", "nats"]]
        with np.errstate(invalid="ignore", divide="ignore"):
            total = weights @ counts
            drawn[source, distance] = total[:, 1] / total[:, 0], total[:, 2] / total[:, 0]
    for (source, distance), (accuracy, nats) in drawn.items():
        size = int(rows.loc[(rows["source"] == source) & (rows["distance"] == distance), "positions"].sum())
        floor = drawn["floor", distance]
        metrics = {
            "accuracy": accuracy,
            "cross_entropy": nats,
            "accuracy_gain": accuracy - floor[0],
            "nats_gained": floor[1] - nats,
        }
        found += [[source, distance, metric, *vars(interval(row)).values(), size] for metric, row in metrics.items()]
    return pd.DataFrame(found, columns=["source", "distance", "metric", "value", "low", "high", "positions"])


@mpl.rc_context(STYLE)
def draw_recoverable(table: pd.DataFrame) -> Figure:
    """Accuracy and cross-entropy of both probes against the distance of the token, with the unigram floor."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    titles = {"accuracy": "Top-1 accuracy", "cross_entropy": "Cross-entropy, nats (lower is better)"}
    names = {"hidden": "fused hidden states", "kv": "KV, one query", "floor": "unigram floor"}
    distances = sorted(table["distance"].unique())
    for axes, (metric, title) in zip(figure.subplots(1, 2), titles.items()):
        for source, (colour, marker) in SOURCE_LOOKS.items():
            line = table[(table["source"] == source) & (table["metric"] == metric)].sort_values("distance")
            axes.fill_between(
                line["distance"], line["low"].to_numpy(), line["high"].to_numpy(), color=colour, alpha=0.15, lw=0
            )
            axes.plot(
                line["distance"],
                line["value"],
                color=colour,
                marker=marker,
                ls="-" if marker else (0, (4, 3)),
                label=names[source],
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(distances, distances, fontsize=9)
        axes.set(title=title, xlabel="distance j: the token $x_{t-j}$", ylim=(0, None))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
