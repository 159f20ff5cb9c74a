"""Claim C14 from decoded answers: its statistics as `bootstrap.Draws` over prompts, and its rows of the scorecard (no torch)."""

import numpy as np
import pandas as pd

from .claims import DECODE_CLAIMS, scorecard
from .decode_costs import one_dtype
from .decode_tables import drawn
from .paper import PAPER
from .resampling import Draws


def decode_draws(prompts: pd.DataFrame, samples: int = 2000, seed: int = 0, dtype: str = "") -> Draws:
    """Metrics of each drafter that decoded, on the prompts and on resamples of them; all drafters share the resamples.

    tree_decoded_mat, chain_decoded_mat : tokens per target forward, by the tree, and by the longest chain that all drafters (blocks aside) had.
    log_draft_step_s : natural log of the seconds of one draft step of that chain, so that a difference is that of a ratio's logarithm.
    """
    prompts = one_dtype(prompts, dtype)
    own = prompts[prompts["mode"].isin(["chain", "tree"])]
    lengths = own.loc[(own["mode"] == "chain") & ~own["variant"].str.startswith("block")].groupby("variant")["plan"]
    common = set.intersection(*lengths.agg(set)) if len(lengths) else set()
    longest = max(common, key=int, default=None)
    keys, values = [], []
    for (variant, run, _, _, mode, plan), part, _, ratio in drawn(prompts, samples, seed):
        metrics = {f"{mode}_decoded_mat": "decoded_mat"} if mode == "tree" or plan == longest else {}
        metrics |= {"log_draft_step_s": "draft_step_s"} if mode == "chain" and plan == longest else {}
        for metric, name in metrics.items():
            row = np.log(ratio[name]) if metric.startswith("log") else ratio[name]
            keys.append([variant, run, metric, pd.NA, part["forwards"].sum(), part["prompt"].nunique()])
            values.append(row)
    table = pd.DataFrame(keys, columns=["variant", "seed", "metric", "draft_step", "anchors", "documents"])
    stacked = np.stack(values) if values else np.zeros((0, 1 + samples))
    return Draws(table.astype({"draft_step": "Int64"}), stacked, seed)


def decode_rows(prompts: pd.DataFrame, samples: int = 2000, seed: int = 0, dtype: str = "") -> pd.DataFrame:
    """The scorecard's rows of C14 and its parts, each on the prompts that all its drafters answered; *not run* for what was not decoded."""
    parts = []
    for claim in DECODE_CLAIMS:
        draws = decode_draws(answered_by_all(prompts, {term[1] for term in claim.terms}), samples, seed, dtype)
        own = draws.keys["metric"].isin([term[2] for term in claim.terms])
        parts.append((draws.keys[own], draws.values[own]))
    keys, values = zip(*parts, strict=True)
    draws = Draws(pd.concat(keys, ignore_index=True), np.concatenate(values), seed)
    card = scorecard(draws, decoded_by_the_paper(), DECODE_CLAIMS)
    return card.assign(measured_verdict="")  # decoded MAT is no product of marginals


def answered_by_all(prompts: pd.DataFrame, variants: set[str]) -> pd.DataFrame:
    """The rows of prompts that each of ``variants`` answered, those aside that answered none."""
    by = prompts[prompts["variant"].isin(variants)].groupby("variant")["prompt"].agg(set)
    return prompts[prompts["prompt"].isin(set.intersection(*by))] if len(by) else prompts


def decoded_by_the_paper() -> pd.DataFrame:
    """The paper's tokens per forward in tree decoding, with the columns of `paper.read_paper`."""
    table = pd.read_csv(PAPER, dtype="str", keep_default_na=False)
    table = table[(table["metric"] == "decoded_mat_tree") & (table["study_variant"] != "")]
    columns = ["variant", "metric", "draft_step", "value", "study_variant", "baseline", "study_baseline"]
    table = table.assign(metric="tree_decoded_mat", draft_step=pd.NA, value=pd.to_numeric(table["value"]))
    return table[columns].astype({"draft_step": "Int64"})
