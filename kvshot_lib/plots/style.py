"""The study's figures: each function draws one tidy table, and ``save_figure`` writes picture and table side by side.

A figure drawn twice has the same bytes: nothing here is random, the font is matplotlib's own, and no date or version
goes into the file. Colours are Okabe and Ito's (safe for the colour-blind); a variant has the same one everywhere.
"""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from ..drafters.variants import MAIN_VARIANTS, VARIANTS
from ..errors import StudyError
from ..files import write_atomically, write_csv
from ..metrics.tables import in_order, rounded

LEAST_ANCHORS = 50
WIDTH = 8.8  # inches of every figure: 986 pixels, shown at 800
MOST_LINES = 7  # more lines than this in one panel can't be told apart
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
# Colour and marker of each variant: a hue for what is read (hidden states, KV cache, both), a marker shape
# for the architecture, grey for controls that see no target.
LOOKS = {
    "hidden": ("#0072B2", "o"),
    "hidden_post_norm": ("#56B4E9", "o"),
    "hidden_continued": ("#00456b", "o"),
    "hidden_31": ("#7a86d6", "p"),
    "hidden_31_continued": ("#2f3b8f", "p"),
    "kv_1": ("#E69F00", "s"),
    "kv_2": ("#D55E00", "s"),
    "kv_3": ("#a34700", "s"),
    "kv_4": ("#6e3000", "s"),
    "kv_4_unrotate_mlp": ("#3d1a00", "P"),
    "kv_4_unrotate_mlp_continued": ("#1f0d00", "p"),
    "states_2": ("#56B4E9", "s"),
    "states_2_continued": ("#2f7fb8", "s"),
    "states_4": ("#1c5d99", "s"),
    "states_4_continued": ("#0c3866", "s"),
    "both_2": ("#a9bf5a", "s"),
    "both_4": ("#7f9a2c", "s"),
    "both_4_continued": ("#56700a", "s"),
    "hybrid": ("#009E73", "D"),
    "hybrid_warm_31": ("#00382a", "d"),
    "hybrid_warm": ("#005c43", "D"),
    "cross_only_warm": ("#6fcbb1", "D"),
    "none_1": ("#444444", "X"),
    "kv_2_zero": ("#777777", "X"),
    "kv_2_shuffled": ("#aaaaaa", "X"),
    "block_kv_1": ("#e3b3cc", "^"),
    "block_kv_2": ("#CC79A7", "^"),
    "block_kv_4": ("#7d3c61", "^"),
    "block_states_1": ("#9aa6d6", "v"),
    "block_states_2": ("#5b6fb5", "v"),
    "block_states_4": ("#34437f", "v"),
    "block_both_2": ("#8064a2", "<"),
    "block_both_4": ("#523a70", "<"),
}
# Other variants have the look of their paradigm.
FAMILIES = {"hidden": ("#0072B2", "v"), "kv": ("#c98a5e", "P"), "hybrid": ("#009E73", "v"), "block": ("#CC79A7", "^")}


def look(variant: str) -> tuple[str, str]:
    """(colour, marker) of a variant, the same in every figure."""
    known = VARIANTS.get(variant)
    if getattr(known, "colour", ""):
        return known.colour, known.marker
    family = next((known for name, known in FAMILIES.items() if variant.startswith(name)), ("#000000", "*"))
    return LOOKS.get(variant, family)


PART_COLOURS = {
    "prefill": "#56B4E9",
    "verify": "#0072B2",
    "draft": "#D55E00",
    "project": "#E69F00",
    "bookkeeping": "#444444",
    "sampling": "#888888",
    "rest": "#cccccc",
}


class Picture:
    """A picture that a notebook displays with its alternative text.

    As HTML, for JupyterLab and GitHub drop the text that a PNG output carries in its metadata; as plain text it is the text alone.
    """

    def __init__(self, path: Path, alt: str):
        self.path, self.alt = Path(path), " ".join(alt.split())

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode()
        return f'<img width="800" alt="{html.escape(self.alt)}" src="data:image/png;base64,{data}">'


def show(figure: Figure, table: pd.DataFrame, folder: str | Path, name: str, alt: str) -> Picture:
    """Write figure and table into ``folder`` (`save_figure`); return what a notebook displays.

    ``alt`` says in a sentence or two what a reader sees who can't see it: axes, who is above whom, and by how much.
    """
    return Picture(save_figure(figure, table, folder, name), alt)


def save_figure(figure: Figure, table: pd.DataFrame, figures_dir: str | Path, name: str) -> Path:
    """Write ``<name>.png`` and, beside it, the table that it shows as ``<name>.csv``; return the picture's path.

    The picture keeps 256 colours, which takes a third of the bytes and can't be seen in a chart: figures are tracked, in notebooks too.
    """
    path, drawn = Path(figures_dir) / f"{name}.png", io.BytesIO()
    write_csv(path.with_suffix(".csv"), rounded(table))
    figure.savefig(drawn, dpi=112)
    picture = _in_256_colours(Image.open(drawn).convert("RGB"))
    return write_atomically(path, lambda p: picture.save(p, optimize=True))


