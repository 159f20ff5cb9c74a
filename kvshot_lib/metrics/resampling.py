"""95% intervals: a bootstrap over documents, paired across runs.

Documents, not anchors, are drawn: the anchors of one answer share its topic and its loops, so they are no
independent sample. Every run is evaluated on the same documents and sees the same resamples of them, so differences
have intervals too. The resamples are one matrix of weights: its product with the counts of all runs is the whole
bootstrap, exact (integers below 2**53) and faster than a loop over resamples, such as `scipy.stats.bootstrap` runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..drafters.variants import first_name
from ..errors import StudyError
from .acceptance import COUNTS, METRICS, RUNS, metrics_of

KEYS = ["variant", "seed", "metric", "draft_step"]


def resample_weights(documents: int, samples: int, seed: int) -> np.ndarray:
    """How often each document stands in each bootstrap resample: int [1 + samples, documents], row 0 all ones."""
    if samples < 1:
        raise StudyError(f"bootstrap_samples={samples} must be 1 or more; 2000 is usual")
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=samples)
    return np.concatenate([np.ones((1, documents), dtype=drawn.dtype), drawn])


def seed_weights(seeds: int, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Weight of each seed in each resample: float [1 + samples, seeds], rows sum to 1, row 0 even.

    Seeds are drawn with replacement, one fewer than there are: resampled means of n draws would vary as
    s² (n - 1) / n², not as s² / n, a third too little for three seeds (Rao and Wu 1988). One seed tells nothing about
    others; its weight is always 1.
    """
    drawn = np.ones((samples, 1))
    if seeds > 1:
        drawn = generator.multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=samples) / (seeds - 1)
    return np.concatenate([np.full((1, seeds), 1 / seeds), drawn])


@dataclass(frozen=True)
class Interval:
    """A number and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """``above`` or ``below`` the threshold if the whole interval is, else ``not distinguishable from``."""
        return "above" if self.low > threshold else "below" if self.high < threshold else "not distinguishable from"

    def __str__(self) -> str:
        return with_interval(self)


def with_interval(found, form: str = ".3f") -> str:
    """An `Interval`, or a table's row that has one, as text: with ``+.2f`` +0.14 [−0.10, +0.37]; of NaN ""."""
    parts = found.value, found.low, found.high
    value, low, high = ("" if np.isnan(part) else f"{part:{form}}".replace("-", "−") for part in parts)
    return f"{value} [{low}, {high}]" if low else value and f"{value} [no interval]"


def interval(draws: np.ndarray) -> Interval:
    """Percentiles 2.5 and 97.5 of one row of draws, float [1 + samples]; draws[0] is the measured value.

    NaN if 5% or more of the resamples leave the metric undefined: then one to three documents carry all of it, and
    the resamples agree with one another for no better reason.
    """
    usable = draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(draws[0]) or len(usable) <= 0.95 * (len(draws) - 1):
        return Interval(float(draws[0]), np.nan, np.nan)
    return Interval(float(draws[0]), *(float(edge) for edge in np.percentile(usable, [2.5, 97.5])))


