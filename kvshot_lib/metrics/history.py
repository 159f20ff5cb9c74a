"""What a training's record says on whether it got anywhere."""

import numpy as np
import pandas as pd

STEPS = 7  # draft steps of the validation that are compared between drafters


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
    keys = ["step_name", "variant", "draft_step", "step"]
    found = (
        pd.concat(ends)
        .groupby(keys, sort=False)
        .agg(
            million_tokens=("trained_tokens", "mean"),
            value=("acceptance", "mean"),
            seed_low=("acceptance", "min"),
            seed_high=("acceptance", "max"),
        )
    )
    found = found.reset_index().drop(columns="step")
    found["million_tokens"] /= 1e6
    return found.sort_values(["step_name", "variant", "million_tokens"], kind="stable").reset_index(drop=True)


def validation_mat(history: pd.DataFrame) -> pd.DataFrame:
    """1 + Σ_i Π_{j ≤ i} α_j on the validation documents along each training, K = 7 for all.

    Columns variant, seed, step, trained_tokens, value. Runs that were validated on fewer draft steps are left out.
    """
    rows = history[(history["split"] == "validation") & (history["draft_step"] < STEPS)].sort_values("draft_step")
    keys = ["variant", "seed", "step", "trained_tokens"]
    found = rows.groupby(keys)["acceptance"].agg(value=lambda a: 1 + np.cumprod(a).sum(), steps="size").reset_index()
    return found[found["steps"] == STEPS].drop(columns="steps").reset_index(drop=True)
