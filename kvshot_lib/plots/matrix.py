"""Figures of the whole matrix of variants: a row each, depth, ablations, and acceptance along the text (style: `figures`)."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metrics.axes import bin_names
from ..metrics.tables import in_order
from .style import STYLE, label_ends, look, pick, top

DEPTHS = {"kv_1": 1, "kv_2": 2, "kv_3": 3, "kv_4": 4}
DEPTH_REFERENCES = ("hidden", "hybrid")
MAT_TITLES = {
    "measured_mat": "Measured MAT: 1 + mean accepted run",
    "expected_mat": "Expected MAT: product of marginals",
}


@mpl.rc_context(STYLE)
def draw_retention(table: pd.DataFrame) -> Figure:
    """Retention as bars with 95% intervals; the line at 1 is a drafter that does not decay.

    ``table`` is ``pick(summary, "retention", "chain_retention")``.
    """
    variants = in_order(table["variant"])
    figure = Figure(figsize=(9.6, 1.4 + _row_height(variants) * len(variants)), layout="constrained")
    titles = {"retention": "Retention of step acceptance", "chain_retention": "Retention of chain acceptance"}
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        rows = table[table["metric"] == metric].set_index("variant").reindex(variants)
        edge = np.nanmax([1.0, *rows["value"], *rows["high"], *rows["seed_high"]])
        for y, (variant, row) in enumerate(rows.iterrows()):
            colour, _ = look(variant)
            axes.barh(y, row["value"], height=0.62, color=colour, alpha=0.85)
            _whisker(axes, row, y, "#222222")
            end = np.nanmax([row["value"], row["high"], row["seed_high"], 0])
            shown = f"{row['value']:.2f}" if np.isfinite(row["value"]) else "too few anchors"
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.text(end + 0.02 * edge, y, shown, va="center", fontsize=9.5, bbox=ground)
        axes.axvline(1, color="#222222", lw=1, ls=(0, (4, 3)))
        axes.set(title=title, xlim=(0, 1.16 * edge), xlabel="last step / step 0   (dashed: no decay)")
        _name_rows(axes, variants)
    return figure


@mpl.rc_context(STYLE)
def draw_mat(table: pd.DataFrame) -> Figure:
    """Tokens per target forward: product of marginals (open) and mean accepted run (filled), with 95% intervals.

    ``table`` is ``pick(summary, "expected_mat", "measured_mat")``.
    """
    variants = in_order(table["variant"])
    figure = Figure(figsize=(9.6, 1.5 + 1.2 * _row_height(variants) * len(variants)), layout="constrained")
    axes = figure.subplots()
    for metric, offset in (("expected_mat", -0.14), ("measured_mat", 0.14)):
        rows = table[table["metric"] == metric].set_index("variant").reindex(variants)
        for y, (variant, row) in enumerate(rows.iterrows()):
            colour, marker = look(variant)
            _whisker(axes, row, y + offset, colour)
            face = "white" if metric == "expected_mat" else colour
            axes.plot(row["value"], y + offset, marker=marker, ms=7, mec=colour, mfc=face, mew=1.6, ls="none")
    dot = {"ls": "none", "marker": "o", "ms": 7, "mew": 1.6, "mec": "#555555"}
    handles = [
        *axes.plot([], [], mfc="white", label="expected: $1+\\Sigma_i\\Pi_{j\\leq i}\\,\\alpha_j$", **dot),
        *axes.plot([], [], mfc="#555555", label="measured: 1 + mean accepted run", **dot),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handletextpad=0.2)
    right = np.nanmax([1.05, *table["value"], *table["high"], *table["seed_high"]])
    axes.set(xlabel="tokens per target forward, bonus token included   (1: no draft token accepted)")
    axes.set_xlim(1, 1 + 1.05 * (right - 1))
    _name_rows(axes, variants)
    return figure


def _whisker(axes: Axes, row: pd.Series, y: float, colour: str) -> None:
    """The 95% interval as a line, and the range of seeds as a thick faint one."""
    axes.hlines(y, row["low"], row["high"], color=colour, lw=1.6)
    axes.hlines(y, row["seed_low"], row["seed_high"], color=colour, lw=7, alpha=0.35)


def _name_rows(axes: Axes, variants: list[str]) -> None:
    """Variants as row names from top to bottom."""
    axes.set_yticks(range(len(variants)), variants)
    axes.set_ylim(len(variants) - 0.45, -0.55)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _row_height(variants: Sequence[str]) -> float:
    """Inches a row: less where there are many."""
    return 0.42 if len(variants) <= 8 else 0.28


def depth_table(summary: pd.DataFrame) -> pd.DataFrame:
    """MAT of the `kv` drafters by number of layers, and of the variants that they are compared with (no ``num_layers``).

    Empty if fewer than two depths were measured.
    """
    table = pick(summary, *MAT_TITLES)
    table = table[table["variant"].isin([*DEPTHS, *DEPTH_REFERENCES])].reset_index(drop=True)
    layers = pd.array([DEPTHS.get(variant, pd.NA) for variant in table["variant"]], dtype="Int64")
    table.insert(1, "num_layers", layers)
    return table if table["num_layers"].nunique() > 1 else table[:0]


@mpl.rc_context(STYLE)
def draw_depth(table: pd.DataFrame) -> Figure:
    """MAT against the number of `kv` layers, with the one-layer drafters of `DEPTH_REFERENCES` as level lines.

    ``table`` is ``depth_table(summary)``.
    """
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), MAT_TITLES.items()):
        rows = table[table["metric"] == metric]
        line = rows.dropna(subset=["num_layers"]).sort_values("num_layers")
        x, last = line["num_layers"].to_numpy(int), int(line["num_layers"].max())
        axes.set(title=title, xlabel="decoder layers of the kv drafter", xlim=(x[0] - 0.25, last + 0.15), xticks=x)
        for _, row in rows[rows["num_layers"].isna()].iterrows():
            axes.axhspan(row["low"], row["high"], color=look(row["variant"])[0], alpha=0.13, lw=0)
            axes.axhline(row["value"], color=look(row["variant"])[0], ls=(0, (4, 3)))
        for place, (_, row) in zip(x, line.iterrows()):
            colour, marker = look(row["variant"])
            axes.vlines(place, row["low"], row["high"], color=colour, lw=1.6)
            axes.vlines(place, row["seed_low"], row["seed_high"], color=colour, lw=7, alpha=0.35)
            axes.plot(place, row["value"], color=colour, marker=marker, ms=7)
        axes.plot(x, line["value"], color="#8a5a33", lw=1.2, zorder=1)
        axes.grid(axis="x", visible=False)
    for axes, metric in zip(figure.axes, MAT_TITLES):
        rows = table[table["metric"] == metric]
        ends = [
            (last, r["value"], r["variant"], look(r["variant"])[0])
            for _, r in rows[rows["num_layers"].isna()].iterrows()
        ]
        end = rows.dropna(subset=["num_layers"]).sort_values("num_layers").iloc[-1]
        label_ends(axes, [*ends, (last, end["value"], "kv", look(end["variant"])[0])], last)
    figure.axes[0].set_ylabel("tokens per target forward")
    return figure


@mpl.rc_context(STYLE)
def draw_ablations(table: pd.DataFrame) -> Figure:
    """MAT of variants minus that of the variant they change in one point, grouped by the latter.

    ``table`` is ``ablations.ablation_table(draws)``.
    """
    lines: list[tuple[str, str]] = []
    for reference in table["reference"].unique():
        lines.append((reference, ""))
        lines += [(reference, v) for v in table.loc[table["reference"] == reference, "variant"].unique()]
    figure = Figure(figsize=(9.6, 1.2 + 0.3 * len(lines)), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), MAT_TITLES.items()):
        rows = table[table["metric"] == metric].set_index(["reference", "variant"])
        for y, key in enumerate(lines):
            if key in rows.index:
                colour, _ = look(key[1])
                axes.barh(y, rows.loc[key, "value"], height=0.62, color=colour, alpha=0.85)
                _whisker(axes, rows.loc[key], y, "#222222")
        axes.axvline(0, color="#222222", lw=1)
        axes.set(title=title, xlabel="difference on the same documents\n(line: 95% interval, grey: seeds)")
        _name_rows(axes, [variant or f"minus {reference}" for reference, variant in lines])
        for label, (_, variant) in zip(axes.get_yticklabels(), lines):
            label.set_weight("normal" if variant else "bold")
    return figure


AXIS_TITLES = {
    "generated_offset": "answer tokens before the drafted ones (generated offset)",
    "context_length_tokens": "tokens of context",
}


@mpl.rc_context(STYLE)
def draw_axis(table: pd.DataFrame, axis: str) -> Figure:
    """Step acceptance along an axis, a panel for each draft step, a line for each variant; bands are 95% intervals.

    ``table`` is that of `axes.axis_table`, without thin bins.
    """
    table = table[table["axis"] == axis]
    steps, bins = sorted(table["draft_step"].unique()), sorted(table["bin_low"].unique())
    figure, highest = Figure(figsize=(9.6, 4.1), layout="constrained"), top(table)
    for panel, step in zip(np.atleast_1d(figure.subplots(1, len(steps), sharey=True)), steps):
        for variant in in_order(table["variant"]):
            line = table[(table["variant"] == variant) & (table["draft_step"] == step)].sort_values("bin_low")
            x, (colour, marker) = [bins.index(low) for low in line["bin_low"]], look(variant)
            panel.fill_between(x, line["low"].to_numpy(), line["high"].to_numpy(), color=colour, alpha=0.13, lw=0)
            panel.vlines(x, line["seed_low"], line["seed_high"], color=colour, lw=5, alpha=0.35)
            panel.plot(x, line["value"], color=colour, marker=marker, ms=5, label=variant)
        panel.set(title=f"Step acceptance, draft step {step}", xlim=(-0.3, len(bins) - 0.7), ylim=(0, highest))
        panel.set_xticks(range(len(bins)), bin_names(bins), rotation=35, ha="right")
        panel.grid(axis="x", visible=False)
    figure.axes[0].set_ylabel("share of the target's tokens guessed")
    figure.supxlabel(AXIS_TITLES[axis], fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=7, columnspacing=1.2)
    return figure
