"""How every figure of the study looks, and how it is written and shown.

A figure drawn twice has the same bytes: nothing is random, the font is matplotlib's own, and no date or version goes into the file.
Colours are Okabe and Ito's (safe for the colour-blind), one meaning each; a variant's own stand in the registry.
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
from matplotlib.figure import Figure
from PIL import Image

from ..drafters.variants import VARIANTS
from ..drafters.variants import in_study_order as in_order
from ..errors import StudyError
from ..files import write_atomically, write_csv
from ..metrics.tables import rounded

WIDTH = 8.8  # inches of every figure: 985 pixels, shown at 800
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
# Variants that the registry does not name (a reader's own, a published checkpoint) look like their kin.
KIN = {
    "hidden": ("#0072B2", "v"),
    "kv": ("#D55E00", "P"),
    "hybrid": ("#009E73", "v"),
    "block": ("#CC79A7", "<"),
    "": ("#000000", "*"),
}
PART_COLOURS = {
    "prefill": "#56B4E9",
    "verify": "#0072B2",
    "draft": "#D55E00",
    "project": "#E69F00",
    "bookkeeping": "#444444",
    "sampling": "#888888",
    "rest": "#cccccc",
}


def look(variant: str) -> tuple[str, str]:
    """(colour, marker) of a variant, the same in every figure."""
    known = VARIANTS.get(variant)
    return (known.colour, known.marker) if known else next(own for kin, own in KIN.items() if variant.startswith(kin))


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


# Until the last notebook has moved on.

MAIN_VARIANTS = ("hidden", "kv_1", "kv_2", "kv_4", "hybrid", "hybrid_warm", "none_1")
MOST_LINES = 7


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


def top(table: pd.DataFrame) -> float:
    """Upper end of a y axis that starts at 0 and holds every value and interval of ``table``, shares of 1."""
    return float(np.clip(np.nan_to_num(1.08 * table[["value", "high"]].max().max(), nan=1.0), 0.05, 1.02))


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
