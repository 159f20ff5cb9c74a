"""Acceptance metrics: counts of one document, and every metric from counts (no torch; intervals are in ``bootstrap``).

Counts are kept per document and summed over documents before anything is divided. The numerator and the denominator of
every metric come from the same mask: a pair (t, k) of anchor and draft step is valid if x_{t+1} … x_{t+2+k} are all
answer tokens of one document.

One worked document, K = 3, four anchors (1 match, 0 no match, . not valid: the answer ends there):

    anchor   match    matches steps 0..k-1 all matched at     chain matches at    accepted run
    t=0      1 1 0    0 1 2                                   0 1                 2
    t=1      0 1 1    0                                       none                0
    t=2      1 0 .    0 1                                     0                   not counted: step 2 is not valid
    t=3      1 . .    0                                       0                   not counted

    anchors  4 3 2    matches        3 2 1    step_acceptance  3/4 2/3 1/2
    reached  4 2 1    chain_matches  3 1 0    chain_acceptance 3/4 1/2 0     measured_mat = 1 + (2 + 0) / 2 = 2
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .errors import StudyError

COUNTS = ["anchors", "matches", "reached", "chain_matches"]
RUNS = ["anchors", "accepted"]
SCALAR_METRICS = ["retention", "chain_retention", "expected_mat", "measured_mat"]
METRICS = ["step_acceptance", "chain_acceptance", *SCALAR_METRICS]


def count_document(match: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the matches of one document (the worked example above).

    Parameters
    ----------
    match : bool [anchors, K], argmax of the drafter equals argmax of the target; ignored where not valid
    valid : bool [anchors, K], nested: the earlier steps of a valid step are valid too

    Returns
    -------
    counts : int64 [K, 4], the columns of ``COUNTS``
    runs : int64 [2], the anchors that are valid at all K steps (so that the answer's end cuts no run short) and the
        sum of their accepted run lengths, 0 … K each
    """
    match, valid = np.asarray(match, dtype=bool), np.asarray(valid, dtype=bool)
    if match.shape != valid.shape or match.ndim != 2 or match.shape[1] < 1:
        raise ValueError(f"match and valid must both be [anchors, K], not {match.shape} and {valid.shape}")
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise ValueError("valid must be nested: a later draft step is valid where an earlier one is not")
    chain = np.logical_and.accumulate(match & valid, axis=1)
    reached = valid.copy()
    reached[:, 1:] &= chain[:, :-1]
    counts = np.stack([valid.sum(0), (match & valid).sum(0), reached.sum(0), chain.sum(0)], axis=1)
    complete = valid[:, -1]
    return counts.astype(np.int64), np.array([complete.sum(), chain[complete].sum()], dtype=np.int64)


def count_run(
    variant: str, seed: int, documents: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Count every document of an evaluated run; ``documents`` gives (match, valid) in the order of the corpus.

    Returns
    -------
    counts, run_lengths : the rows of ``counts.csv`` and ``run_lengths.csv``
    """
    counted = [count_document(match, valid) for match, valid in documents]
    if not counted:
        raise StudyError("no evaluation documents to count: set evaluation_documents to 1 or more")
    steps = len(counted[0][0])
    run = {"variant": variant, "seed": seed}
    counts = pd.DataFrame(np.concatenate([c for c, _ in counted]), columns=COUNTS)
    index = {
        **run,
        "document": np.repeat(np.arange(len(counted)), steps),
        "draft_step": np.tile(np.arange(steps), len(counted)),
    }
    counts = counts.assign(**index)[[*index, *COUNTS]]
    run_lengths = pd.DataFrame(np.stack([r for _, r in counted]), columns=RUNS)
    index = {**run, "document": np.arange(len(counted))}
    return counts, run_lengths.assign(**index)[[*index, *RUNS]]


def metrics_of(counts: np.ndarray, runs: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of the design from summed counts.

    Parameters
    ----------
    counts : [..., K, 4], the columns of ``COUNTS``, summed over documents
    runs : [..., 2], the columns of ``RUNS``, summed over documents

    Returns
    -------
    dict of float arrays: ``step_acceptance`` and ``chain_acceptance`` [..., K], others [...]; NaN where nothing counts
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        anchors, matches, reached, chain_matches = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
        step, chain = matches / anchors, chain_matches / reached
        complete, accepted = np.moveaxis(np.asarray(runs, dtype=float), -1, 0)
        return {
            "step_acceptance": step,
            "chain_acceptance": chain,
            "retention": step[..., -1] / step[..., 0],
            "chain_retention": chain[..., -1] / chain[..., 0],
            "expected_mat": 1 + np.cumprod(step, axis=-1).sum(-1),
            "measured_mat": 1 + accepted / complete,
        }
