"""What is drawn and claimed of ``attention_overlap``, ``query_probe`` and ``query_oracle``: with 95% intervals over documents (no torch)."""

import numpy as np
import pandas as pd

from ..drafters.variants import QUERY_ARMS
from .acceptance import COUNTS, metrics_of
from .claims import MARGIN
from .gradients import bootstrapped, intervals
from .resampling import Draws, resample_weights

MEASURES = ("recall", "js", "recall_with_sink", "js_with_sink")


def overlap_table(overlap: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means over anchors and reused target layers, with intervals: variant, source, layer, draft_step, measure, value, low, high, seeds.

    ``layer`` is missing in the references of the target alone.
    """
    long = overlap.melt(
        ["variant", "seed", "document", "source", "draft_step", "layer", "anchors"], list(MEASURES), "measure"
    ).dropna(subset=["value"])
    long = long.assign(top=long["value"] * long["anchors"], bottom=long["anchors"], layer=long["layer"].fillna(-1))
    keys, values = bootstrapped(long, ["variant", "source", "layer", "draft_step", "measure"], samples, seed)
    table = intervals(keys, values)
    return table.assign(layer=table["layer"].replace(-1, pd.NA)).astype({"layer": "Int64"})


def probe_table(probe: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """R² of the probe and of its floor, over all reused layers: variant, labels, layer, draft_step, value, low, high, seeds."""
    rows = probe.assign(top=probe["total"] - probe["residual"], bottom=probe["total"])
    return intervals(*bootstrapped(rows, ["variant", "labels", "layer", "draft_step"], samples, seed))


def oracle_metrics(oracle: pd.DataFrame, samples: int = 2000, seed: int = 0) -> dict[tuple, dict[str, np.ndarray]]:
    """(variant, seed, arm) -> metrics of `metrics.metrics_of` on the documents and their resamples, [1 + samples, …]."""
    documents = np.unique(oracle["document"])
    weights, found = resample_weights(max(1, len(documents)), samples, seed).astype(float), {}
    for key, own in oracle.groupby(["variant", "seed", "arm"], sort=False):
        steps = own["draft_step"].nunique()
        counts = own.sort_values(["document", "draft_step"])[COUNTS].to_numpy(float).reshape(len(documents), -1)
        summed = (weights @ counts).reshape(len(weights), steps, len(COUNTS))
        found[key] = metrics_of(summed, np.zeros((len(weights), 2)))
    return found


def arm_table(oracle: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every arm's step acceptance, retention and expected MAT, mean over seeds: variant, arm, metric, draft_step, value, low, high, seeds."""
    keys, values = [], []
    for (variant, run, arm), found in oracle_metrics(oracle, samples, seed).items():
        for step, row in enumerate(found["step_acceptance"].T):
            keys.append([variant, arm, "step_acceptance", step, run])
            values.append(row)
        for metric in ("retention", "expected_mat"):
            keys.append([variant, arm, metric, -1, run])
            values.append(found[metric])
    columns = ["variant", "arm", "metric", "draft_step", "seed"]
    table = intervals(pd.DataFrame(keys, columns=columns), np.array(values).reshape(len(keys), -1))
    return table.assign(draft_step=table["draft_step"].replace(-1, pd.NA)).astype({"draft_step": "Int64"})


def query_draws(overlap: pd.DataFrame, oracle: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """The claims' statistics, of each run.

    overlap_recall : recall (without the sink) of the target's 8 largest prefix entries by the drafter's last layer, over all measured
        draft steps and reused target layers.
    mat_as_trained : expected MAT of the drafter itself, on the documents of the oracle.
    own_gain, oracle_gain, perfect_gain, random_gain : expected MAT of that arm minus that of ``own`` (of ``as_trained``, for ``own``).
    oracle_last, perfect_last, random_last : the same of step acceptance at the last draft step.
    returned : oracle_gain / perfect_gain, the share of the gap that the true query closes; it means nothing unless there is a gap.
    """
    keys, values = [], []

    def add(variant, run, metric, row):
        keys.append([variant, run, metric, pd.NA, 0, 0])
        values.append(row)

    rows = overlap[(overlap["source"] == "drafter") & overlap["recall"].notna()]
    if len(rows):
        rows = rows[rows["layer"] == rows.groupby("variant")["layer"].transform("max")]
        rows = rows.assign(top=rows["recall"] * rows["anchors"], bottom=rows["anchors"])
        found = bootstrapped(rows, ["variant"], samples, seed)
        for (variant, run), row in zip(found[0].itertuples(index=False, name=None), found[1], strict=True):
            add(variant, run, "overlap_recall", row)
    arms = oracle_metrics(oracle, samples, seed)
    for variant, run in dict.fromkeys((v, s) for v, s, _ in arms):
        there = [arm for arm in QUERY_ARMS if (variant, run, arm) in arms]
        mat = {arm: arms[variant, run, arm]["expected_mat"] for arm in there}
        last = {arm: arms[variant, run, arm]["step_acceptance"][:, -1] for arm in there}
        add(variant, run, "mat_as_trained", mat["as_trained"])
        if len(there) < len(QUERY_ARMS):
            continue  # measured without the oracle
        add(variant, run, "own_gain", mat["own"] - mat["as_trained"])
        for arm in ("oracle", "perfect", "random"):
            add(variant, run, f"{arm}_gain", mat[arm] - mat["own"])
            add(variant, run, f"{arm}_last", last[arm] - last["own"])
        with np.errstate(divide="ignore", invalid="ignore"):
            add(variant, run, "returned", (mat["oracle"] - mat["own"]) / (mat["perfect"] - mat["own"]))
    table = pd.DataFrame(keys, columns=["variant", "seed", "metric", "draft_step", "anchors", "documents"])
    stacked = np.stack(values) if values else np.zeros((0, 1 + samples))
    return Draws(table.astype({"draft_step": "Int64"}), stacked, seed)


def reading(draws: Draws, variant: str) -> str:
    """What the oracle says of a drafter, by the whole intervals of two gains and the claims' margin.

    ``bottleneck``     the true query gains the margin or more
    ``no_bottleneck``  neither it nor perfect re-attention does
    ``worse``          the same, and perfect re-attention even loses against the drafter's own query: a weaker sign, for that query had all of the
                       drafter's training and these arms only the re-training
    ``projection``     perfect re-attention does, the true query doesn't
    ``idle``           neither does, but random queries cost nothing either: the drafter makes no use of this attention that could be better
    ``open``           an interval holds the margin
    """
    oracle, perfect = (draws.contrast((1, variant, f"{arm}_gain")).verdict(MARGIN) for arm in ("oracle", "perfect"))
    if oracle == "above":
        return "bottleneck"
    if oracle == perfect == "below" and draws.contrast((1, variant, "random_gain")).verdict(0) != "below":
        return "idle"
    if oracle == perfect == "below" and draws.contrast((1, variant, "perfect_gain")).verdict(0) == "below":
        return "worse"
    if oracle == "below" and perfect in ("below", "above"):
        return "no_bottleneck" if perfect == "below" else "projection"
    return "open"
