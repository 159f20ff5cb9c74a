"""How every figure of the study looks, and how it is written and shown.

A figure drawn twice has the same bytes: nothing is random, the font is matplotlib's own, and no date or version goes
into the file. Colours are Okabe and Ito's (safe for the colour-blind); a variant's own stand in the registry.
"""

import base64
import html
import io
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from ..drafters.variants import VARIANTS
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
# Variants that the registry does not name (a reader's own) look like their kin.
KIN = {"hidden": ("#0072B2", "v"), "kv": ("#D55E00", "P"), "hybrid": ("#009E73", "v"), "block": ("#CC79A7", "<")}
KIN |= {"": ("#000000", "*")}  # any other
# Parts of a decoded token's time: neutral, and the yellow that no variant has for what the drafter adds.
PART_COLOURS = {
    "prefill": "#b5b5b5",
    "verify": "#6b6b6b",
    "draft": "#F0E442",
    "project": "#a89b00",
    "bookkeeping": "#222222",
    "sampling": "#d0d0d0",
    "rest": "#e8e8e8",
}


def look(variant: str) -> tuple[str, str]:
    """(colour, marker) of a variant, the same in every figure, and of one that comes with the repository."""
    known = VARIANTS.get(variant.removesuffix("_checkpoint"))
    return (known.colour, known.marker) if known else next(own for kin, own in KIN.items() if variant.startswith(kin))


class Picture:
    """A picture that a notebook displays with its alternative text.

    As HTML, for JupyterLab drops the text that a PNG carries in its metadata. As plain text it is the text alone.
    """

    def __init__(self, path: Path, alt: str):
        self.path, self.alt = Path(path), " ".join(alt.split())

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.path.read_bytes()).decode()
        return f'<img width="800" alt="{html.escape(self.alt)}" src="data:image/png;base64,{data}">'


def show(figure: Figure, table: pd.DataFrame, folder: str | Path, name: str, alt: str) -> Picture:
    """Write ``<name>.png`` and, beside it, the table that it shows as ``<name>.csv``; return what a notebook displays.

    ``alt`` says in a sentence or two what a reader sees who can't see it: axes, who is above whom, and by how much.
    The picture keeps 256 colours, which takes a third of the bytes and can't be seen in a chart: figures are tracked,
    in notebooks too.
    """
    path, drawn = Path(folder) / f"{name}.png", io.BytesIO()
    write_csv(path.with_suffix(".csv"), rounded(table))
    figure.savefig(drawn, dpi=112)
    picture = _in_256_colours(Image.open(drawn).convert("RGB"))
    return Picture(write_atomically(path, lambda p: picture.save(p, optimize=True)), alt)


def _in_256_colours(picture: Image.Image) -> Image.Image:
    """The picture in 256 colours: the 128 of most pixels (pale bands, say) and 128 far apart (thin lines)."""
    packed = np.asarray(picture).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    colours, place, pixels = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1)
    apart = picture.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).getpalette()
    palette = np.concatenate([colours[np.argsort(-pixels, kind="stable")[:128]], np.reshape(apart, (-1, 3))])
    nearest = np.array([((palette - colour) ** 2).sum(-1).argmin() for colour in colours], np.uint8)
    found = Image.fromarray(nearest[place].reshape(packed.shape), "P")
    found.putpalette(palette.astype(np.uint8).tobytes())
    return found
