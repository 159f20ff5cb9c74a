"""Sentences and tables of notebook 07, computed from its tables: tokens per forward, speed, and what was lossless (costs: `report_decode_costs`)."""

import numpy as np
import pandas as pd

from ..metrics.decode_costs import PEERS, chosen
from ..metrics.decode_tables import ALL
from ..metrics.resampling import Interval
from ..metrics.tables import in_order
from .report import markdown_table, names

MISSING = "**Not measured here**: `python -m kvshot_lib.{}` makes the tables{}."
NO_SPEED = MISSING.format("speed RESULTS_DIR", ", on trained drafters and an otherwise idle machine")
NO_LOSSLESS = MISSING.format("lossless RESULTS_DIR", "; `make verify-lossless` runs it")
NO_LATENCY = (
    "**Not run**: the paper's scale needs a GPU. `python -m kvshot_lib.decoding.latency --keep TABLES_DIR` measures it there, with the Qwen3-8B "
    "architecture and random weights."
)
SPEED_GOAL = 1.3


def measured_on(prompts: pd.DataFrame, runs: pd.DataFrame) -> str:
    """What was decoded, where and how often."""
    device, dtype = (", ".join(prompts[name].unique()) for name in ("device", "dtype"))
    turns = len(prompts[["prompt", "turn"]].drop_duplicates())
    longest, repeats = prompts["new_tokens"].max(), prompts["repeats"].max()
    drafters = in_order(v for v in prompts["variant"].unique() if v != PEERS)
    target = ", ".join(f"`{name}`" for name in runs["target"].unique())
    return (
        f"Measured on {device}, {dtype}, target {target}: {names(drafters)}, one seed each; {prompts['prompt'].nunique()} prompts "
        f"({turns} user turns) in {prompts['category'].nunique()} categories, answers of at most {longest} tokens, "
        f"{repeats} timed pass{'es' if repeats > 1 else ''} of each way, batch size 1."
    )


def in_short(decoding: pd.DataFrame, plans: pd.DataFrame, again: pd.DataFrame) -> str:
    """The fastest way, how it compares with the target alone and with prompt lookup, and the most tokens per forward.

    ``again`` has rows like those of ``decoding``, of drafters that were timed on other prompts, too (`duel`); it may be empty.
    """
    whole = decoding[(decoding["category"] == ALL) & (decoding["mode"] != "alone")]
    own = whole[whole["variant"] != PEERS]
    best = own.loc[own["speedup"].idxmax()]
    most = own.loc[own["decoded_mat"].idxmax()]
    found = _interval(best, "speedup")
    told = {
        "above": "it is **faster**",
        "below": "it is **slower**",
        "not distinguishable from": "**no difference** can be told from chance",
    }
    fresh = chosen(again[again["category"] == ALL], plans, "chain").dropna(subset=["speedup"]) if len(again) else again
    lines = [
        (
            f"- The fastest way is `{best['variant']}` with a {_plan(best)}: {best['tokens_per_s']:.3g} tokens/s against "
            f"{best['target_tokens_per_s']:.3g} of the target alone, {found} times as fast: {told[found.verdict(1)]} than the "
            f"target alone.{'' if len(fresh) else ' ' + _goal(found)}"
        ),
        f"- Most tokens per target forward: `{most['variant']}` with a {_plan(most)}, {_interval(most, 'decoded_mat')}.",
    ]
    if len(fresh):
        told = [f"`{row['variant']}` with a {_plan(row)} {_interval(row, 'speedup')}" for _, row in fresh.iterrows()]
        best = _interval(fresh.loc[fresh["speedup"].idxmax()], "speedup")
        lines.insert(
            1,
            f"- The fastest of many on {whole['prompts'].max()} prompts looks faster than it is. On {fresh['prompts'].max():.0f} others, by which it was not chosen: "
            f"{', '.join(told)} times the target alone. {_goal(best)}",
        )
    for row in whole[whole["variant"] == PEERS].itertuples():
        found = Interval(row.speedup, row.speedup_low, row.speedup_high)
        lines.append(
            f"- transformers' own `generate` with {row.mode.replace('_', ' ')}: {row.tokens_per_s:.3g} tokens/s, {found} times "
            f"`generate` alone, {row.decoded_mat:.2f} tokens per forward; it needs no drafter."
        )
    faster = chosen(whole, plans, "chain")
    faster = faster[faster["speedup_low"] > 1]
    lines.append(f"- Chains whose whole interval is above 1: {names(faster['variant'])}.")
    return "\n".join(lines)


