"""What is drawn and claimed of ``gradient_flow`` and ``gradients``: means with 95% intervals over documents (no torch).

A document is here a sequence of ``gradient_flow``, or a validation document of the gate's record. Norms are pooled as root mean
squares, over documents and over the layers of a drafter, and per parameter: √(Σ ‖∂L/∂W‖² / Σ numel).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

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
    values = np.stack(values) if values else np.zeros((0, 1 + samples))
    return pd.DataFrame(keys, columns=[*by, "seed"]), values


def intervals(keys: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
    """Mean over seeds of `bootstrapped` rows: columns value, low, high, seeds in place of seed."""
    by, rows = [name for name in keys.columns if name != "seed"], []
    for key, group in keys.groupby(by, sort=False, dropna=False):
        found = interval(values[group.index].mean(0))
        rows.append([*key, found.value, found.low, found.high, len(group)])
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "seeds"])


def nearest_context(flow: pd.DataFrame, context: int = CONTEXT) -> int:
    """The longest measured context of at most ``context`` tokens (the shortest one, if all are longer)."""
    measured = np.unique(flow["context_length_tokens"])
    return int(max([c for c in measured if c <= context], default=measured[0]))


def norm_rows(flow: pd.DataFrame) -> pd.DataFrame:
    """Gradient norms as ``top`` and ``bottom`` of two quantities: ``per_parameter`` and ``per_entry``, root mean squares both."""
    key = ["variant", "seed", "document", "context_length_tokens", "layer", "branch", "matrix", "side"]
    wide = flow[flow["draft_step"].isna()].pivot(index=key, columns="quantity", values="value").reset_index()
    if wide.empty:
        return pd.DataFrame(columns=[*key, "quantity", "top", "bottom"])
    whole = wide.dropna(subset=["grad_norm"])
    whole = whole.assign(quantity="per_parameter", top=whole["grad_norm"] ** 2, bottom=whole["numel"])
    each = wide.assign(quantity="per_entry", top=wide["entries"] * wide["entry_grad_norm"] ** 2, bottom=wide["entries"])
    return pd.concat([whole, each], ignore_index=True)[[*key, "quantity", "top", "bottom"]]


def norm_table(flow: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Gradient per parameter and per entry of each matrix and side at the context of `nearest_context`, with intervals."""
    rows = norm_rows(flow[flow["context_length_tokens"] == nearest_context(flow)])
    return intervals(*bootstrapped(rows, ["variant", "branch", "matrix", "side", "quantity"], samples, seed, root=True))


