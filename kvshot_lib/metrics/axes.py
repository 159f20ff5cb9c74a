"""Acceptance along the text, by generated offset and by context length: intervals from the counts in ``axes.csv``."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import StudyError
from .acceptance import FIRST_BIN
from .resampling import Interval, interval, resample_weights

CELL = ["axis", "bin_low", "draft_step"]


@dataclass(frozen=True)
class AxisDraws:
    """Step acceptance of every run in every cell (axis, bin, draft step), measured and on resamples of the documents.

    keys : one row per (variant, seed, axis, bin_low, draft_step) with its ``anchors`` and ``documents``.
    values : float [rows, 1 + samples]; column 0 is measured. Column i used the same documents in every row, and the same as
        column i of `bootstrap.Draws` with the same seed and documents.
    """

    keys: pd.DataFrame
    values: np.ndarray

    def rows(self, variant: str, axis: str, bin_low: int, draft_step: int) -> np.ndarray:
        """Draws of one cell, a row per seed: float [seeds, 1 + samples]."""
        keys = self.keys
        found = (keys["variant"] == variant) & (keys["axis"] == axis)
        found &= (keys["bin_low"] == bin_low) & (keys["draft_step"] == draft_step)
        if not found.any():
            raise StudyError(f"no anchors of {variant} in {axis} from {bin_low} on at draft step {draft_step}")
        return self.values[found.to_numpy()]

    def difference(self, a: tuple, b: tuple) -> Interval:
        """Cell a minus cell b, each (variant, axis, bin_low, draft_step), mean over seeds, on the same resamples."""
        return interval(self.rows(*a).mean(0) - self.rows(*b).mean(0))


def draw_axes(axes: pd.DataFrame, documents: int, samples: int = 2000, seed: int = 0) -> AxisDraws:
    """Compute the acceptance of every cell on the documents and on ``samples`` bootstrap resamples of them.

    Parameters
    ----------
    axes : the table ``axes``
    documents : the number of evaluation documents, those without any anchor too
    """
    weights = resample_weights(documents, samples, seed).astype(np.float64)
    keys, values = [], []
    for key, cell in axes.groupby(["variant", "seed", *CELL], sort=False):
        counts = np.zeros((documents, 2))
        counts[cell["document"]] = cell[["anchors", "matches"]]
        anchors, matches = (weights @ counts).T
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(matches / anchors)
        keys.append([*key, cell["anchors"].sum(), len(cell)])
    keys = pd.DataFrame(keys, columns=["variant", "seed", *CELL, "anchors", "documents"])
    return AxisDraws(keys, np.stack(values))


def axis_table(draws: AxisDraws, least_anchors: int = 0) -> pd.DataFrame:
    """Acceptance in each cell, mean over seeds, with its interval over documents and the range of seeds.

    Cells that rest on fewer than ``least_anchors`` anchors are left out.
    """
    rows = []
    for key, group in draws.keys.groupby(["variant", *CELL], sort=True):
        values = draws.values[group.index]
        mean, measured = interval(values.mean(0)), values[:, 0]
        numbers = [mean.value, mean.low, mean.high, measured.min(), measured.max(), len(group)]
        rows.append([*key, *numbers, *group[["anchors", "documents"]].min()])
    columns = ["variant", *CELL, "value", "low", "high", "seed_low", "seed_high", "seeds", "anchors", "documents"]
    table = pd.DataFrame(rows, columns=columns)
    return table[table["anchors"] >= least_anchors].reset_index(drop=True)


def bin_names(bins: list[int]) -> list[str]:
    """What bins with these lower edges hold: 0 is 0-15, 16 is 16-31, 64 is 64-127."""
    return [f"{low}-{2 * max(low, FIRST_BIN // 2) - 1}" for low in bins]