def _in_256_colours(picture: Image.Image) -> Image.Image:
    """The picture with the 128 colours that most of its pixels have (pale bands, say), 128 that are far apart (thin lines), and the nearest of these."""
    packed = np.asarray(picture).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    colours, place, pixels = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1)
    apart = picture.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).getpalette()
    palette = np.concatenate([colours[np.argsort(-pixels, kind="stable")[:128]], np.reshape(apart, (-1, 3))])
    nearest = np.concatenate(
        [
            ((part[:, None] - palette) ** 2).sum(-1).argmin(1)
            for part in np.array_split(colours, 1 + len(colours) // 4096)
        ]
    )
    found = Image.fromarray(nearest[place].astype(np.uint8).reshape(packed.shape), "P")
    found.putpalette(palette.astype(np.uint8).tobytes())
    return found


def main_variants(measured: Iterable[str], wanted: Iterable[str] = MAIN_VARIANTS, reference: str = "") -> list[str]:
    """The variants that line figures show, in order: all of a few, else those of ``wanted`` that there are, and ``reference``."""
    measured = in_order(measured)
    chosen = [variant for variant in measured if variant in {*wanted, reference}]
    return measured if len(measured) <= MOST_LINES or not chosen else chosen


def of(table: pd.DataFrame, variants: Iterable[str]) -> pd.DataFrame:
    """The rows of some variants."""
    return table[table["variant"].isin(list(variants))].reset_index(drop=True)


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
def draw_chain(table: pd.DataFrame) -> Figure:
    """Step and chain acceptance of each variant in a panel of its own; ``table`` is that of `draw_decay`."""
    variants = in_order(table["variant"])
    columns = min(4, len(variants))
    rows = -(-len(variants) // columns)
    figure = Figure(figsize=(9.6, 0.6 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    styles = {"step_acceptance": ("-", "full"), "chain_acceptance": ((0, (3, 2)), "none")}
    for axes, variant in zip(panels, variants):
        colour, marker = look(variant)
        for metric, (dashes, fill) in styles.items():
            line = table[(table["variant"] == variant) & (table["metric"] == metric)].dropna(subset=["value"])
            x = line["draft_step"].to_numpy(int)
            axes.fill_between(x, line["low"].to_numpy(), line["high"].to_numpy(), color=colour, alpha=0.15, lw=0)
            axes.plot(x, line["value"], color=colour, ls=dashes, marker=marker, ms=5, fillstyle=fill)
        axes.set(title=variant, ylim=(0, top(table)), xticks=sorted(table["draft_step"].unique()))
        axes.grid(axis="x", visible=False)
    for axes in list(figure.axes)[len(variants) :]:
        axes.set_axis_off()
    for place, axes in enumerate(figure.axes[: len(variants)]):
        if place % columns == 0:
            axes.set_ylabel("acceptance")
        if place + columns >= len(variants):
            axes.set_xlabel("draft step $k$")
            axes.tick_params(labelbottom=True)
    names = {
        "step_acceptance": "step acceptance: all anchors",
        "chain_acceptance": "chain acceptance: earlier steps all matched",
    }
    handles = [
        Line2D([], [], color="#555555", ls=dashes, marker="o", ms=5, fillstyle=fill, label=names[metric])
        for metric, (dashes, fill) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


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
            axes.set_ylim(0, top(table[table["metric"] == metric]))
        label_ends(axes, ends, steps[-1])
    figure.axes[0].set_ylabel(ylabel)
    return figure


def top(table: pd.DataFrame) -> float:
    """Upper end of a y axis that starts at 0 and holds every value and interval of ``table``, shares of 1."""
    return float(np.clip(np.nan_to_num(1.08 * table[["value", "high"]].max().max(), nan=1.0), 0.05, 1.02))


def label_ends(axes: Axes, ends: list[tuple], right: float) -> None:
    """Write each line's name right of x = ``right``, (x, y, name, colour) each; names that would overlap move apart.

    A dotted thread leads from the line's end to a name that is not beside it.
    """
    low, high = axes.get_ylim()
    width = right - axes.get_xlim()[0]
    ends = sorted(ends, key=lambda end: end[1])
    gap, limit = 0.065 * (high - low), high
    heights = spread([y for _, y, _, _ in ends], gap)
    for place in reversed(range(len(heights))):  # none above the axis, where the title is
        heights[place] = min(heights[place], limit)
        limit = heights[place] - gap
    for (x, y, name, colour), height in zip(ends, heights):
        where = (right + 0.055 * width, height)
        axes.annotate(name, where, color=colour, va="center", fontsize=9.5, weight="bold", annotation_clip=False)
        if x < right or abs(y - height) > 0.02 * (high - low):
            thread = ([x, right + 0.045 * width], [y, height])
            axes.plot(*thread, color=colour, lw=0.8, ls=(0, (1, 2)), clip_on=False, scalex=False, scaley=False)


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
