"""The study's figures: each function draws one tidy table, and ``save_figure`` writes picture and table side by side.

A figure drawn twice has the same bytes: nothing here is random, the font is matplotlib's own, and no date or version
goes into the file. Colours are Okabe and Ito's (safe for the colour-blind); a variant has the same one everywhere.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .errors import StudyError
from .files import write_atomically, write_csv
from .tables import in_order, rounded

LEAST_ANCHORS = 50
STEP_METRICS = ("step_acceptance", "chain_acceptance")

STYLE = sns.axes_style("ticks") | {
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
# Colour and marker of each variant: one hue and marker shape for each paradigm, grey for controls that see no target.
LOOKS = {
    "hidden": ("#0072B2", "o"),
    "hidden_post_norm": ("#56B4E9", "o"),
    "hidden_continued": ("#00456b", "o"),
    "kv_1": ("#E69F00", "s"),
    "kv_2": ("#D55E00", "s"),
    "kv_3": ("#a34700", "s"),
    "kv_4": ("#6e3000", "s"),
    "hybrid": ("#009E73", "D"),
    "hybrid_warm": ("#005c43", "D"),
    "cross_only_warm": ("#6fcbb1", "D"),
    "kv_1_none": ("#444444", "X"),
    "kv_2_zero": ("#777777", "X"),
    "kv_2_shuffled": ("#aaaaaa", "X"),
}
# Other variants have the look of their paradigm.
FAMILIES = {"hidden": ("#0072B2", "v"), "kv": ("#c98a5e", "P"), "hybrid": ("#009E73", "v"), "block": ("#CC79A7", "^")}


def look(variant: str) -> tuple[str, str]:
    """(colour, marker) of a variant, the same in every figure."""
    family = next((known for name, known in FAMILIES.items() if variant.startswith(name)), ("#000000", "*"))
    return LOOKS.get(variant, family)


def save_figure(figure: Figure, table: pd.DataFrame, figures_dir: str | Path, name: str) -> Path:
    """Write ``<name>.png`` and, beside it, the table that it shows as ``<name>.csv``; return the picture's path."""
    path = Path(figures_dir) / f"{name}.png"
    write_csv(path.with_suffix(".csv"), rounded(table))
    return write_atomically(path, lambda p: figure.savefig(p, dpi=160, metadata={"Software": None}))