def _goal(found: Interval) -> str:
    told = {"above": "is reached", "below": "is missed", "not distinguishable from": "lies inside the interval"}
    return f"The study's goal of {SPEED_GOAL} {told[found.verdict(SPEED_GOAL)]}."


def mats(decoding: pd.DataFrame, plans: pd.DataFrame, acceptance: pd.DataFrame) -> str:
    """Tokens per forward over all prompts, chain and tree, and teacher-forced measured MAT beside them."""
    forced = acceptance[acceptance["metric"] == "measured_mat"].groupby("variant")["value"].mean()
    rows = []
    for variant in in_order(plans["variant"]):
        own = chosen(decoding[decoding["category"] == ALL], plans[plans["variant"] == variant]).set_index("mode")
        cells = []
        for mode in ("chain", "tree"):
            at = own.loc[mode] if mode in own.index else None
            cells += ["–", "–"] if at is None else [at["plan"], _cell(at, "decoded_mat")]
        rows.append([f"`{variant}`", *cells, f"{forced[variant]:.3f}" if variant in forced else "–"])
    header = ["variant", "chain of", "tokens per forward", "tree", "tokens per forward", "teacher-forced measured MAT"]
    return markdown_table(rows, header)


def speeds(decoding: pd.DataFrame, plans: pd.DataFrame) -> str:
    """Tokens per second of the chosen plans, against the target alone, and how many answers were its own."""
    rows = []
    for row in chosen(decoding[decoding["category"] == ALL], plans, "chain", "tree").itertuples():
        speed = Interval(row.speedup, row.speedup_low, row.speedup_high)
        same = f"{row.same_answers} of {row.answers}"
        rows.append(
            [
                f"`{row.variant}`",
                _plan(row._asdict()),
                f"{row.tokens_per_s:.3g}",
                f"{row.target_tokens_per_s:.3g}",
                speed,
                same,
            ]
        )
    header = [
        "variant",
        "plan",
        "tokens/s",
        "target alone",
        "speedup",
        "answers equal to the target's, token for token",
    ]
    return markdown_table(rows, header)


def lossless(table: pd.DataFrame) -> str:
    """What was compared, token by token, and what differed."""
    rows = []
    for (variant, mode, dtype), own in table.groupby(["variant", "mode", "dtype"], sort=False):
        differ, gap = int((own["mismatches"] > 0).sum()), own["logit_gap"].max()
        mat = (own["new_tokens"] - 1).sum() / own["target_forwards"].sum()
        rows.append(
            [f"`{variant}`", mode, dtype, own["prompt"].nunique(), f"{own['new_tokens'].sum():,}", f"{mat:.2f}", f"{own['mismatches'].sum():,}", differ,
             "–" if np.isnan(gap) else f"{gap:.3f}"]
        )  # fmt: skip
    exact = table[table["dtype"] == "float32"]
    wrong, tokens = int(exact["mismatches"].sum()), int(exact["new_tokens"].sum())
    told = (
        f"**In float32: {wrong:,} of {tokens:,} generated tokens differ from the target alone.**"
        if tokens
        else "Not run in float32."
    )
    header = [
        "variant",
        "mode",
        "number format",
        "prompts",
        "tokens compared",
        "tokens per forward",
        "tokens that differ",
        "answers that differ",
        "largest gap of logits where one starts to differ",
    ]
    where = ", ".join(sorted(table["device"].unique()))
    return f"{told} Measured on {where}.\n\n{markdown_table(rows, header)}"


def _plan(row) -> str:
    return f"{row['mode']} {'of ' if row['mode'] == 'chain' else ''}{row['plan']}"


def _interval(row, name: str) -> Interval:
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _cell(row, name: str) -> str:
    return str(_interval(row, name)).replace(" [", "<br>[")
