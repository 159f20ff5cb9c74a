"""What the diagnostics measured (`probes`), as numbers with 95% intervals over documents (no torch).

A document is here an evaluation document, a sequence of ``gradient_flow``, or a validation document of the
gate's record.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..drafters.variants import QUERY_ARMS, parameters_of
from .acceptance import COUNTS, metrics_of
from .resampling import Draws, interval, resample_weights

CONTEXT = 512  # the longest context that drafters are trained on
CLAIM_AT = 0.1  # C17 is about the gate after this share of the training
RATIOS = {"key_gradient": ("k_proj", "q_proj"), "value_gradient": ("v_proj", "o_proj")}


def bootstrapped(
    table: pd.DataFrame, by: Sequence[str], samples: int = 2000, seed: int = 0, *, root: bool = False
) -> tuple[pd.DataFrame, np.ndarray]:
    """Σ top / Σ bottom over documents for each (``by``, seed), on the documents and on resamples of them.

    ``table`` has ``seed``, ``document``, ``top`` and ``bottom``; ``root`` takes the square root.

    Returns
    -------
    keys (``by`` and seed), and values float [rows, 1 + samples]; column i used the same documents in every row.
    """
    documents = np.unique(table["document"])
    weights = resample_weights(max(1, len(documents)), samples, seed).astype(float)
    keys, values = [], []
    for key, group in table.groupby([*by, "seed"], sort=False, dropna=False):
        sums = group.groupby("document")[["top", "bottom"]].sum().reindex(documents, fill_value=0).to_numpy(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            top, bottom = (weights @ sums).T
            values.append(np.sqrt(top / bottom) if root else top / bottom)
        keys.append(key)
    return pd.DataFrame(keys, columns=[*by, "seed"]), np.array(values).reshape(len(keys), 1 + samples)


def intervals(keys: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Mean over seeds of `bootstrapped` rows: columns value, low, high, seeds in place of seed."""
    by, rows = [name for name in keys.columns if name != "seed"], []
    for key, group in keys.groupby(by, sort=False, dropna=False):
        rows.append([*key, *vars(interval(values[group.index].mean(0))).values(), len(group)])
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "seeds"])


def ratios(
    table: pd.DataFrame, by: Sequence[str], samples: int = 2000, seed: int = 0, *, root: bool = False
) -> pd.DataFrame:
    """`intervals` of `bootstrapped`: Σ top / Σ bottom of each ``by``, mean over seeds, with value, low, high, seeds."""
    return intervals(*bootstrapped(table, by, samples, seed, root=root))


def draws_of(rows: Sequence[tuple[str, int, str, np.ndarray]], samples: int, seed: int) -> Draws:
    """(variant, seed, metric, draws [1 + samples]) each, as `Draws`."""
    keys = pd.DataFrame([row[:3] for row in rows], columns=["variant", "seed", "metric"]).assign(draft_step=pd.NA)
    values = np.array([row[3] for row in rows]).reshape(len(rows), 1 + samples)
    return Draws(keys.astype({"draft_step": "Int64"}), values, seed)


def oracle_metrics(oracle: pd.DataFrame, samples: int = 2000, seed: int = 0) -> dict[tuple, dict[str, np.ndarray]]:
    """(variant, seed, arm) -> `acceptance.metrics_of` on the documents and their resamples, [1 + samples, …]."""
    documents = np.unique(oracle["document"])
    weights, found = resample_weights(max(1, len(documents)), samples, seed).astype(float), {}
    for key, own in oracle.groupby(["variant", "seed", "arm"], sort=False):
        steps = own["draft_step"].nunique()
        counts = own.sort_values(["document", "draft_step"])[COUNTS].to_numpy(float).reshape(len(documents), -1)
        summed = (weights @ counts).reshape(len(weights), steps, len(COUNTS))
        found[key] = metrics_of(summed, np.zeros((len(weights), 2)))
    return found