def pick(summary: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """The rows of some metrics, metric by metric and variant by variant: what a figure shows and its CSV holds."""
    order = in_order(summary["variant"])
    rows = [summary[(summary["metric"] == m) & (summary["variant"] == v)] for m in metrics for v in order]
    if not rows or not any(len(row) for row in rows):
        raise StudyError(f"nothing to draw: the summary has no {' or '.join(metrics)}")
    return pd.concat(rows, ignore_index=True)


def supported(table: pd.DataFrame, summary: pd.DataFrame, reference: str | None = None) -> pd.DataFrame:
    """The rows of ``table`` that rest on ``LEAST_ANCHORS`` anchors or more, in ``summary`` (and for ``reference``, if given).

    Late chain steps of a weak drafter rest on a handful of anchors; a point drawn there is noise with a marker on it.
    """
    enough = summary.loc[summary["anchors"] >= LEAST_ANCHORS, ["variant", "metric", "draft_step"]]
    table = table.merge(enough)
    if reference is not None:
        table = table.merge(enough.loc[enough["variant"] == reference, ["metric", "draft_step"]])
    return table


@mpl.rc_context(STYLE)
def draw_decay(table: pd.DataFrame) -> Figure:
    """Step and chain acceptance against the draft step; bands are 95% intervals over documents, bars seed ranges.

    ``table`` is ``pick(summary, "step_acceptance", "chain_acceptance")``, and so on below with other metrics.
    """
    titles = {
        "step_acceptance": "Step acceptance $\\alpha_k$\nall anchors, earlier steps may have failed",
        "chain_acceptance": f"Chain acceptance\nanchors whose earlier steps all matched ({LEAST_ANCHORS} or more)",
    }
    return _draw_steps(table, titles, "share of the target's tokens guessed")


@mpl.rc_context(STYLE)
def draw_gap(table: pd.DataFrame, reference: str) -> Figure:
    """Paired differences from the reference variant against the draft step, with their own 95% intervals.

    ``table`` is ``pick(difference_table(draws, reference), "step_acceptance", "chain_acceptance")``.
    """
    titles = {name: f"{name.replace('_', ' ').capitalize()},\nminus that of {reference}" for name in STEP_METRICS}
    return _draw_steps(table, titles, "difference on the same documents", zero_line=True)


def _draw_steps(table: pd.DataFrame, titles: dict[str, str], ylabel: str, zero_line: bool = False) -> Figure:
    """One panel a metric, one line a variant, over draft steps; the y axis starts at 0 or has a line there."""
    figure, steps = Figure(figsize=(9.6, 4.0), layout="constrained"), sorted(table["draft_step"].unique())
    for axes, (metric, title) in zip(figure.subplots(1, len(titles)), titles.items()):
        ends = []
        for variant in in_order(table["variant"]):
            line = table[(table["metric"] == metric) & (table["variant"] == variant)].dropna(subset=["value"])
            if line.empty:
                continue
            x, (colour, marker) = line["draft_step"].to_numpy(int), look(variant)
            axes.fill_between(x, line["low"].to_numpy(), line["high"].to_numpy(), color=colour, alpha=0.15, lw=0)
            axes.vlines(x, line["seed_low"], line["seed_high"], color=colour, lw=5, alpha=0.35)
            axes.plot(x, line["value"], color=colour, marker=marker, clip_on=False)
            ends.append((x[-1], line["value"].iloc[-1], variant, colour))
        axes.set(title=title, xlabel="draft step $k$", xlim=(-0.25, steps[-1] + 0.25), xticks=steps)
        axes.grid(axis="x", visible=False)
        if zero_line:
            axes.axhline(0, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
        else:
            highest = table.loc[table["metric"] == metric, ["value", "high"]].max().max()
            axes.set_ylim(0, np.clip(np.nan_to_num(1.08 * highest, nan=1.0), 0.05, 1.02))
        _label_ends(axes, ends)
    figure.axes[0].set_ylabel(ylabel)
    return figure


def _label_ends(axes: Axes, ends: list[tuple]) -> None:
    """Write each line's name at its right end, (x, y, name, colour) each; names that would overlap move apart."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    heights = spread([y for _, y, _, _ in ends], 0.065 * (high - low))
    for (x, _, name, colour), height in zip(ends, heights):
        where = (x + 0.35, height)
        axes.annotate(name, where, color=colour, va="center", fontsize=9.5, weight="bold", annotation_clip=False)


def spread(heights: list[float], gap: float) -> list[float]:
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


@mpl.rc_context(STYLE)
def draw_retention(table: pd.DataFrame) -> Figure:
    """Retention as bars with 95% intervals; the line at 1 is a drafter that does not decay.

    ``table`` is ``pick(summary, "retention", "chain_retention")``.
    """
    variants = in_order(table["variant"])
    figure = Figure(figsize=(9.6, 1.5 + 0.42 * len(variants)), layout="constrained")
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
            axes.text(end + 0.02 * edge, y, shown, va="center", fontsize=9.5)
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
    figure = Figure(figsize=(7.6, 1.6 + 0.52 * len(variants)), layout="constrained")
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


def training_table(history: pd.DataFrame) -> pd.DataFrame:
    """Mean ``loss`` over draft steps of both splits, and validation ``acceptance`` at the first and the last step."""
    run = ["variant", "seed", "split", "trained_tokens"]
    loss = history.dropna(subset=["loss"]).groupby(run, sort=False)["loss"].mean().rename("value").reset_index()
    held_out = history[history["split"] == "validation"].dropna(subset=["acceptance", "draft_step"])
    ends = held_out[held_out["draft_step"].isin([held_out["draft_step"].min(), held_out["draft_step"].max()])]
    acceptance = ends.rename(columns={"acceptance": "value"})
    both = pd.concat([loss.assign(metric="loss"), acceptance.assign(metric="acceptance")], ignore_index=True)
    both["draft_step"] = both["draft_step"].astype("Int64")
    return both[["variant", "seed", "split", "metric", "draft_step", "trained_tokens", "value"]]


@mpl.rc_context(STYLE)
def draw_training(table: pd.DataFrame) -> Figure:
    """Loss and validation acceptance by trained tokens, a line per seed; ``table`` is ``training_table(history)``."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    keys, last_step = ["variant", "seed", "split", "metric", "draft_step"], table["draft_step"].max()
    held_out = ((table["metric"] == "loss") & (table["split"] == "validation")).any()
    for (variant, _, split, metric, step), line in table.groupby(keys, sort=False, dropna=False):
        faint = {"lw": 0.9, "alpha": 0.35} if held_out and split == "train" else {"marker": "."}
        dashes = (0, (4, 2)) if metric == "acceptance" and step == last_step else "-"
        axes = left if metric == "loss" else right
        axes.plot(line["trained_tokens"] / 1000, line["value"], color=look(variant)[0], ls=dashes, **faint)
    told = "thick: validation, thin: training" if held_out else "training documents"
    left.set(title=f"Loss, mean over draft steps\n{told}", ylabel="cross-entropy, nats")
    right.set(title=f"Step acceptance on validation documents\nsolid: step 0, dashed: step {last_step}", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="trained tokens, thousands", xlim=(0, None))
    variants = in_order(table["variant"])
    left.legend(handles=[left.plot([], [], color=look(variant)[0], label=variant)[0] for variant in variants])
    return figure
