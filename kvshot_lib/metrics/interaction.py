"""Does acceptance fall faster with the attention shift for one drafter than for another? Slopes, bins and their intervals (no torch).

For each run and draft step a logistic regression, log-odds of a match = b0 + b1 shift + b2 entropy, both predictors in standard deviations over all
anchors of that step. A model of two drafters with drafter × (shift + entropy) has every term once for each, so it is these two
regressions, and its interaction is the difference of their b1: `shift_slope(a) - shift_slope(b)`, on the same anchors.

Anchors of one document are no independent sample: intervals come from resampled documents, the same ones for every run
(`bootstrap.resample_weights`). A resample's slopes are one Newton step from the fit, with that resample's own score and information
(summed from those of each document); tests hold that to a full fit on every resample.
"""

import numpy as np
import pandas as pd

from ..errors import StudyError
from .claims import scorecard, shift_claim
from .resampling import Draws, interval, resample_weights
from .tables import in_order

SHIFT_BINS, ENTROPY_BINS = 5, 4
LEAST_MATCHES = 50  # fewer matches (or misses) can't carry three coefficients and their resamples: no slope


def fit_logistic(x: np.ndarray, y: np.ndarray, iterations: int = 30) -> np.ndarray:
    """Coefficients [p] that maximise the likelihood of y in {0, 1} given x [n, p], by Newton's method; NaN where there is no maximum.

    With x = 1 alone: the log-odds of the mean. With x = 1 and a group's indicator: a group's log-odds, and the difference of the
    other's.
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
    """Each run's matches [rows of ``shift``] as int8, runs in the order of the study.

    Raises
    ------
    StudyError : a run whose matches are not those of the anchors in ``shift``, one by one.
    """
    sizes = shift.groupby(["document", "draft_step"], sort=True).size()
    order = np.argsort(shift["document"].to_numpy() * 1000 + shift["draft_step"].to_numpy(), kind="stable")
    found, runs = {}, matches.groupby(["variant", "seed"])
    for variant in in_order(matches["variant"]):
        for seed in sorted(matches.loc[matches["variant"] == variant, "seed"].unique()):
            texts = runs.get_group((variant, seed)).set_index(["document", "draft_step"])["matches"].sort_index()
            if not texts.str.len().rename(None).equals(sizes.rename(None)):
                raise StudyError(
                    f"attention_matches has other anchors for {variant} seed {seed} than attention_shift: run "
                    "`python -m kvshot_lib.probes.shift RESULTS_DIR` again"
                )
            bits = np.frombuffer("".join(texts).encode(), dtype=np.uint8) - ord("0")
            found[variant, seed] = np.empty(len(shift), dtype=np.int8)
            found[variant, seed][order] = bits
    return found


def shift_draws(
    shift: pd.DataFrame,
    matches: pd.DataFrame,
    documents: int,
    measure: str = "shift",
    samples: int = 2000,
    seed: int = 0,
) -> Draws:
    """Slopes and standardised falls of every run at every draft step, with resamples: metrics for `bootstrap.Draws`.

    shift_slope, entropy_slope : change of the log-odds of a match per standard deviation of shift and of entropy, the other held.
        NaN for a run with fewer than ``LEAST_MATCHES`` matches or misses there.
    standardised_fall : acceptance in the lowest shift bin minus that in the highest, both at the same mix of entropies.

    Parameters
    ----------
    documents : how many evaluation documents there are; with the same number and seed, column i here and in `bootstrap.draw` used the same ones.
    measure : which column of ``shift`` is the shift: one of `attention_shift.MEASURES`.
    """
    weights, runs = resample_weights(documents, samples, seed), join_matches(shift, matches)
    keys, values = [], []
    for step in sorted(shift["draft_step"].unique()):
        used = ((shift["draft_step"] == step) & shift[measure].notna()).to_numpy()
        rows = shift[used]
        x = np.column_stack([np.ones(len(rows)), _standardised(rows[measure]), _standardised(rows["entropy"])])
        document, cells = rows["document"].to_numpy(), bin_cells(rows, measure)
        for (variant, run_seed), match in runs.items():
            slopes = np.full((len(weights), 3), np.nan)
            if LEAST_MATCHES <= match[used].sum() <= len(rows) - LEAST_MATCHES:
                slopes = slope_draws(x, match[used].astype(float), document, weights)
            falls = standardised(cell_rates(cells, match[used], document, weights), cells)
            found = {
                "shift_slope": slopes[:, 1],
                "entropy_slope": slopes[:, 2],
                "standardised_fall": falls[:, 0] - falls[:, -1],
            }
            for metric, row in found.items():
                keys.append([variant, run_seed, metric, step, len(rows), rows["document"].nunique()])
                values.append(row)
    keys = pd.DataFrame(keys, columns=["variant", "seed", "metric", "draft_step", "anchors", "documents"])
    return Draws(keys.astype({"draft_step": "Int64"}), np.stack(values), seed)


def hypothesis_row(
    shift: pd.DataFrame, matches: pd.DataFrame, paper: pd.DataFrame, documents: int, samples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The scorecard's row of H1; *not run* where its tables are empty or a drafter is missing."""
    claim = shift_claim(set(matches["variant"]))
    if len(shift):
        return scorecard(shift_draws(shift, matches, documents, samples=samples, seed=seed), paper, (claim,))
    nothing = Draws(pd.DataFrame({"variant": [""], "metric": [""], "draft_step": [0]}), np.zeros((1, 1)))
    return scorecard(nothing, paper, (claim,)).assign(missing="attention_shift")


