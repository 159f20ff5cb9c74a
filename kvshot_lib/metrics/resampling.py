"""95% intervals of the acceptance metrics: a bootstrap over documents, paired across runs (no torch).

Documents, not anchors, are drawn: the anchors of one answer share its topic and its loops, so they are no
independent sample. Every run is evaluated on the same documents and sees the same resamples of them, so differences
have intervals too.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import StudyError
from .acceptance import COUNTS, METRICS, RUNS, metrics_of


def resample_weights(documents: int, samples: int, seed: int) -> np.ndarray:
    """How often each document stands in each bootstrap resample: int [1 + samples, documents], row 0 all ones."""
    if samples < 1:
        raise StudyError(f"bootstrap_samples={samples} must be 1 or more; 2000 is usual")
    drawn = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=samples)
    return np.concatenate([np.ones((1, documents), dtype=drawn.dtype), drawn])


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
    keys = counts[["variant", "seed"]].drop_duplicates().reset_index(drop=True)
    by_run, lengths_by_run = counts.groupby(["variant", "seed"]), run_lengths.groupby(["variant", "seed"])
    stacked, stacked_runs, first = [], [], None
    for key in keys.itertuples(index=False, name=None):
        if key not in lengths_by_run.groups:
            raise StudyError(
                f"run_lengths.csv has no rows for {key[0]} seed {key[1]}: evaluate that run again with 03_train_drafter"
            )
        run = by_run.get_group(key).sort_values(["document", "draft_step"])
        lengths = lengths_by_run.get_group(key).sort_values("document")
        masks = run[["document", "draft_step", "anchors"]].to_numpy(), lengths[["document", "anchors"]].to_numpy()
        first = first or (key, masks)
        if not all(np.array_equal(mine, others) for mine, others in zip(masks, first[1])):
            raise StudyError(
                f"{key[0]} seed {key[1]} and {first[0][0]} seed {first[0][1]} were evaluated on different documents, "
                "draft steps or anchors: evaluate both with the same settings, or remove one of the two runs"
            )
        documents, steps = run["document"].nunique(), run["draft_step"].nunique()
        if (
            len(run) != documents * steps
            or run.duplicated(["document", "draft_step"]).any()
            or len(lengths) != documents
        ):
            raise StudyError(
                f"counts of {key[0]} seed {key[1]} need one row per document and draft step: evaluate that run again"
            )
        stacked.append(run[COUNTS].to_numpy().reshape(documents, steps, len(COUNTS)))
        stacked_runs.append(lengths[RUNS].to_numpy())
    return keys, np.stack(stacked), np.stack(stacked_runs)


@dataclass(frozen=True)
class Interval:
    """A number and its 95% bootstrap interval (percentiles over resampled documents)."""

    value: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """``above`` or ``below`` the threshold if the whole interval is, else ``not distinguishable from``."""
        return "above" if self.low > threshold else "below" if self.high < threshold else "not distinguishable from"

    def __str__(self) -> str:
        edges = f"{self.low:.3f}, {self.high:.3f}" if np.isfinite(self.low) else "no interval"
        return f"{self.value:.3f} [{edges}]"


def interval(draws: np.ndarray) -> Interval:
    """Interval of one row of draws, float [1 + samples].

    NaN if 5% or more of the resamples leave the metric undefined: then one to three documents carry all of it, and
    the resamples agree with one another for no better reason.
    """
    usable = draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(draws[0]) or len(usable) <= 0.95 * (len(draws) - 1):
        return Interval(float(draws[0]), np.nan, np.nan)
    return Interval(float(draws[0]), *(float(edge) for edge in np.percentile(usable, [2.5, 97.5])))


@dataclass(frozen=True)
class Draws:
    """Every metric of every run, on the documents themselves and on resamples of them.

    keys : one row per (variant, seed, metric, draft_step) with ``anchors`` (the metric's denominator) and ``documents``
        (those that have such anchors); ``draft_step`` is missing for scalars.
    values : float [rows, 1 + samples]; column 0 is the measured value, the others are resamples. Column i used the same
        documents in every row, so the difference of two rows has an interval of its own (a paired comparison).
    seed : of the bootstrap.
    """

    keys: pd.DataFrame
    values: np.ndarray
    seed: int = 0

    def rows(self, variant: str, metric: str, draft_step: int | None = None) -> np.ndarray:
        """Draws of one metric, a row per seed: float [seeds, 1 + samples]."""
        return self.values[self._places(variant, metric, draft_step)]

    def anchors(self, variant: str, metric: str, draft_step: int | None = None) -> int:
        """The fewest anchors, over seeds, that the metric rests on."""
        return int(self.keys.loc[self._places(variant, metric, draft_step), "anchors"].min())

    def _places(self, variant: str, metric: str, draft_step: int | None) -> np.ndarray:
        """Which rows are of this metric: bool [rows]; some are."""
        steps = self.keys["draft_step"]
        same_step = steps.isna() if draft_step is None else steps.eq(draft_step).fillna(False)
        found = (self.keys["variant"].eq(variant) & self.keys["metric"].eq(metric) & same_step).to_numpy(dtype=bool)
        if not found.any():
            raise StudyError(
                f"no {metric} (draft_step {draft_step}) of {variant}; variants here: {', '.join(self.variants)}"
            )
        return found

    def mean(self, variant: str, metric: str, draft_step: int | None = None) -> Interval:
        """The mean over seeds, with the interval over documents."""
        return interval(self.rows(variant, metric, draft_step).mean(0))

    def difference(self, a: tuple, b: tuple) -> Interval:
        """a minus b, each (variant, metric[, draft_step]), mean over seeds, on the same resamples of documents."""
        return interval(self.rows(*a).mean(0) - self.rows(*b).mean(0))

    def seeds(self, variant: str) -> int:
        """How many trainings of ``variant`` there are."""
        return int(self.keys.loc[self.keys["variant"].eq(variant), "seed"].nunique())

    def contrast(self, *terms: tuple) -> Interval:
        """A weighted sum of metrics, with the interval over documents *and* seeds (a two-level bootstrap).

        Parameters
        ----------
        terms : (weight, variant, metric[, draft_step]) each; (1, a, m), (-1, b, m) is the difference of two variants
        """
        parts = [weight * (self.seed_weights(term[0]) * self.rows(*term)).sum(0) for weight, *term in terms]
        return interval(np.sum(parts, axis=0))

    def seed_weights(self, variant: str) -> np.ndarray:
        """Weight of each seed of a variant in each resample: float [seeds, 1 + samples], columns sum to 1, column 0 even.

        Each resample draws seeds with replacement, for each variant on its own and alike for all its metrics. It draws
        one seed fewer than there are: resampled means of n draws would vary as s² (n - 1) / n², not as s² / n, a third
        too little for three seeds (Rao and Wu 1988). One seed tells nothing about others; its weight is always 1.
        """
        n, samples = self.seeds(variant), self.values.shape[1] - 1
        drawn = np.ones((samples, 1))
        if n > 1:
            generator = np.random.default_rng([self.seed, *variant.encode()])
            drawn = generator.multinomial(n - 1, np.full(n, 1 / n), size=samples) / (n - 1)
        return np.concatenate([np.full((1, n), 1 / n), drawn]).T

    @property
    def variants(self) -> list[str]:
        return list(self.keys["variant"].unique())


def draw(counts: pd.DataFrame, run_lengths: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """Compute every metric on the evaluation documents and on ``samples`` bootstrap resamples of them."""
    runs, stacked, stacked_runs = stack_counts(counts, run_lengths)
    weights = resample_weights(stacked.shape[1], samples, seed)
    values = metrics_of(_resampled(weights, stacked), _resampled(weights, stacked_runs))
    keys, rows = [], []
    for r, (variant, run_seed) in enumerate(runs.itertuples(index=False, name=None)):
        for metric in METRICS:
            steps = range(stacked.shape[2]) if values[metric].ndim == 3 else [None]
            for step in steps:
                denominator = (
                    stacked_runs[r, :, 0] if metric == "measured_mat" else _denominator(stacked[r], metric, step)
                )
                keys.append([variant, run_seed, metric, step, denominator.sum(), (denominator > 0).sum()])
                rows.append(values[metric][r] if step is None else values[metric][r, :, step])
    keys = pd.DataFrame(keys, columns=["variant", "seed", "metric", "draft_step", "anchors", "documents"])
    return Draws(keys.astype({"draft_step": "Int64"}), np.stack(rows), seed)


def _resampled(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums over documents: weights [samples, documents] and counts [runs, documents, …] -> float64 [runs, samples, …].

    A product of float matrices, which is fast. It is exact: all terms and sums are integers below 2**53.
    """
    flat = counts.reshape(*counts.shape[:2], -1).astype(np.float64)
    return (weights.astype(np.float64) @ flat).reshape(len(counts), len(weights), *counts.shape[2:])


def _denominator(counts: np.ndarray, metric: str, step: int | None) -> np.ndarray:
    """Anchors per document [documents] that a metric divides by; for a scalar those of its last, rarest step."""
    return counts[:, -1 if step is None else step, COUNTS.index("reached" if metric.startswith("chain") else "anchors")]


def acceptance_table(
    counts: pd.DataFrame, run_lengths: pd.DataFrame, samples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The rows of ``acceptance.csv``: each metric of each run with its 95% interval over documents."""
    drawn = draw(counts, run_lengths, samples, seed)
    keys = drawn.keys
    edges = pd.DataFrame([interval(row) for row in drawn.values])
    return pd.concat([keys.iloc[:, :4], edges, keys[["anchors", "documents"]]], axis=1)


def summary_table(draws: Draws) -> pd.DataFrame:
    """Mean over seeds of every metric, with both kinds of uncertainty side by side.

    ``low`` and ``high`` are its 95% interval over documents. ``seed_low`` and ``seed_high`` are the smallest and the
    largest seed (the value itself where there is one seed): how far training again moves it.
    """
    rows = []
    for key, group in draws.keys.groupby(["variant", "metric", "draft_step"], sort=False, dropna=False):
        rows.append([*key, *_uncertainty(draws.values[group.index]), *group[["anchors", "documents"]].min()])
    table = pd.DataFrame(rows, columns=[*_SUMMARY, "anchors", "documents"])
    return table.astype({"draft_step": "Int64", "anchors": int, "documents": int})


def difference_table(draws: Draws, reference: str) -> pd.DataFrame:
    """Every metric of every other variant minus that of ``reference``, on the same documents and resamples.

    The columns are those of ``summary_table`` without anchors and documents. The seed range is that of the variant's
    seeds, each against the reference's mean over its own seeds.
    """
    rows = []
    for key, group in draws.keys.groupby(["variant", "metric", "draft_step"], sort=False, dropna=False):
        variant, metric, step = key
        base = draws.rows(reference, metric, None if pd.isna(step) else step).mean(0)
        if variant != reference:
            rows.append([*key, *_uncertainty(draws.values[group.index] - base)])
    return pd.DataFrame(rows, columns=_SUMMARY).astype({"draft_step": "Int64"})


_SUMMARY = ["variant", "metric", "draft_step", "value", "low", "high", "seed_low", "seed_high", "seeds"]


def _uncertainty(values: np.ndarray) -> list[float]:
    """value, low, high, seed_low, seed_high and seeds of draws [seeds, 1 + samples]."""
    mean = interval(values.mean(0))
    return [mean.value, mean.low, mean.high, values[:, 0].min(), values[:, 0].max(), len(values)]
