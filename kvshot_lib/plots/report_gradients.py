"""Sentences of notebook 05, written from numbers."""

import numpy as np
import pandas as pd

from ..metrics.gradients import nearest_context
from ..metrics.resampling import Interval
from ..metrics.tables import in_order
from .report import markdown_table, names

NO_FLOW = (
    "No gradient flow of these drafters is recorded: run python -m kvshot_lib.probes.gradients RESULTS_DIR where they are"
)
NO_HISTORY = (
    "Gradients were not recorded when these drafters were trained: train them again, every training records them now"
)
NO_GATES = (
    "No gate was recorded over a training: train hybrid or hybrid_warm again, every training records its gate now"
)


def recorded(runs: pd.DataFrame, flow: pd.DataFrame, gradients: pd.DataFrame) -> str:
    """Which runs have what this notebook draws."""
    lines = []
    for table, told in (
        (flow, "gradient flow of the trained drafter"),
        (gradients, "gradients recorded during training"),
    ):
        there = in_order(table["variant"])
        absent = [variant for variant in in_order(runs["variant"]) if variant not in there]
        lacking = f" Not recorded: {names(absent)}." if absent and there else ""
        lines.append(f"- {told.capitalize()}: {names(there)}.{lacking}")
    if len(flow):
        contexts = ", ".join(f"{c:,}" for c in np.unique(flow["context_length_tokens"]))
        lines.append(f"- Contexts of {contexts} tokens; {flow['document'].nunique()} sequences.")
    return "\n".join(lines)


def norms(flow: pd.DataFrame, table: pd.DataFrame) -> str:
    """A row a variant and branch: gradients of draft-side keys and values against queries and outputs, in total and per entry."""
    wide = table.set_index(["variant", "branch", "quantity", "matrix", "side"])["value"]
    rows = []
    for variant in in_order(table["variant"]):
        for branch in ("self", "cross"):
            cells = []
            for quantity in ("per_parameter", "per_entry"):
                for part, against in (("k_proj", "q_proj"), ("v_proj", "o_proj")):
                    top, bottom = (wide.get((variant, branch, quantity, m, "draft"), np.nan) for m in (part, against))
                    cells.append("–" if np.isnan(top / bottom) else f"{top / bottom:.3f}")
            if set(cells) != {"–"}:
                rows.append([f"`{variant}`", branch, *cells])
    header = [
        "variant",
        "branch",
        "k / q, per parameter",
        "v / o, per parameter",
        "k / q, per entry",
        "v / o, per entry",
    ]
    told = f"Gradients at a context of {nearest_context(flow):,} tokens, the part that comes in by draft-side entries over that of the other matrix:"
    return f"{told}\n\n{markdown_table(rows, header)}"


def attention(table: pd.DataFrame) -> str:
    """One sentence a branch: attention on draft-side entries against their share, at the shortest and the longest context."""
    last, lines = table["draft_step"].max(), []
    here = table[table["draft_step"] == last]
    contexts = sorted({here["context_length_tokens"].min(), here["context_length_tokens"].max()})
    for variant in in_order(here["variant"]):
        own = here[here["variant"] == variant]
        for (branch, layer), rows in own.groupby(["branch", "layer"], sort=False):
            parts = []
            for context in contexts:
                at = rows[rows["context_length_tokens"] == context].set_index("quantity")
                if len(at):
                    mass = Interval(*at.loc["draft_mass", ["value", "low", "high"]])
                    parts.append(
                        f"{mass} at {context:,} tokens, where they are {at.loc['draft_share', 'value']:.2%} of the entries"
                    )
            lines.append(f"- `{variant}`, {branch} branch of layer {layer}: {'; '.join(parts)}.")
    return f"Attention that draft-side entries get at draft step {last}:\n\n" + "\n".join(lines)


def steps(table: pd.DataFrame) -> str:
    """A row a variant and branch: gradient and Adam step of k and v against q and o, geometric means over the records after the first tenth."""
    rows = []
    late = table[table["step"] > 0.1 * table.groupby(["variant", "seed"])["step"].transform("max")]
    for variant in in_order(late["variant"]):
        for branch in ("self", "cross"):
            own = late[(late["variant"] == variant) & (late["branch"] == branch)]
            if own.empty:
                continue
            means = np.exp(
                np.log(own.set_index("matrix")[["gradient", "adam_step"]].clip(lower=1e-30)).groupby(level=0).mean()
            )
            cells = [
                f"{means.loc[part, quantity] / means.loc[against, quantity]:.3f}"
                for quantity in ("gradient", "adam_step")
                for part, against in (("k_proj", "q_proj"), ("v_proj", "o_proj"))
            ]
            rows.append([f"`{variant}`", branch, *cells])
    header = ["variant", "branch", "gradient k / q", "gradient v / o", "Adam step k / q", "Adam step v / o"]
    return "Per parameter, over the training after its first tenth:\n\n" + markdown_table(rows, header)


def scaling(table: pd.DataFrame, scale: float = 50.0) -> str:
    """What is left of the scaled gradient in Adam's step."""
    if table.empty:
        return "`kv_2_grad50` and `kv_2` have no gradients recorded in these tables, so nothing can be said of the ×50 ablation."
    means = np.exp(np.log(table.set_index("matrix")[["gradient", "adam_step"]]).groupby(level=0).mean())
    told = ", ".join(
        f"{matrix} {means.loc[matrix, 'gradient']:.2f} and {means.loc[matrix, 'adam_step']:.2f}"
        for matrix in ("q_proj", "k_proj", "v_proj", "o_proj")
        if matrix in means.index
    )
    return (
        f"`kv_2_grad50` over `kv_2`, gradient and Adam step (geometric means over the records): {told}. Adam divides by the root of a "
        f"running mean of squares, so a constant factor of {scale:g} cancels from its step; what differs comes by clipping, which the "
        "scaled gradients share with all others, and by the two trainings having gone different ways."
    )


def gates(table: pd.DataFrame, gradients: pd.DataFrame) -> str:
    """One sentence a hybrid: its gate at the first, tenth and last record, and the branches' gradients."""
    lines = []
    for variant in in_order(table["variant"]):
        own = table[table["variant"] == variant]
        mean = own[own["quantity"] == "gate_mean"].sort_values("step")
        ratio = own[own["quantity"] == "branch_ratio"].sort_values("step")
        first, end = (Interval(*mean.iloc[i][["value", "low", "high"]]) for i in (0, -1))
        lines.append(
            f"- `{variant}`: mean gate {first} at step {mean['step'].iloc[0]}, {end} at step {mean['step'].iloc[-1]}, the end; the cross "
            f"branch's output gets {ratio['value'].iloc[0]:.3f} times the self branch's gradient first and {ratio['value'].iloc[-1]:.3f} times it last."
        )
    return "\n".join(lines)


def final_gates(flow: pd.DataFrame) -> str:
    """The gate of the trained drafters, which needs no history."""
    rows = flow[flow["quantity"].isin(["gate_mean", "gate_spread"])]
    if rows.empty:
        return "No drafter with a gate was measured."
    rows = rows[rows["context_length_tokens"] == nearest_context(flow)]
    means = rows.groupby(["variant", "quantity"])["value"].mean().unstack()
    told = "; ".join(
        f"`{v}` {means.loc[v, 'gate_mean']:.3f} ± {means.loc[v, 'gate_spread']:.3f}" for v in in_order(means.index)
    )
    return f"Gate of the trained drafters, mean ± standard deviation over anchors and channels, at a context of {nearest_context(flow):,} tokens: {told}."