def _standardised(column: pd.Series) -> np.ndarray:
    """(x - mean) / sd; a constant column becomes zeros (its slope is then undefined)."""
    spread = column.std(ddof=0)
    return ((column - column.mean()) / (spread if spread > 0 else 1)).to_numpy()


def quantile_bin(column: pd.Series, bins: int) -> np.ndarray:
    """Bin 0 … bins - 1 of each value, about equally many in each: between the quantiles of all values.

    [5, 1, 3, 2] in 2 bins: 1, 0, 1, 0.
    """
    edges = np.quantile(column, np.arange(1, bins) / bins)
    return np.searchsorted(edges, column, side="right")


def bin_cells(rows: pd.DataFrame, measure: str) -> np.ndarray:
    """Shift bin and entropy bin of each row, int [n, 2], over the anchors of one draft step."""
    return np.stack([quantile_bin(rows[measure], SHIFT_BINS), quantile_bin(rows["entropy"], ENTROPY_BINS)], axis=1)


def cell_rates(cells: np.ndarray, match: np.ndarray, document: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of matches in each cell on the documents and their resamples: [1 + samples, shift bins, entropy bins]; NaN if empty."""
    return _ratio(
        match, np.ravel_multi_index(cells.T, (SHIFT_BINS, ENTROPY_BINS)), SHIFT_BINS * ENTROPY_BINS, document, weights
    ).reshape(len(weights), SHIFT_BINS, ENTROPY_BINS)


def _ratio(match: np.ndarray, cell: np.ndarray, cells: int, document: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Matches / anchors in each cell [1 + samples, cells], summed over the resampled documents before dividing."""
    place, documents = document * cells + cell, weights.shape[1]
    sums = [np.bincount(place, weights=w, minlength=documents * cells).reshape(documents, cells) for w in (match, None)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ sums[0]) / (weights @ sums[1])


def standardised(rates: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Direct standardisation: each shift bin's acceptance at the same mix of entropies, that of all anchors. [S, shift, entropy] -> [S, shift]"""
    return rates @ (np.bincount(cells[:, 1], minlength=ENTROPY_BINS) / len(cells))


def binned_table(
    shift: pd.DataFrame,
    matches: pd.DataFrame,
    documents: int,
    measure: str = "shift",
    samples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Step acceptance by shift bin with 95% intervals, mean over seeds: as it is, standardised, and in each entropy bin.

    Returns
    -------
    variant, draft_step, kind (raw, standardised, cell), shift_bin, entropy_bin (cells only), mean_shift, value, low, high, anchors.
    """
    weights, runs, found = resample_weights(documents, samples, seed), join_matches(shift, matches), []
    for step in sorted(shift["draft_step"].unique()):
        used = ((shift["draft_step"] == step) & shift[measure].notna()).to_numpy()
        rows, document = shift[used], shift.loc[used, "document"].to_numpy()
        cells = bin_cells(rows, measure)
        means = rows[measure].groupby(cells[:, 0]).mean().reindex(range(SHIFT_BINS)).to_numpy()
        sizes = np.zeros((SHIFT_BINS, ENTROPY_BINS), dtype=int)
        np.add.at(sizes, tuple(cells.T), 1)
        for variant in in_order(matches["variant"]):
            own = [match[used] for (name, _), match in runs.items() if name == variant]
            rates = np.mean([cell_rates(cells, match, document, weights) for match in own], axis=0)
            raw = np.mean([_ratio(match, cells[:, 0], SHIFT_BINS, document, weights) for match in own], axis=0)
            even = standardised(rates, cells)
            for s in range(SHIFT_BINS):
                add = lambda kind, e, draws, size, s=s, variant=variant, step=step, means=means: found.append(
                    [variant, step, kind, s, e, means[s], *vars(interval(draws)).values(), size]
                )
                add("raw", None, raw[:, s], sizes[s].sum())
                add("standardised", None, even[:, s], sizes[s].sum())
                for e in range(ENTROPY_BINS):
                    add("cell", e, rates[:, s, e], sizes[s, e])
    columns = [
        "variant",
        "draft_step",
        "kind",
        "shift_bin",
        "entropy_bin",
        "mean_shift",
        "value",
        "low",
        "high",
        "anchors",
    ]
    return pd.DataFrame(found, columns=columns).astype({"entropy_bin": "Int64"})
