"""Sentences and tables of notebook 09, written from numbers."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ..metrics.budgets import at_compute
from ..metrics.decoding import ALL, decoding_table
from ..metrics.goals import contenders
from ..metrics.resampling import Draws, Interval
from ..metrics.tables import in_order
from .report import markdown_table, names, signed

NO_COMPUTE = "Training and drafting are not counted for these runs: `python -m kvshot_lib.study.compute TABLES_DIR`, from the repository's root"
NO_DECODING = "No decoding with these drafters is recorded: `python -m kvshot_lib.decoding.timing RESULTS_DIR`, on an otherwise idle machine"
NO_DUEL = "The two drafters of B2 have not met on prompts of their own: `python -m kvshot_lib.decoding.duel RESULTS_DIR`, on an otherwise idle machine"
NO_LATENCY = "No latency at the paper's scale is recorded: `python -m kvshot_lib.decoding.latency --keep TABLES_DIR`, on a GPU"


def not_run(runs: pd.DataFrame, wanted: Iterable[str], compute: pd.DataFrame, timed: pd.DataFrame, profile: str) -> str:
    """What of this notebook's drafters is there, what is missing, and the commands that make it."""
    seeds = runs.groupby("variant")["seed"].nunique()
    absent = [variant for variant in in_order(wanted) if variant not in seeds]
    lines = [f"- Trained: {len(seeds)} drafters; {names(in_order(seeds[seeds > 1].index))} with more than one seed."]
    if absent:
        command = f"python -m kvshot_lib.study.sweep {profile} {' '.join(f'{v}/seed0' for v in absent)}"
        lines.append(
            f"- Of the drafters that this notebook compares, not run yet: {names(absent)}. They are trained by `{command}` (one GPU) and "
            f"added by `python -m kvshot_lib.metrics.tables collect results/{profile} --keep data/recorded/{profile}`, then "
            f"`python -m kvshot_lib.study.compute results/{profile}/tables`."
        )
    uncounted = [v for v in in_order(seeds.index) if v not in set(compute["variant"])]
    if uncounted:
        lines.append(f"- {NO_COMPUTE} (lacking: {names(uncounted)}).")
    lines.append(f"- Decoded: {names(in_order(timed['variant']))}." if len(timed) else f"- {NO_DECODING}.")
    return "\n".join(lines)


def in_short(draws: Draws, cost: pd.DataFrame, card: pd.DataFrame) -> str:
    """The verdicts, the best of each kind, and where the plane's best drafter stands."""
    told = {row.claim: row for row in card.itertuples()}
    lines = [f"- C18, block-wise training lifts KV reuse: **{told['C18'].verdict}** ({_parts(card, 'C18')})."]
    lines.append(f"- B1, a tenth more measured MAT: **{told['B1'].verdict}** ({_parts(card, 'B1')}).")
    lines.append(f"- B2, a tenth more tokens/s: **{told['B2'].verdict}**.")
    counted = cost.dropna(subset=["bytes_ratio"])
    if len(counted):
        best, longest = (counted.loc[counted[name].idxmax()] for name in ("predicted_speedup", "value"))
        lines.append(
            f"- Longest runs: `{longest['variant']}`, measured MAT {_mat(longest)}. Best by the cost model, chains of 7 and bytes counted: "
            f"`{best['variant']}`, {best['predicted_speedup']:.2f}× from a MAT of {_mat(best)} at {best['bytes_ratio']:.2f} of a target forward."
        )
    return "\n".join(lines)


def _parts(card: pd.DataFrame, whole: str) -> str:
    parts = [row for row in card.itertuples() if row.claim.startswith(whole) and row.claim != whole]
    return "; ".join(f"{row.claim} {row.verdict}" for row in parts)


def _mat(row: pd.Series) -> Interval:
    return Interval(row["value"], row["low"], row["high"])


