"""Variants that differ from another one in a single point, and what that point changes."""

from dataclasses import replace

import pandas as pd

from ..drafters.variants import VARIANTS
from .resampling import Draws, difference_table

ABLATIONS = {
    "kv_2": [
        "kv_2_heads", "kv_2_mlp", "kv_2_unrotate", "kv_2_4kv", "kv_2_zero", "kv_2_shuffled", "kv_2_lagged",
        "states_2", "kv_2_no_ttt", "kv_2_grad50", "kv_2_all_anchors",
    ],
    "kv_1": ["none_1"],
    "kv_4": ["kv_4_all_anchors", "states_4"],
    "states_2": ["both_2"],
    "states_4": ["both_4"],
    "hidden": ["hidden_post_norm", "hidden_normed", "hidden_continued", "hidden_all_anchors"],
    "hidden_post_norm": ["hidden_31"],
    "hidden_31": ["hidden_31_continued"],
    "hybrid": ["hybrid_warm"],
    "hybrid_warm": ["cross_only_warm"],
}  # fmt: skip


def ablation_table(draws: Draws) -> pd.DataFrame:
    """Expected and measured MAT of each variant in ``ABLATIONS`` minus that of its reference, paired over documents.

    The columns are those of `bootstrap.difference_table` after a column ``reference``. Variants that were not measured,
    or whose reference was not, are left out; empty if that leaves none.
    """
    tables = []
    for reference, changed in ABLATIONS.items():
        there = [variant for variant in changed if variant in draws.variants]
        if reference in draws.variants and there:
            rows = draws.keys["variant"].isin([reference, *there]) & draws.keys["metric"].isin(
                ["expected_mat", "measured_mat"]
            )
            part = replace(draws, keys=draws.keys[rows].reset_index(drop=True), values=draws.values[rows.to_numpy()])
            table = difference_table(part, reference)
            tables.append(table.assign(reference=reference).sort_values("variant", key=lambda v: v.map(there.index)))
    if not tables:
        return pd.DataFrame(columns=["reference", "variant", "metric"])
    table = pd.concat(tables, ignore_index=True)
    return table[["reference", *(column for column in table.columns if column != "reference")]]


def not_measured(draws: Draws) -> list[str]:
    """Variants of ``ABLATIONS`` without a comparison, because they or their reference were not measured."""
    pairs = [(reference, variant) for reference, changed in ABLATIONS.items() for variant in changed]
    missing = {variant for pair in pairs for variant in pair[1:] if not {*pair} <= {*draws.variants}}
    return [variant for variant in VARIANTS if variant in missing]
