"""Figures of notebook 07: decoded tokens per forward, speed, where the time goes, step costs, the cost model (style: `figures`)."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from ..metrics.decode_costs import PARTS, PEERS, STEP_PARTS
from ..drafters.variants import in_study_order as in_order
from .style import PART_COLOURS, STYLE, look

LEGEND = {"loc": "outside upper left", "ncols": 3, "fontsize": 9}  # of variants, whose names are long
MODES = {"alone": "target alone", "chain": "chain", "tree": "tree"}


@mpl.rc_context(STYLE)
def draw_mat(table: pd.DataFrame) -> Figure:
    """Decoded tokens per target forward by category, a panel for chains and one for trees; bars are 95% intervals over prompts.

    ``table`` holds rows of ``decoding`` with the chosen plans.
    """
    categories, variants = list(dict.fromkeys(table["category"])), in_order(table["variant"])
    modes = [mode for mode in ("chain", "tree") if (table["mode"] == mode).any()]
    figure = Figure(figsize=(9.6, 0.7 + 2.9 * len(modes)), layout="constrained")
    for axes, mode in zip(figure.subplots(len(modes), 1, sharex=True, squeeze=False).flat, modes):
        for place, variant in enumerate(variants):
            own = (
                table[(table["variant"] == variant) & (table["mode"] == mode)].set_index("category").reindex(categories)
            )
            x = np.arange(len(categories)) + 0.7 * ((place + 0.5) / len(variants) - 0.5)
            colour, marker = look(variant)
            axes.vlines(x, own["decoded_mat_low"], own["decoded_mat_high"], color=colour, lw=2)
            axes.plot(x, own["decoded_mat"], ls="none", color=colour, marker=marker, ms=6, label=variant)
        axes.axhline(1, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
        told = "Chain at its fastest length" if mode == "chain" else "Tree"
        axes.set(title=told, ylabel="tokens per target forward")
        axes.set_xticks(range(len(categories)), [name.replace("_", "\n") for name in categories])
        axes.grid(axis="x", visible=False)
        for edge in np.arange(len(categories) - 1) + 0.5:
            axes.axvline(edge, color="#eeeeee", lw=1, zorder=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, **LEGEND)
    return figure


@mpl.rc_context(STYLE)
def draw_speed(table: pd.DataFrame) -> Figure:
    """Speedup over the target alone, every plan of every drafter and transformers' own ways; ``table``: rows of ``decoding`` over all prompts."""
    table = table[table["mode"] != "alone"].reset_index(drop=True)
    names = [
        *in_order(v for v in table["variant"] if v != PEERS),
        *([PEERS] if (table["variant"] == PEERS).any() else []),
    ]
    figure = Figure(figsize=(9.6, 1.3 + 0.27 * (len(table) + len(names))), layout="constrained")
    axes, y, ticks = figure.subplots(), 0.0, []
    for name in names:
        for row in table[table["variant"] == name].itertuples():
            colour, marker = ("#777777", "d") if name == PEERS else look(name)
            axes.hlines(y, row.speedup_low, row.speedup_high, color=colour, lw=2)
            axes.plot(row.speedup, y, color=colour, marker=marker, ms=6, mfc="white" if row.mode == "tree" else colour)
            plan = f"{row.mode.replace('_', ' ')} {row.plan}".removesuffix(" -")
            ticks.append((y, f"{'generate' if name == PEERS else name}, {plan}"))
            axes.annotate(
                f"{row.tokens_per_s:.3g} tokens/s", (1.01, y), xycoords=("axes fraction", "data"), va="center",
                fontsize=9, color="#444444", annotation_clip=False,
            )  # fmt: skip
            y += 1
        y += 0.7
    axes.axvline(1, color="#222222", lw=1, ls=(0, (4, 3)))
    axes.set_yticks(*zip(*ticks), fontsize=9)
    axes.set_ylim(y - 0.7, -0.7)
    axes.set_xlim(0, None)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="tokens per second over those of the target alone (each way's own, in the same run)")
    return figure


@mpl.rc_context(STYLE)
def draw_parts(table: pd.DataFrame) -> Figure:
    """Stacked bars: milliseconds per new token by part; ``table`` is `decode_costs.parts_table`."""
    bars = list(dict.fromkeys(zip(table["variant"], table["mode"], table["plan"])))
    figure = Figure(figsize=(9.6, 1.4 + 0.34 * len(bars)), layout="constrained")
    axes, ticks, y, before = figure.subplots(), [], 0.0, bars[0][0]
    for variant, mode, plan in bars:
        y += 0.6 * (variant != before)
        before, left = variant, 0.0
        own = table[(table["variant"] == variant) & (table["mode"] == mode)].set_index("part")["milliseconds"]
        for part in PARTS:
            axes.barh(y, own[part], left=left, height=0.75, color=PART_COLOURS[part], label=part)
            left += own[part]
        ticks.append((y, f"{variant}, {MODES[mode]}" + ("" if plan == "-" else f" {plan}")))
        y += 1
    axes.set_yticks(*zip(*ticks), fontsize=9)
    axes.set_ylim(y - 0.4, -0.7)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="milliseconds per new token, prefill included")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[: len(PARTS)], labels[: len(PARTS)], loc="outside upper left", ncols=len(PARTS))
    return figure