def budgets(runs: pd.DataFrame, compute: pd.DataFrame, draws: Draws, variants: Iterable[str]) -> str:
    """A row a variant: tokens, anchors and pairs that were computed, training FLOPs with and without the start's, measured MAT."""
    rows = []
    for variant in in_order(variants):
        own = compute[compute["variant"] == variant]
        if own.empty or variant not in draws.variants:
            continue
        mean = own[["tokens", "anchors", "pairs", "training_flops", "start_flops"]].mean()
        start = runs.loc[runs["variant"] == variant, "init_from"].iloc[0] if "init_from" in runs else ""
        total = (mean["training_flops"] + mean["start_flops"]) / 1e15
        rows.append(
            [f"`{variant}`", *(f"{mean[name] / 1e6:.1f} M" for name in ("tokens", "anchors", "pairs"))]
            + [
                f"{mean['training_flops'] / 1e15:.2f}",
                f"{total:.2f} (from `{start}`)" if isinstance(start, str) and start else "–",
            ]
            + [draws.mean(variant, "measured_mat")]
        )
    header = [
        "variant",
        "tokens",
        "anchors, step 0",
        "pairs (t, k)",
        "training, 10¹⁵ FLOPs",
        "with its start",
        "measured MAT",
    ]
    return markdown_table(rows, header)


