"""Acceptance metrics: counts of one document, and every metric from counts.

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

from ..errors import StudyError

COUNTS = ["anchors", "matches", "reached", "chain_matches"]
RUNS = ["anchors", "accepted"]
AXES = ["generated_offset", "context_length_tokens"]
FIRST_BIN = 16
SCALAR_METRICS = ["retention", "chain_retention", "expected_mat", "measured_mat"]
METRICS = ["step_acceptance", "chain_acceptance", *SCALAR_METRICS]
STEPS = 7  # draft steps of a validation that are compared between drafters


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
    keys = {"variant": [variant], "seed": [seed], "document": range(len(counted))}
    answers = pd.MultiIndex.from_product(keys.values(), names=keys)
    keys["draft_step"] = range(len(counted[0][0]))
    steps = pd.MultiIndex.from_product(keys.values(), names=keys)
    counts = pd.DataFrame(np.concatenate([c for c, _ in counted]), index=steps, columns=COUNTS)
    run_lengths = pd.DataFrame(np.stack([r for _, r in counted]), index=answers, columns=RUNS)
    return counts.reset_index(), run_lengths.reset_index()


def bin_low(places: np.ndarray) -> np.ndarray:
    """Lower edge of each place's bin: 0 for 0 … 15, then powers of two (16 for 16 … 31, 32 for 32 … 63, and so on)."""
    places = np.asarray(places, dtype=np.int64)
    return np.where(places < FIRST_BIN, 0, 1 << (np.frexp(np.maximum(places, 1))[1].astype(np.int64) - 1))


def bin_names(bins: Iterable[int]) -> list[str]:
    """What bins with these lower edges hold: 0 is 0-15, 16 is 16-31, 64 is 64-127."""
    return [f"{low}-{2 * max(low, FIRST_BIN // 2) - 1}" for low in bins]


def axis_steps(draft_length: int) -> list[int]:
    """The draft steps that are counted along the axes: the first, the middle one and the last (0, 3 and 6 of K = 7)."""
    return sorted({0, (draft_length - 1) // 2, draft_length - 1})


def count_axes(
    variant: str, seed: int, documents: Iterable[tuple[np.ndarray, np.ndarray]], places: Iterable[np.ndarray]
) -> pd.DataFrame:
    """Count anchors and matches of a run by generated offset and by context length, each in the bins of `bin_low`.

    With K = 1, an answer x_1 x_2 … of which the anchors 0 … 16 are valid, and a match at anchors 15 and 16 alone:

        axis                    bin_low   anchors              matches
        generated_offset        0         16  (offsets 0-15)   1
        generated_offset        16        1   (offset 16)      1
        context_length_tokens   0         15  (lengths 1-15)   0
        context_length_tokens   16        2   (16 and 17)      2

    Parameters
    ----------
    documents : (match, valid), bool [anchors, K] each, in the order of the corpus, as for `count_run`
    places : int [anchors, 2] of each document, the columns of ``AXES``; `judging.anchor_places` gives them

    Returns
    -------
    The rows of ``axes.csv``, for the draft steps of `axis_steps` and without rows of zero anchors. Over the bins of an
    axis they sum to the anchors and matches of ``counts.csv``.
    """
    rows = []
    for document, ((match, valid), where) in enumerate(zip(documents, places, strict=True)):
        for axis, bins in zip(AXES, bin_low(where).T, strict=True):
            for step in axis_steps(valid.shape[1]):
                counted = valid[:, step]
                for low in np.unique(bins[counted]):
                    inside = counted & (bins == low)
                    matches = (inside & match[:, step]).sum()
                    rows.append([variant, seed, document, axis, low, step, inside.sum(), matches])
    keys = ["variant", "seed", "document", "axis", "bin_low", "draft_step"]
    return pd.DataFrame(rows, columns=[*keys, "anchors", "matches"]).sort_values(keys, ignore_index=True)


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


def training_table(history: pd.DataFrame) -> pd.DataFrame:
    """Validation acceptance along each training, at draft step 0 and at the variant's *own* last step, mean over seeds.

    Returns
    -------
    Columns variant, step_name (``first``, ``last``), draft_step, million_tokens, value, seed_low, seed_high. The last
    step of a chain of seven is 6, that of a block of sixteen slots 14.
    """
    rows = history[history["split"] == "validation"].dropna(subset=["acceptance", "draft_step"])
    last = rows.groupby("variant")["draft_step"].transform("max")
    ends = [rows[rows["draft_step"] == step].assign(step_name=name) for name, step in (("first", 0), ("last", last))]
    taken = {"million_tokens": ("trained_tokens", "mean")}
    taken |= {name: ("acceptance", how) for name, how in (("value", "mean"), ("seed_low", "min"), ("seed_high", "max"))}
    found = pd.concat(ends).groupby(["step_name", "variant", "draft_step", "step"], sort=False).agg(**taken)
    found = found.reset_index().drop(columns="step").assign(million_tokens=lambda t: t["million_tokens"] / 1e6)
    return found.sort_values(["step_name", "variant", "million_tokens"], kind="stable").reset_index(drop=True)


def validation_mat(history: pd.DataFrame) -> pd.DataFrame:
    """1 + Σ_i Π_{j ≤ i} α_j on the validation documents along each training, K = 7 for all.

    Columns variant, seed, step, trained_tokens, value. Runs that were validated on fewer draft steps are left out.
    """
    rows = history[(history["split"] == "validation") & (history["draft_step"] < STEPS)].sort_values("draft_step")
    keys = ["variant", "seed", "step", "trained_tokens"]
    found = rows.groupby(keys)["acceptance"].agg(value=lambda a: 1 + np.cumprod(a).sum(), steps="size").reset_index()
    return found[found["steps"] == STEPS].drop(columns="steps").reset_index(drop=True)
