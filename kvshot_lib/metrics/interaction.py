"""Does acceptance fall faster with the attention shift for one drafter than for another? (no torch)

For each run and draft step a logistic regression, log-odds of a match = b0 + b1 shift + b2 entropy, both
predictors in standard deviations over all anchors of that step. A model of two drafters with drafter × (shift +
entropy) has every term once for each, so it is these two regressions, and its interaction is the difference of
their b1, on the same anchors.

Anchors of one document are no independent sample: intervals come from resampled documents, the same ones for
every run. A resample's slopes are one Newton step from the fit, with that resample's own score and information
(summed from those of each document); tests hold that to a full fit on every resample.
"""

import numpy as np
import pandas as pd

from ..errors import StudyError
from .resampling import KEYS, Draws, drawn_as, resample_weights

SHIFT_BINS, ENTROPY_BINS = 5, 4
LEAST_MATCHES = 50  # fewer matches (or misses) can't carry three coefficients and their resamples: no slope


def fit_logistic(x: np.ndarray, y: np.ndarray, iterations: int = 30) -> np.ndarray:
    """Coefficients [p] that maximise the likelihood of y in {0, 1} given x [n, p], by Newton's method; NaN if none do.

    With x = 1 alone: the log-odds of the mean. With x = 1 and a group's indicator: the log-odds of the others, and the
    difference of the group's.
    """
    beta = np.zeros(x.shape[1])
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        information = (x * (p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(information) > 1e12:
            return np.full(x.shape[1], np.nan)
        step = np.linalg.solve(information, x.T @ (y - p))
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            return beta
    return np.full(x.shape[1], np.nan)  # perfectly separated: no maximum


def slope_draws(x: np.ndarray, y: np.ndarray, document: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Coefficients of `fit_logistic` on the documents and on resamples of them: [1 + samples, p].

    ``document`` [n] int, ``weights`` [1 + samples, documents] from `resample_weights`.
    """
    beta, documents = fit_logistic(x, y), weights.shape[1]
    p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
    score = x * (y - p)[:, None]
    information = x[:, :, None] * x[:, None, :] * (p * (1 - p))[:, None, None]
    score, information = (_by_document(part, document, documents) for part in (score, information))
    total = np.tensordot(weights.astype(float), information, axes=1)
    singular = ~(np.linalg.cond(np.nan_to_num(total)) < 1e12)
    total[singular] = np.eye(x.shape[1])
    step = np.linalg.solve(total, (weights @ score)[..., None])[..., 0]
    step[singular] = np.nan
    return beta + step


def _by_document(rows: np.ndarray, document: np.ndarray, documents: int) -> np.ndarray:
    """Sums over the rows of each document: [n, …] -> [documents, …]."""
    flat = rows.reshape(len(rows), -1)
    summed = [np.bincount(document, weights=column, minlength=documents) for column in flat.T]
    return np.stack(summed, axis=1).reshape(documents, *rows.shape[1:])


def join_matches(shift: pd.DataFrame, matches: pd.DataFrame) -> dict[tuple[str, int], np.ndarray]:
    """Each run's matches [rows of ``shift``] as int8.

    Raises
    ------
    StudyError : a run whose matches are not those of the anchors in ``shift``, one by one.
    """
    sizes = shift.groupby(["document", "draft_step"]).size()
    order = np.lexsort([shift["draft_step"], shift["document"]])
    found = {}
    for (variant, seed), own in matches.groupby(["variant", "seed"]):
        texts = own.set_index(["document", "draft_step"])["matches"].sort_index()
        if not texts.str.len().rename(None).equals(sizes):
            raise StudyError(
                f"attention_matches has other anchors for {variant} seed {seed} than attention_shift: run "
                "`kvshot measure shift RESULTS_DIR` again"
            )
        found[variant, seed] = np.empty(len(shift), dtype=np.int8)
        found[variant, seed][order] = np.frombuffer("".join(texts).encode(), dtype=np.uint8) - ord("0")
    return found


def shift_draws(
    shift: pd.DataFrame, matches: pd.DataFrame, measure: str = "shift", samples: int = 2000, seed: int = 0
) -> Draws:
    """Slopes of every run at every draft step, and its acceptance by fifths of shift at an equal mix of entropies.

    shift_slope, entropy_slope : change of the log-odds of a match per standard deviation of shift and of entropy, the
        other held. NaN for a run with fewer than ``LEAST_MATCHES`` matches or misses there.
    fifth_1 … fifth_5 : acceptance where the shift is smallest … largest (`standardised`).
    standardised_fall : fifth_1 minus fifth_5.

    ``measure`` says which column of ``shift`` is the shift; the documents resampled are those that ``shift`` has.
    """
    documents, places = np.unique(shift["document"], return_inverse=True)
    weights, runs = resample_weights(max(1, len(documents)), samples, seed), join_matches(shift, matches)
    keys, values = [], []
    for step in np.unique(shift["draft_step"]):
        used = ((shift["draft_step"] == step) & shift[measure].notna()).to_numpy()
        rows, document = shift[used], places[used]
        x = np.column_stack([np.ones(len(rows)), _in_deviations(rows[measure]), _in_deviations(rows["entropy"])])
        bins = quantile_bin(rows[measure], SHIFT_BINS), quantile_bin(rows["entropy"], ENTROPY_BINS)
        cells = np.stack(bins, axis=1)
        for run, match in runs.items():
            slopes = np.full((len(weights), 3), np.nan)
            if LEAST_MATCHES <= match[used].sum() <= len(rows) - LEAST_MATCHES:
                slopes = slope_draws(x, match[used].astype(float), document, weights)
            fifths = standardised(cell_rates(cells, match[used], document, weights), cells)
            found = {"shift_slope": slopes[:, 1], "entropy_slope": slopes[:, 2]}
            found |= {f"fifth_{place}": row for place, row in enumerate(fifths.T, start=1)}
            found["standardised_fall"] = fifths[:, 0] - fifths[:, -1]
            keys += [[*run, metric, step, len(rows)] for metric in found]
            values += found.values()
    return drawn_as(keys, values, samples, seed, [*KEYS, "anchors"])


def _in_deviations(column: pd.Series) -> np.ndarray:
    """(x - mean) / sd; a constant column becomes zeros (its slope is then undefined)."""
    spread = column.std(ddof=0)
    return ((column - column.mean()) / (spread if spread > 0 else 1)).to_numpy()


def quantile_bin(column: pd.Series, bins: int) -> np.ndarray:
    """Bin 0 … bins - 1 of each value, about equally many in each: between the quantiles of all values.

    [5, 1, 3, 2] in 2 bins: 1, 0, 1, 0.
    """
    edges = np.quantile(column, np.arange(1, bins) / bins)
    return np.searchsorted(edges, column, side="right")


def cell_rates(cells: np.ndarray, match: np.ndarray, document: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of matches in each cell, over resampled documents: [1 + samples, shift, entropy]; NaN if empty."""
    shape, documents = (SHIFT_BINS, ENTROPY_BINS), weights.shape[1]
    place, size = document * np.prod(shape) + np.ravel_multi_index(cells.T, shape), documents * np.prod(shape)
    sums = [np.bincount(place, weights=each, minlength=size).reshape(documents, -1) for each in (match, None)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((weights @ sums[0]) / (weights @ sums[1])).reshape(len(weights), *shape)


def standardised(rates: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Acceptance of each shift bin at the mix of entropies of all anchors: [S, shift, entropy] -> [S, shift]"""
    return rates @ (np.bincount(cells[:, 1], minlength=ENTROPY_BINS) / len(cells))