def attention_table(flow: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Share of draft-side entries, and of the attention on them, by context length, layer and draft step, with intervals."""
    rows = flow[flow["quantity"].isin(["draft_share", "draft_mass"])]
    rows = rows.assign(top=rows["value"] * rows["anchors"], bottom=rows["anchors"])
    by = ["variant", "layer", "branch", "quantity", "context_length_tokens", "draft_step"]
    return intervals(*bootstrapped(rows, by, samples, seed))


def flow_draws(flow: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """The claims' statistics as `Draws`: draft-side ``key_gradient`` and ``value_gradient`` of each run.

    ``key_gradient`` is the draft-side part of ∂L/∂W_k over ∂L/∂W_q, ``value_gradient`` that of ∂L/∂W_v over ∂L/∂W_o, all per parameter,
    in the branch that reads the target's KV (in `hidden`, its only one), at the longest context that training knew.
    """
    if flow.empty:
        return _draws([], [], samples, seed)
    rows = norm_rows(flow[flow["context_length_tokens"] == nearest_context(flow)])
    reads_kv = rows.groupby("variant")["branch"].transform(lambda b: "cross" if (b == "cross").any() else "self")
    rows = rows[(rows["side"] == "draft") & (rows["quantity"] == "per_parameter") & (rows["branch"] == reads_kv)]
    keys, values = bootstrapped(rows, ["variant", "matrix"], samples, seed, root=True)
    found = {key: row for key, row in zip(keys.itertuples(index=False, name=None), values, strict=True)}
    made, drawn = [], []
    for variant, run in dict.fromkeys((v, s) for v, _, s in found):
        for metric, (part, against) in RATIOS.items():
            if (variant, part, run) in found:
                made.append((variant, run, metric))
                drawn.append(found[variant, part, run] / found[variant, against, run])
    return _draws(made, drawn, samples, seed)


def gate_draws(gradients: pd.DataFrame, samples: int = 2000, seed: int = 0) -> Draws:
    """``gate_after_a_tenth`` of each run: the mean gate at the first record that has a tenth of the training's steps behind it."""
    rows = gradients[gradients["quantity"] == "gate_mean"]
    steps = rows.groupby(["variant", "seed"])["step"]
    late = rows[rows["step"] >= CLAIM_AT * steps.transform("max")]
    late = late[late["step"] == late.groupby(["variant", "seed"])["step"].transform("min")]
    keys, values = bootstrapped(late.assign(top=late["value"], bottom=1.0), ["variant"], samples, seed)
    made = [(variant, run, "gate_after_a_tenth") for variant, run in keys.itertuples(index=False, name=None)]
    return _draws(made, list(values), samples, seed)


def _draws(keys: list[tuple], values: list[np.ndarray], samples: int, seed: int) -> Draws:
    table = pd.DataFrame(keys, columns=["variant", "seed", "metric"]).assign(draft_step=pd.NA)
    stacked = np.stack(values) if values else np.zeros((0, 1 + samples))
    return Draws(table.astype({"draft_step": "Int64"}), stacked, seed)


def training_table(gradients: pd.DataFrame) -> pd.DataFrame:
    """Per parameter over the training: ``gradient`` and ``adam_step`` of the four projections of every branch; and the step relative to the weights.

    Columns: variant, seed, step, trained_tokens, branch, matrix, gradient, adam_step, relative_step. Layers are pooled.
    """
    rows = gradients[gradients["matrix"].str.endswith("_proj") | gradients["matrix"].str.startswith("fusion.")]
    rows = rows.assign(squared=np.where(rows["quantity"] == "numel", rows["value"], rows["value"] ** 2))
    key = ["variant", "seed", "step", "trained_tokens", "branch", "matrix"]
    wide = rows.groupby([*key, "quantity"], sort=False)["squared"].sum().unstack("quantity").reset_index()
    if wide.empty:
        return pd.DataFrame(columns=[*key, "gradient", "adam_step", "relative_step"])
    wide["gradient"] = np.sqrt(wide["grad_norm"] / wide["numel"])
    wide["adam_step"] = np.sqrt(wide["adam_step_norm"] / wide["numel"])
    wide["relative_step"] = np.sqrt(wide["adam_step_norm"] / wide["weight_norm"])
    return wide[[*key, "gradient", "adam_step", "relative_step"]]


def gate_table(gradients: pd.DataFrame, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Over the training: ``gate_mean`` and ``gate_spread`` with intervals over documents, and ``branch_ratio`` = ‖∂L/∂c‖ / ‖∂L/∂s‖ without.

    Means over draft steps and seeds (of ``trained_tokens`` too, as seeds draw other documents); the ratio takes the norms of all draft steps
    together.
    """
    tokens = gradients.groupby(["variant", "step"])["trained_tokens"].transform("mean")
    gradients = gradients.assign(trained_tokens=tokens.round().astype("int64"))
    by = ["variant", "quantity", "step", "trained_tokens"]
    rows = gradients[gradients["quantity"].isin(["gate_mean", "gate_spread"])]
    made = [intervals(*bootstrapped(rows.assign(top=rows["value"], bottom=1.0), by, samples, seed))]
    outputs = gradients[gradients["matrix"] == "output"]
    outputs = outputs.assign(
        quantity="branch_ratio", document=0,
        top=outputs["value"] ** 2 * (outputs["branch"] == "cross"), bottom=outputs["value"] ** 2 * (outputs["branch"] == "self"),
    )  # fmt: skip
    ratios = intervals(*bootstrapped(outputs, by, 1, seed, root=True))
    return pd.concat([*made, ratios.assign(low=np.nan, high=np.nan)], ignore_index=True)


def scaling_table(gradients: pd.DataFrame, scaled: str = "kv_2_grad50", plain: str = "kv_2") -> pd.DataFrame:
    """Over the training, ``scaled`` over ``plain``: the ratio of their gradients and of their Adam steps, matrix by matrix (mean over seeds)."""
    table = training_table(gradients[gradients["variant"].isin([scaled, plain])])
    wide = table.pivot_table(index=["step", "matrix"], columns="variant", values=["gradient", "adam_step"], sort=False)
    if not {scaled, plain} <= set(table["variant"]):
        return pd.DataFrame(columns=["step", "matrix", "gradient", "adam_step"])
    ratio = {name: wide[name][scaled] / wide[name][plain] for name in ("gradient", "adam_step")}
    return pd.DataFrame(ratio).reset_index()