@mpl.rc_context(STYLE)
def draw_steps(table: pd.DataFrame) -> Figure:
    """Milliseconds of one step against the prefix length: a row a mode, a column a part; ``table`` is `decode_costs.step_parts`."""
    variants, prefixes = in_order(table["variant"]), sorted(table["prefix_tokens"].unique())
    modes = [mode for mode in ("alone", "chain", "tree") if (table["mode"] == mode).any()]
    figure = Figure(figsize=(9.6, 1.2 + 2.0 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(STEP_PARTS), sharex=True, sharey="row", squeeze=False)
    for line, mode in zip(panels, modes):
        rows = table[table["mode"] == mode]
        for axes, part in zip(line, STEP_PARTS):
            for variant in variants:
                points = rows[(rows["variant"] == variant) & (rows["part"] == part)].sort_values("prefix_tokens")
                if points["milliseconds"].sum() > 0:
                    colour, marker = look(variant)
                    axes.plot(
                        points["prefix_tokens"], points["milliseconds"], color=colour, marker=marker, ms=4, lw=1.3
                    )
            axes.set_xscale("log", base=2)
            axes.set_xticks(prefixes, [f"{n:,}" for n in prefixes], fontsize=8.5)
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            if mode == modes[0]:
                axes.set_title(part)
        plans = [] if mode == "alone" else rows["plan"].unique()
        line[0].set_ylabel(" ".join([MODES[mode], *plans]) + "\nms a step")
    figure.supxlabel("prefix, tokens", fontsize=10)
    figure.legend(handles=[_handle(variant) for variant in variants], **LEGEND)
    return figure


@mpl.rc_context(STYLE)
def draw_model(model: pd.DataFrame) -> Figure:
    """Speedup measured against that of the cost model, as it is and with nothing left out; ``model`` is `decode_tables.model_table`."""
    titles = {
        "predicted": "decoded_mat / (1 + draft time / verify time)",
        "predicted_whole": "with the price of verifying several tokens,\nand of bookkeeping",
    }
    wide = model.pivot_table(index=["variant", "mode", "plan"], columns="metric", values=["value", "low", "high"])
    highest = 1.08 * max(wide["high"][name].max() for name in ("speedup", *titles))
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        for variant in in_order(model["variant"]):
            colour, marker = look(variant)
            for row in wide.loc[[variant]].itertuples():
                at = dict(zip(wide.columns, row[1:]))
                x, y = (at["value", name] for name in (metric, "speedup"))
                axes.vlines(x, at["low", "speedup"], at["high", "speedup"], color=colour, lw=1.2, alpha=0.6)
                axes.hlines(y, at["low", metric], at["high", metric], color=colour, lw=1.2, alpha=0.6)
                axes.plot(x, y, color=colour, marker=marker, ms=6, mfc="white" if row.Index[1] == "tree" else colour)
        axes.plot([0, highest], [0, highest], color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set(title=title, xlabel="predicted speedup", xlim=(0, highest), ylim=(0, highest))
    figure.axes[0].set_ylabel("measured speedup")
    handles = [_handle(variant) for variant in in_order(model["variant"])]
    handles.append(Line2D([], [], color="#555555", marker="o", ls="none", ms=6, mfc="white", label="tree"))
    figure.legend(handles=handles, **LEGEND)
    return figure


@mpl.rc_context(STYLE)
def draw_break_even(curves: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Speedup of the cost model against the cost of a drafter's pass; a marker at the cost measured here.

    ``curves`` is `decode_costs.break_even_curves`, ``costs`` the rows of `decode_costs.break_even` for the chosen chains.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for variant in in_order(curves["variant"]):
        line, (colour, marker) = curves[curves["variant"] == variant], look(variant)
        axes.plot(line["cost"], line["speedup"], color=colour)
        for row in costs[costs["variant"] == variant].itertuples():
            axes.plot(row.cost, row.decoded_mat / (1 + row.passes * row.cost), color=colour, marker=marker, ms=7)
    axes.axhline(1, color="#222222", lw=1, ls=(0, (4, 3)))
    axes.set_xscale("log")
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="one pass of the drafter, in verifications", ylabel="predicted speedup", xlim=(ticks[0], ticks[-1]))
    axes.set_ylim(0, None)
    figure.legend(handles=[_handle(v) for v in in_order(curves["variant"])], **LEGEND)
    return figure


@mpl.rc_context(STYLE)
def draw_paper_scale(table: pd.DataFrame) -> Figure:
    """Tokens per forward that pay for a proposal at the paper's scale, stacked by cause; ``table`` is `decode_costs.paper_scale`."""
    prefixes, variants = sorted(table["prefix_tokens"].unique()), in_order(table["variant"])
    figure = Figure(figsize=(9.6, 1.5 + 0.42 * len(variants)), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), ("chain", "tree")):
        for row in table[table["mode"] == mode].itertuples():
            y = variants.index(row.variant) + 0.25 * (prefixes.index(row.prefix_tokens) - (len(prefixes) - 1) / 2)
            left = 0.0
            for part in ("verify", "draft", "project"):
                axes.barh(y, getattr(row, part), left=left, height=0.2, color=PART_COLOURS[part])
                left += getattr(row, part)
            axes.annotate(
                f"{row.prefix_tokens:,}", (left, y), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.axvline(1, color="#222222", lw=1, ls=(0, (4, 3)))
        axes.margins(x=0.14)
        axes.set(
            title="Chain of 8 (a block: its length)" if mode == "chain" else "Tree 8/10/60",
            xlabel="forwards of the target over one token",
        )
        axes.set_yticks(range(len(variants)), variants)
        axes.set_ylim(len(variants) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
    handles = [Line2D([], [], color=PART_COLOURS[part], lw=6, label=part) for part in ("verify", "draft", "project")]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _handle(variant: str) -> Line2D:
    colour, marker = look(variant)
    return Line2D([], [], color=colour, marker=marker, ls="none", ms=6, label=variant)
