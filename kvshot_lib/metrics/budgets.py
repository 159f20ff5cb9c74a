"""The tables behind notebook 09: budgets, comparisons that change one thing, cost and speed of drafting (no torch)."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from ..drafters.variants import CURES
from .goals import STEPS
from .resampling import Draws, summary_table
from .tables import in_order

SHOWN = (
    "hidden",
    "kv_2",
    "kv_2_all_anchors",
    "block_kv_2",
    "block_kv_2_equal_compute",
    "block_states_2",
    "block_both_2",
)

# Comparisons, each (a, b): a differs from b in the one point that its group is about.
DENSE = (("hidden_all_anchors", "hidden"), ("kv_2_all_anchors", "kv_2"), ("kv_4_all_anchors", "kv_4"), ("block_kv_2_all_anchors", "block_kv_2"))  # fmt: skip
PARALLEL = (("block_kv_1", "kv_1"), ("block_kv_2", "kv_2"), ("block_kv_2_equal_compute", "kv_2"), ("block_kv_4", "kv_4"), ("block_kv_2_all_anchors", "kv_2_all_anchors"))  # fmt: skip
CONTEXT = (("block_kv_1", "block_states_1"), ("block_kv_2", "block_states_2"), ("block_kv_4", "block_states_4"), ("block_both_2", "block_kv_2"), ("block_both_4", "block_kv_4"))  # fmt: skip
SIZE = (("block_kv_2_b16", "block_kv_2"),)
STARTS = (("kv_2_kv_init", "kv_2"), ("kv_2_lag_augment", "kv_2"))
NORMS = (
    ("hidden_post_norm", "hidden"), ("hidden_normed", "hidden"), ("hidden_31", "hidden"), ("hidden_31", "hidden_post_norm"),
    ("hidden_31_continued", "hidden_continued"), ("hybrid_warm_31", "hybrid_warm"),
)  # fmt: skip
SOURCE = (
    ("states_2", "kv_2"), ("both_2", "kv_2"), ("both_2", "states_2"), ("states_4", "kv_4"),
    ("both_4", "kv_4"), ("both_4", "states_4"), ("states_4_continued", "kv_4_unrotate_mlp_continued"),
    ("both_4_continued", "kv_4_unrotate_mlp_continued"), ("both_4_continued", "states_4_continued"),
)  # fmt: skip
REUSE = (
    ("kv_4_unrotate_mlp", "kv_4"), ("hybrid_warm", "hidden_continued"),
    ("hybrid_warm_31", "hidden_31_continued"),
    ("hybrid_warm_31_combined", "hybrid_warm_31"), ("kv_4_unrotate_mlp_continued", "hidden_31_continued"),
    ("states_4_continued", "hidden_31_continued"), ("both_4_continued", "hidden_31_continued"),
    ("both_4_continued", "hybrid_warm_31"),
)  # fmt: skip
LEVERS = {
    "Dense gradients: every anchor": DENSE,
    "Parallel drafting: a block": PARALLEL,
    "What a block reads": CONTEXT,
    "Sixteen slots": SIZE,
    "KV reuse without a gate": STARTS,
    "Two norms, alone and together": NORMS,
    "Keys and values from the cache, from hidden states, from both": SOURCE,
    "The strongest of each kind": REUSE,
}
REFERENCES = ("hybrid_warm", "hidden_continued")
CURED = {f"Minus {b}": tuple((a, b) for a in ("hybrid_warm", *CURES) if a != b) for b in REFERENCES}


def named(groups: Mapping[str, Iterable[tuple[str, str]]]) -> list[str]:
    """Every variant of some groups of comparisons, once, in the study's order."""
    return in_order(name for pairs in groups.values() for pair in pairs for name in pair)


def pair_table(
    draws: Draws, groups: Mapping[str, Iterable[tuple[str, str]]], metric: str = "measured_mat"
) -> pd.DataFrame:
    """Each comparison's difference of ``metric`` with its interval over documents and seeds, and the fewest seeds of the two.

    Comparisons that lack a run are rows without numbers.
    """
    rows = []
    for group, pairs in groups.items():
        for a, b in pairs:
            row = {"group": group, "variant": a, "reference": b, "metric": metric}
            if {a, b} <= set(draws.variants):
                found = draws.contrast((1, a, metric), (-1, b, metric))
                row |= {**vars(found), "seeds": min(draws.seeds(a), draws.seeds(b))}
            rows.append(row)
    columns = ["group", "variant", "reference", "metric", "value", "low", "high", "seeds"]
    return (
        pd.DataFrame(rows)
        .reindex(columns=columns)
        .astype({"value": float, "low": float, "high": float, "seeds": "Int64"})
    )