def equal_compute(draws: Draws, budget: pd.DataFrame, compute: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> str:
    """One bullet a comparison that was run: at equal tokens, what arithmetic each took, and the other's validation MAT at equal FLOPs."""
    flops, lines = compute.groupby("variant")["training_flops"].mean(), []
    for a, b in pairs:
        if not ({a, b} <= set(draws.variants) and {a, b} <= set(flops.index)):
            continue
        gap = draws.contrast((1, a, "measured_mat"), (-1, b, "measured_mat"))
        line = f"- `{a}` against `{b}`, equal tokens: measured MAT {signed(gap)}, **{_word(gap)}**; it took {flops[a] / flops[b]:.2f} times the arithmetic."
        cheap, dear = sorted((a, b), key=lambda v: flops[v])
        mine, theirs = at_compute(budget, cheap, flops[cheap] * (1 - 1e-9)), at_compute(budget, dear, flops[cheap])
        if np.isfinite(mine + theirs) and flops[cheap] < 0.98 * flops[dear]:
            line += (
                f" At the {flops[cheap] / 1e15:.2f}·10¹⁵ FLOPs that `{cheap}` took in all, its MAT on validation documents is {mine:.2f} "
                f"and that of `{dear}`, then in mid-training, {theirs:.2f}."
            )
        lines.append(line)
    return "\n".join(lines) or "None of these comparisons has both runs."


def _word(found: Interval) -> str:
    return {"above": "more", "below": "less"}.get(found.verdict(0), "not distinguishable")


def steps(draws: Draws, variants: Iterable[str]) -> str:
    """One bullet a variant: step acceptance first, second and last, and retention."""
    last, lines = int(draws.keys["draft_step"].max()), []
    for variant in in_order(variants):
        first, second, end = (draws.mean(variant, "step_acceptance", k) for k in (0, 1, last))
        lines.append(
            f"- `{variant}`: {first} at step 0, {second} at step 1, {end} at step {last}; retention {draws.mean(variant, 'retention')}."
        )
    return "\n".join(lines)


def levers(table: pd.DataFrame) -> str:
    """A sentence a group of comparisons: which of them gain, which lose, which can't be told."""
    lines = []
    for group in table["group"].unique():
        own = table[table["group"] == group]
        ran = own.dropna(subset=["value"])
        words: dict[str, list[str]] = {"more": [], "less": [], "not distinguishable": []}
        for row in ran.itertuples():
            words[_word(Interval(row.value, row.low, row.high))].append(
                f"`{row.variant}` over `{row.reference}` ({row.value:+.3f})"
            )
        told = (
            "; ".join(f"{word}: {', '.join(found)}" for word, found in words.items() if found) or "none of them is run"
        )
        lines.append(f"- {group}: {told}. Not run: {len(own) - len(ran)} of {len(own)}.")
    return "\n".join(lines) + (
        "\n\nWhere a drafter has one seed, the interval covers documents only."
        if (table["seeds"].dropna() == 1).any()
        else ""
    )


def spread(draws: Draws, variants: Iterable[str]) -> str:
    """Measured MAT of each seed of some variants, those of one seed left out."""
    found = [(v, draws.rows(v, "measured_mat")[:, 0]) for v in in_order(variants) if v in draws.variants]
    told = [f"`{v}` {', '.join(f'{value:.3f}' for value in own)}" for v, own in found if len(own) > 1]
    return f"Measured MAT seed by seed: {'; '.join(told)}." if told else "One seed of each."


def cost(table: pd.DataFrame) -> str:
    """A row a variant by predicted speedup: what a chain costs and what that makes of its measured MAT."""
    rows = [
        [
            f"`{r.variant}`",
            r.num_layers,
            f"{r.bytes_ratio:.3f}",
            f"{r.flops_ratio:.3f}",
            _mat(table.loc[r.Index]),
            f"{r.predicted_speedup:.2f}×",
        ]
        for r in table.dropna(subset=["bytes_ratio"])
        .sort_values("predicted_speedup", ascending=False, kind="stable")
        .itertuples()
    ]
    return markdown_table(
        rows, ["variant", "layers", "chain, bytes", "chain, FLOPs", "measured MAT", "cost model, by bytes"]
    )


def timed(table: pd.DataFrame) -> str:
    """A row a timed chain: decoded MAT, cost, speedup measured and predicted."""
    if table.empty:
        return NO_DECODING + "."
    rows = [
        [f"`{r.variant}`", r.plan, f"{r.device}, {r.dtype}", Interval(r.value, r.low, r.high), f"{r.cost_ratio:.2f}"]
        + [Interval(r.speedup, r.speedup_low, r.speedup_high), f"{r.predicted_speedup:.2f}"]
        for r in table.itertuples()
    ]
    header = [
        "variant",
        "chain",
        "device",
        "decoded MAT",
        "draft time / verify time",
        "speedup, measured",
        "cost model",
    ]
    return markdown_table(rows, header)


def duel(rows: pd.DataFrame, samples: int = 2000, seed: int = 0) -> str:
    """A row each of the two drafters of B2, on the prompts that neither was chosen by; ``rows`` is `decode_duel`."""
    if rows.empty:
        return NO_DUEL + "."
    found = decoding_table(rows, samples, seed)
    found = found[(found["mode"] == "chain") & (found["category"] == ALL)]
    lines = [
        [f"`{r.variant}`", r.plan, r.prompts, Interval(r.decoded_mat, r.decoded_mat_low, r.decoded_mat_high)]
        + [f"{(r.draft_s + r.project_s) / r.verify_s:.2f}", f"{r.tokens_per_s:.1f}"]
        + [Interval(r.speedup, r.speedup_low, r.speedup_high)]
        for r in found.itertuples()
    ]
    header = ["variant", "chain", "prompts", "decoded MAT", "draft time / verify time", "tokens/s", "speedup"]
    return markdown_table(lines, header)


def latency(table: pd.DataFrame, prefix_tokens: int = 2048) -> str:
    """A row a drafter measured at the paper's scale: a chain of 7, or a block's pass, over one target forward."""
    if table.empty:
        return NO_LATENCY + "."
    there = table["prefix_tokens"].unique()
    at = min(there, key=lambda n: (abs(n - prefix_tokens), n))
    own = table[table["prefix_tokens"] == at].set_index(["what", "tokens"])["milliseconds"]
    alone, rows = own.get(("verify", 1), np.nan), []
    for (what, tokens), milliseconds in own.items():
        kind, _, variant = what.partition(" ")
        if (kind == "draft" and tokens == 1) or kind == "block":
            chain = 7 * milliseconds if kind == "draft" else milliseconds
            rows.append([f"`{variant}`", f"{milliseconds:.3f}", f"{chain:.3f}", f"{chain / alone:.3f}"])
    told = f"At {at:,} tokens of context on {table['device'].iloc[0]}, {table['architecture'].iloc[0]}: a target forward takes {alone:.2f} ms."
    return f"{told}\n\n{markdown_table(rows, ['drafter', 'one pass, ms', 'chain of 7 or block, ms', 'over a target forward'])}"


def choice(runs: pd.DataFrame, history: pd.DataFrame, most: int = 3) -> str:
    """The best of each side by validation acceptance, which is what the goals are about."""
    table, lines = contenders(runs, history), []
    for side, told in (("kv", "reuse the KV cache"), ("hidden", "read hidden states alone")):
        own = table[table["reads"] == side].head(most)
        best = ", ".join(
            f"`{r.variant}` {r.validation_mat:.3f} ({r.tokens / 1e6:.1f} M tokens)" for r in own.itertuples()
        )
        lines.append(f"- Of the drafters that {told}, best on validation documents: {best or 'none'}.")
    return "\n".join(lines)