@dataclass(frozen=True)
class Draws:
    """Metrics of every run, on the documents themselves and on resamples of them.

    keys : one row per (variant, seed, metric, draft_step), or other ``by`` in place of the last two; ``draft_step`` is
        missing for scalars. Where they are known ``anchors`` (the metric's denominator) and ``documents`` (those that
        have such anchors) stand beside them.
    values : float [rows, 1 + samples]; column 0 is the measured value, the others are resamples. Column i used the same
        documents in every row, so the difference of two rows has an interval of its own (a paired comparison).
    seed : of the bootstrap.
    """

    keys: pd.DataFrame
    values: np.ndarray
    seed: int = 0

    @property
    def variants(self) -> list[str]:
        return list(self.keys["variant"].unique())

    def seeds(self, variant: str, metric: str | None = None) -> int:
        """How many trainings of ``variant`` there are (that have the metric)."""
        own = self.keys["variant"].eq(variant) & (self.keys["metric"].eq(metric) if metric else True)
        return int(self.keys.loc[own, "seed"].nunique())

    def has(self, variant: str, metric: str, draft_step: int | None = None) -> bool:
        """Whether that was measured."""
        return bool(self._places(variant, metric, draft_step).any())

    def rows(self, variant: str, metric: str, draft_step: int | None = None) -> np.ndarray:
        """Draws of one metric, a row per seed: float [seeds, 1 + samples]."""
        found = self._places(variant, metric, draft_step)
        if not found.any():
            raise StudyError(
                f"no {metric} (draft_step {draft_step}) of {variant}; variants here: {', '.join(self.variants)}"
            )
        return self.values[found]

    def mean(self, variant: str, metric: str, draft_step: int | None = None) -> Interval:
        """The mean over seeds, with the interval over documents."""
        return interval(self.rows(variant, metric, draft_step).mean(0))

    def contrast(self, *terms: tuple) -> Interval:
        """A weighted sum of metrics, with the interval over documents *and* seeds.

        Parameters
        ----------
        terms : (weight, variant, metric[, draft_step]) each; (1, a, m), (-1, b, m) is the difference of two variants
        """
        return interval(self.contrast_draws(*terms))

    def contrast_draws(self, *terms: tuple) -> np.ndarray:
        """Draws of a `contrast`, float [1 + samples]; seeds are drawn for each variant, alike for all its metrics."""
        parts = []
        for weight, variant, *which in terms:
            rows = self.rows(variant, *which)
            parts.append(weight * (self.weights_of(variant, len(rows)) * rows).sum(0))
        return np.sum(parts, axis=0)

    def weights_of(self, variant: str, seeds: int | None = None) -> np.ndarray:
        """`seed_weights` of a variant's seeds (all of them by default): float [seeds, 1 + samples]."""
        generator = np.random.default_rng([self.seed, *first_name(variant).encode()])  # a new name moves no interval
        return seed_weights(seeds or self.seeds(variant), self.values.shape[1] - 1, generator).T

    def _places(self, variant: str, metric: str, draft_step: int | None) -> np.ndarray:
        """Which rows are of this metric: bool [rows]."""
        steps = self.keys["draft_step"]
        same_step = steps.isna() if draft_step is None else steps.eq(draft_step).fillna(False)
        return (self.keys["variant"].eq(variant) & self.keys["metric"].eq(metric) & same_step).to_numpy(dtype=bool)


def drawn_as(keys: Sequence[Sequence], values: Sequence[np.ndarray], samples: int, seed: int, columns=KEYS) -> Draws:
    """Draws from a row of keys and of values [1 + samples] each; of nothing, too."""
    table = pd.DataFrame(keys, columns=columns)
    table = table.astype({"draft_step": "Int64"}) if "draft_step" in columns else table
    return Draws(table, np.array(values, dtype=float).reshape(len(keys), 1 + samples), seed)


def joined(parts: Sequence[Draws]) -> Draws:
    """Draws of several tables as one; they must have the same number of samples."""
    keys, values = zip(*((part.keys, part.values) for part in parts))
    return Draws(pd.concat(keys, ignore_index=True), np.concatenate(values), parts[0].seed)