def budget_table(history: pd.DataFrame, compute: pd.DataFrame) -> pd.DataFrame:
    """Validation MAT (product of marginals, K = 7) along each training: trained tokens and training FLOPs so far, its start's not included.

    FLOPs grow with the tokens: a run's FLOPs by its tokens. Runs that were validated on fewer draft steps are left out.
    """
    rows = history[(history["split"] == "validation") & (history["draft_step"] < STEPS)].sort_values("draft_step")
    keys = ["variant", "seed", "step", "trained_tokens"]
    found = rows.groupby(keys)["acceptance"].agg(value=lambda a: 1 + np.cumprod(a).sum(), steps="size").reset_index()
    found = found[found["steps"] == STEPS].drop(columns="steps")
    found = found.merge(compute[["variant", "seed", "tokens", "training_flops"]], on=["variant", "seed"], how="left")
    found["flops"] = found["training_flops"] * found["trained_tokens"] / found["tokens"]
    return found[[*keys, "flops", "value"]]


def at_compute(budget: pd.DataFrame, variant: str, flops: float) -> float:
    """Validation MAT of a variant where its training had spent ``flops``, between two records by a straight line; NaN outside them."""
    curves = [own.sort_values("flops") for _, own in budget[budget["variant"] == variant].groupby("seed")]
    values = [np.interp(flops, own["flops"], own["value"], left=np.nan, right=np.nan) for own in curves]
    return float(np.mean(values)) if values else np.nan


def cost_table(runs: pd.DataFrame, compute: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """A row a variant: measured MAT with its interval, and the drafting cost of one chain over one target forward (mean over seeds).

    ``bytes_ratio`` and ``flops_ratio`` are counted; ``predicted_speedup`` is the cost model's with ``bytes_ratio``.
    """
    mat = summary_table(draws)
    mat = mat[mat["metric"] == "measured_mat"].drop(columns=["metric", "draft_step"])
    ratio = compute.assign(
        bytes_ratio=compute["chain_bytes"] / compute["target_bytes"],
        flops_ratio=compute["chain_flops"] / compute["target_flops"],
    )
    means = (
        ratio.groupby("variant")[["bytes_ratio", "flops_ratio", "training_flops", "start_flops"]].mean().reset_index()
    )
    layers = runs.groupby("variant")[["paradigm", "num_layers"]].first().reset_index()
    table = mat.merge(means, on="variant", how="left").merge(layers, on="variant", how="left")
    table["predicted_speedup"] = table["value"] / (1 + table["bytes_ratio"])
    return table.set_index("variant").loc[in_order(table["variant"])].reset_index()


def timed_table(decoding: pd.DataFrame) -> pd.DataFrame:
    """Chains as they were timed, over all prompts: decoded MAT with its interval against (draft + projection) / verification.

    Columns variant, plan, device, dtype, bytes_ratio's counterpart ``cost_ratio``, value, low, high, speedup, speedup_low, speedup_high,
    ``predicted_speedup`` = decoded MAT / (1 + cost_ratio). One row a variant: its fastest chain (mean over seeds).
    """
    rows = decoding[(decoding["mode"] == "chain") & (decoding["category"] == "all") & decoding["verify_s"].gt(0)]
    rows = rows.assign(cost_ratio=(rows["draft_s"] + rows["project_s"]) / rows["verify_s"])
    numbers = [
        "cost_ratio",
        "decoded_mat",
        "decoded_mat_low",
        "decoded_mat_high",
        "speedup",
        "speedup_low",
        "speedup_high",
    ]
    keys = ["device", "dtype", "variant", "plan"]
    table = rows.groupby(keys, sort=False)[numbers].mean().reset_index().sort_values("speedup", kind="stable")
    table = table.drop_duplicates(["device", "dtype", "variant"], keep="last")
    table = table.rename(columns={"decoded_mat": "value", "decoded_mat_low": "low", "decoded_mat_high": "high"})
    table["predicted_speedup"] = table["value"] / (1 + table["cost_ratio"])
    order = {name: place for place, name in enumerate(in_order(table["variant"]))}
    return table.sort_values("variant", key=lambda v: v.map(order), kind="stable").reset_index(drop=True)


def depth_table(cost: pd.DataFrame) -> pd.DataFrame:
    """Rows of `cost_table` whose variants differ from one another in depth alone, with their ``family``: kv_N, kv_N_from_hidden, block_kv_N …"""
    kind = r"^(kv|block_kv|block_hidden|block_both)_\d+(_from_hidden|_with_hidden)?$"
    family = cost["variant"].where(cost["variant"].str.match(kind)).str.replace(r"_\d+", "_N", regex=True)
    return cost.assign(family=family)[family.notna()].reset_index(drop=True)