def arm_table(oracle: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Every arm's step acceptance, mean over seeds: variant, arm, draft_step, value, low, high, seeds."""
    keys, values = [], []
    for (variant, run, arm), found in oracle_metrics(oracle, samples, seed).items():
        for step, row in enumerate(found["step_acceptance"].T):
            keys.append([variant, arm, step, run])
            values.append(row)
    columns = ["variant", "arm", "draft_step", "seed"]
    return intervals(pd.DataFrame(keys, columns=columns), np.array(values).reshape(len(keys), -1))


def query_draws(overlap: pd.DataFrame, oracle: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """C15's statistics of each run.

    overlap_recall : recall (without the sink) of the target's 8 largest prefix entries by the drafter's last layer,
        over all measured draft steps and reused target layers.
    mat_as_trained : expected MAT of the drafter itself, on the documents of the oracle.
    own_gain, oracle_gain, perfect_gain, random_gain : expected MAT of that arm minus that of ``own`` (of
        ``as_trained``, for ``own``).
    """
    rows = overlap[(overlap["source"] == "drafter") & overlap["recall"].notna()]
    rows = rows[rows["layer"] == rows.groupby("variant")["layer"].transform("max")]
    rows = rows.assign(top=rows["recall"] * rows["anchors"], bottom=rows["anchors"])
    keys, values = bootstrapped(rows, ["variant"], samples, seed)
    made = [(v, s, "overlap_recall", row) for (v, s), row in zip(keys.itertuples(index=False, name=None), values)]
    arms = {key: found["expected_mat"] for key, found in oracle_metrics(oracle, samples, seed).items()}
    for variant, run in dict.fromkeys((v, s) for v, s, _ in arms):
        mat = {arm: arms[variant, run, arm] for arm in QUERY_ARMS if (variant, run, arm) in arms}
        made.append((variant, run, "mat_as_trained", mat["as_trained"]))
        for arm in list(mat)[1:]:
            made.append((variant, run, f"{arm}_gain", mat[arm] - mat["as_trained" if arm == "own" else "own"]))
    return draws_of(made, samples, seed)


def nearest_context(flow: pd.DataFrame, context: int = CONTEXT) -> int:
    """The longest measured context of at most ``context`` tokens (the shortest one, if all are longer)."""
    measured = np.unique(flow["context_length_tokens"])
    return int(max([c for c in measured if c <= context], default=measured[0]))


def norm_rows(flow: pd.DataFrame) -> pd.DataFrame:
    """Squared gradient norms ‖∂L/∂W‖² as ``top`` and W's parameters as ``bottom``, at `nearest_context`.

    The root of their `ratios` is a gradient per parameter, a root mean square over documents and layers.
    """
    key = ["variant", "seed", "document", "layer", "branch", "matrix", "side"]
    if flow.empty:
        return pd.DataFrame(columns=[*key, "top", "bottom"])
    flow = flow[flow["draft_step"].isna() & (flow["context_length_tokens"] == nearest_context(flow))]
    wide = flow.pivot(index=key, columns="quantity", values="value").reset_index().dropna(subset=["grad_norm"])
    return wide.assign(top=wide["grad_norm"] ** 2, bottom=wide["numel"])[[*key, "top", "bottom"]]


def flow_draws(flow: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """C16's statistics of each run: draft-side ``key_gradient`` and ``value_gradient``, all per parameter.

    The first is the draft-side part of ∂L/∂W_k over ∂L/∂W_q, the second that of ∂L/∂W_v over ∂L/∂W_o, in the branch
    that reads the target's KV (in `hidden`, its only one), at the longest context that training knew. A hybrid has
    those of its self branch too, ``self_key_gradient`` and so on, and ``cross_over_self_k_proj`` of each matrix.
    """
    rows = norm_rows(flow)
    rows = rows[rows["side"] == "draft"]
    keys, values = bootstrapped(rows, ["variant", "branch", "matrix"], samples, seed, root=True)
    found = {key: row for key, row in zip(keys.itertuples(index=False, name=None), values, strict=True)}
    made = []
    for variant, branch, run in dict.fromkeys((v, b, s) for v, b, _, s in found):
        both = (variant, "cross", "q_proj", run) in found and (variant, "self", "q_proj", run) in found
        prefix = "self_" if both and branch == "self" else ""
        for metric, (part, against) in RATIOS.items():
            if (variant, branch, part, run) in found:
                ratio = found[variant, branch, part, run] / found[variant, branch, against, run]
                made.append((variant, run, prefix + metric, ratio))
        for part in ("q_proj", "k_proj", "v_proj", "o_proj") if both and branch == "cross" else ():
            ratio = found[variant, "cross", part, run] / found[variant, "self", part, run]
            made.append((variant, run, f"cross_over_self_{part}", ratio))
    return draws_of(made, samples, seed)


def acting_gate(gradients: pd.DataFrame) -> pd.DataFrame:
    """Rows of the mean gate, ``value`` as it acts: a variant with a floor has floor + (1 - floor) · sigmoid.

    The record (``training.record``) holds the sigmoid alone.
    """
    rows = gradients[gradients["quantity"] == "gate_mean"]
    floors = {name: parameters_of(name).get("gate_floor", 0.0) for name in rows["variant"].unique()}
    floor = rows["variant"].map(floors).astype(float)
    return rows.assign(value=floor + (1 - floor) * rows["value"])


def gate_draws(gradients: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """The mean gate of each run: C17's ``gate_after_a_tenth``, ``gate_least`` and ``gate_at_the_end``.

    The first is that at the first record that has a tenth of the training's steps behind it.
    """
    rows = acting_gate(gradients)
    keys, values = bootstrapped(rows.assign(top=rows["value"], bottom=1.0), ["variant", "step"], samples, seed)
    made = []
    for (variant, run), own in keys.groupby(["variant", "seed"], sort=False):
        own = own.sort_values("step")
        gates, late = values[own.index], (own["step"] >= CLAIM_AT * own["step"].max()).to_numpy()
        found = {"after_a_tenth": gates[late][0], "least": gates.min(0), "at_the_end": gates[-1]}
        made += [(variant, run, f"gate_{name}", row) for name, row in found.items()]
    return draws_of(made, samples, seed)