def draw(counts: pd.DataFrame, run_lengths: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """Compute every metric on the evaluation documents and on ``samples`` bootstrap resamples of them."""
    runs, stacked, lengths = stack_counts(counts, run_lengths)
    weights = resample_weights(stacked.shape[1], samples, seed)
    values = metrics_of(_resampled(weights, stacked), _resampled(weights, lengths))
    keys, rows = [], []
    for r, run in enumerate(runs.itertuples(index=False, name=None)):
        for metric in METRICS:
            for step in range(stacked.shape[2]) if values[metric].ndim == 3 else [None]:
                if metric == "measured_mat":
                    denominator = lengths[r, :, 0]
                else:  # a scalar divides by that of its last, rarest step
                    name = "reached" if metric.startswith("chain") else "anchors"
                    denominator = stacked[r, :, -1 if step is None else step, COUNTS.index(name)]
                keys.append([*run, metric, step, denominator.sum(), (denominator > 0).sum()])
                rows.append(values[metric][r] if step is None else values[metric][r, :, step])
    return drawn_as(keys, rows, samples, seed, [*KEYS, "anchors", "documents"])


def draw_ratios(
    table: pd.DataFrame, by: Sequence[str] = (), samples: int = 2000, seed: int = 0, *, root: bool = False
) -> Draws:
    """Σ top / Σ bottom over documents of every run and ``by``, on the table's documents and on resamples of them.

    Of two documents with 0 of 5 and 6 of 6 it is 6 / 11, on resamples 0, 6 / 11 or 1.

    Parameters
    ----------
    table : with variant, seed, document, ``by``, top and bottom; several rows of one document are summed.
    root : take the square root.

    Returns
    -------
    Draws with keys variant, seed, ``by``, anchors (Σ bottom) and documents.
    """
    documents = np.unique(table["document"])
    weights = resample_weights(max(1, len(documents)), samples, seed).astype(float)
    keys, values = [], []
    for key, cell in table.groupby(["variant", "seed", *by], sort=False, dropna=False):
        sums = cell.groupby("document")[["top", "bottom"]].sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            top, bottom = (weights @ sums.reindex(documents, fill_value=0).to_numpy(float)).T
            values.append(np.sqrt(top / bottom) if root else top / bottom)
        keys.append([*key, cell["bottom"].sum(), len(sums)])
    return drawn_as(keys, values, samples, seed, ["variant", "seed", *by, "anchors", "documents"])


def _resampled(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over documents: [samples, documents] and [runs, documents, …] -> float64 [runs, samples, …]."""
    flat = counts.reshape(*counts.shape[:2], -1).astype(np.float64)
    return (weights.astype(np.float64) @ flat).reshape(len(counts), len(weights), *counts.shape[2:])


def stack_counts(counts: pd.DataFrame, run_lengths: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Arrange the tables as arrays and check that their runs can be compared.

    Returns
    -------
    keys : the (variant, seed) of each run, in order of first appearance
    counts : int [runs, documents, K, 4]
    runs : int [runs, documents, 2]

    Raises
    ------
    StudyError : two runs differ in their evaluation documents, draft steps or valid anchors (then a difference between
        them could come from the mask), or a row is missing or double
    """
    run = ["variant", "seed"]
    keys = counts[run].drop_duplicates().reset_index(drop=True)
    by_run = dict(iter(counts.sort_values(["document", "draft_step"]).groupby(run)))
    lengths_by_run = dict(iter(run_lengths.sort_values("document").groupby(run)))
    stacked, stacked_runs, first = [], [], None
    for key in keys.itertuples(index=False, name=None):
        name = f"{key[0]} seed {key[1]}"
        if key not in lengths_by_run:
            raise StudyError(f"run_lengths has no rows for {name}: evaluate that run again with 03_train_drafter")
        own, lengths = by_run[key], lengths_by_run[key]
        masks = own[["document", "draft_step", "anchors"]].to_numpy(), lengths[["document", "anchors"]].to_numpy()
        first = first or (name, masks)
        if not all(np.array_equal(mine, others) for mine, others in zip(masks, first[1])):
            raise StudyError(
                f"{name} and {first[0]} were evaluated on different documents, draft steps or anchors: "
                "evaluate both with the same settings, or remove one of the two runs"
            )
        shape = own["document"].nunique(), own["draft_step"].nunique()
        if own.duplicated(["document", "draft_step"]).any() or (len(own), len(lengths)) != (np.prod(shape), shape[0]):
            raise StudyError(f"counts of {name} need one row per document and draft step: evaluate that run again")
        stacked.append(own[COUNTS].to_numpy().reshape(*shape, len(COUNTS)))
        stacked_runs.append(lengths[RUNS].to_numpy())
    return keys, np.stack(stacked), np.stack(stacked_runs)


def acceptance_table(
    counts: pd.DataFrame, run_lengths: pd.DataFrame, samples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The rows of table ``acceptance``: each metric of each run with its 95% interval over documents."""
    drawn = draw(counts, run_lengths, samples, seed)
    edges = pd.DataFrame([interval(row) for row in drawn.values])
    return pd.concat([drawn.keys.iloc[:, :4], edges, drawn.keys[["anchors", "documents"]]], axis=1)


def summary_table(draws: Draws, by: Sequence[str] = ("variant", "metric", "draft_step")) -> pd.DataFrame:
    """Mean over seeds of everything drawn, with both kinds of uncertainty side by side.

    ``low`` and ``high`` are its 95% interval over documents. ``seed_low`` and ``seed_high`` are the smallest and the
    largest seed (the value itself where there is one seed): how far training again moves it.
    """
    rows = []
    for key, group in draws.keys.groupby(list(by), sort=False, dropna=False):
        values = draws.values[group.index]
        mean, measured = interval(values.mean(0)), values[:, 0]
        edges = [mean.value, mean.low, mean.high, measured.min(), measured.max(), len(values)]
        rows.append([*key, *edges, *group[["anchors", "documents"]].min()])
    numbers = ["value", "low", "high", "seed_low", "seed_high", "seeds", "anchors", "documents"]
    types = {"draft_step": "Int64", "documents": int} if "draft_step" in by else {"documents": int}
    return pd.DataFrame(rows, columns=[*by, *numbers]).astype(types)
