"""Sentences of notebook 06, computed from its tables: what the shift is like, the interaction and its verdict, what can be read back."""

import numpy as np
import pandas as pd

from ..metrics.claims import shift_claim, verdict
from ..metrics.resampling import Draws, Interval
from ..metrics.tables import in_order
from .prefix import interaction_table, pairs
from .report import markdown_table, names, signed

MISSING = "**Not measured here**: `python -m kvshot_lib.{} RESULTS_DIR` makes the tables, on trained drafters and their features."
SUPPORTS = {
    "above": "hidden loses more",
    "below": "hidden loses less",
    "not distinguishable from": "no difference can be told from chance",
}


def shift_facts(shift: pd.DataFrame) -> str:
    """Size of the shift and its rank correlation with entropy, a row a draft step."""
    rows = []
    for step, own in shift.groupby("draft_step"):
        low, middle, high = own["shift"].quantile([0.1, 0.5, 0.9])
        ranks = own[["shift", "entropy", "shift_with_sink", "new_mass"]].rank().corr()["shift"]
        rows.append(
            [step, f"{len(own):,}", f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{own['shift_with_sink'].median():.3f}"]
        )
        rows[-1] += [
            f"{own['new_mass'].median():.3f}",
            *(f"{ranks[name]:+.2f}" for name in ("entropy", "shift_with_sink", "new_mass")),
        ]
    header = ["draft step", "anchors", "shift: median (10% to 90%)", "with sink: median", "new mass: median"]
    header += [f"rank correlation of shift with {name}" for name in ("entropy", "shift with sink", "new mass")]
    return markdown_table(rows, header)


def interactions(table: pd.DataFrame) -> str:
    """`interaction_table` as Markdown: a row for each comparison and draft step."""
    rows = []
    for (variant, step), own in table.groupby(["variant", "draft_step"], sort=False):
        found = {row.metric: Interval(row.value, row.low, row.high) for row in own.itertuples()}
        told = SUPPORTS[found["shift_slope"].verdict(0)]
        rows.append(
            [
                f"`{variant}`",
                step,
                *(signed(found[m]) for m in ("shift_slope", "entropy_slope", "standardised_fall")),
                told,
            ]
        )
    rows.sort(key=lambda row: in_order(table["variant"]).index(row[0].strip("`")))
    header = [
        "against hidden",
        "draft step",
        "paradigm × shift",
        "paradigm × entropy",
        "fall of hidden minus its own",
        "by paradigm × shift",
    ]
    return markdown_table(rows, header)


def the_verdict(draws: Draws) -> str:
    """H1: its statistic, interval and verdict; whether the second statistic agrees, and what a drafter without target state does."""
    claim, last = shift_claim(draws.variants), int(draws.keys["draft_step"].max())
    missing = [variant for variant in claim.variants if variant not in draws.variants]
    if missing:
        return f"**H1, not run**: it needs {names(missing)}."
    kv = claim.variants[0]
    found = draws.contrast((1, kv, "shift_slope", last), (-1, "hidden", "shift_slope", last))
    if not np.isfinite(found.value):
        return (
            f"**H1: {verdict(found, claim)}.** Too few matches at draft step {last} for a slope of `hidden` or `{kv}`."
        )
    fall = draws.contrast((1, "hidden", "standardised_fall", last), (-1, kv, "standardised_fall", last))
    own = {v: draws.contrast((1, v, "shift_slope", last)) for v in ("hidden", kv)}
    agree = fall.verdict(0) == found.verdict(0)
    lines = [
        f"**H1: {verdict(found, claim)}.** {claim.statement}: the interaction is {signed(found)} log-odds per standard "
        + f"deviation of shift at draft step {last}, {found.verdict(0)} 0.",
        f"- The slopes themselves: `hidden` {signed(own['hidden'])}, `{kv}` {signed(own[kv])}.",
        "- In acceptance, from the lowest to the highest fifth of shift at an equal mix of entropies, the fall of `hidden` minus that of "
        + f"`{kv}` is {signed(fall)}, {fall.verdict(0)} 0"
        + ("." if agree else ": **the two scales don't agree**, so the verdict leans on the scale chosen."),
    ]
    if "none_1" in draws.variants:
        blind = draws.contrast((1, "none_1", "shift_slope", last), (-1, "hidden", "shift_slope", last))
        same = blind.verdict(0) == found.verdict(0)
        told = (
            "the same sign as with a cache, so this interaction need not come from what the cache keeps"
            if same
            else "unlike with a cache"
        )
        lines.append(f"- `none_1`, which reads no target state, against `hidden`: {signed(blind)}, {told}.")
    else:
        lines.append(
            "- `none_1`, which reads no target state, was not run: whether the cache's content is what matters is open here."
        )
    return "\n".join(lines)


def other_measures(made: dict[str, Draws]) -> str:
    """The interaction of H1's pair with the shift measured in other ways, first the primary one."""
    rows = []
    for measure, draws in made.items():
        table = interaction_table(draws)
        table = table[table["metric"] == "shift_slope"]
        wanted = [
            shift_claim(draws.variants).variants[0],
            *(v for v, _ in pairs(draws.variants) if v.startswith("hybrid")),
        ]
        for row in table[table["variant"].isin(wanted)].itertuples():
            found = Interval(row.value, row.low, row.high)
            rows.append([f"`{measure}`", f"`{row.variant}`", row.draft_step, signed(found), SUPPORTS[found.verdict(0)]])
    return markdown_table(rows, ["measure", "against hidden", "draft step", "paradigm × measure", ""])


def read_back(table: pd.DataFrame) -> str:
    """At which distances each source does better than the floor, by accuracy and by cross-entropy."""
    lines, everything = [], sorted(table["distance"].unique())
    for source, told in (("hidden", "fused hidden states"), ("kv", "KV through one query")):
        own = table[table["source"] == source].set_index(["metric", "distance"]).sort_index()
        better = {
            metric: [j for j in everything if own.loc[(metric, j), "low"] > 0]
            for metric in ("accuracy_gain", "nats_gained")
        }
        worse = [j for j in everything if own.loc[("nats_gained", j), "high"] < 0]
        ends = [f"{_cell(own.loc[('accuracy', j)])} at j = {j}" for j in (everything[0], everything[-1])]
        lines.append(
            f"- From {told}: accuracy {ends[0]} and {ends[1]}. It is above the floor at {_listed(better['accuracy_gain'], everything)}; "
            f"cross-entropy is below the floor at {_listed(better['nats_gained'], everything)}."
        )
        if worse:
            lines[-1] += (
                f" At {_listed(worse, everything)} cross-entropy is *above* the floor: there the probe has learned particulars of the "
                "training documents and is too sure of itself on others, so read its accuracy."
            )
    return "\n".join(lines)


def _cell(row: pd.Series) -> str:
    return str(Interval(row["value"], row["low"], row["high"]))


def _listed(found: list[int], everything: list[int]) -> str:
    return "every distance" if found == everything else f"j = {', '.join(map(str, found))}" if found else "no distance"


def seeds_and_documents(draws: Draws, facts: dict) -> str:
    """What the intervals cover."""
    seeds = {v: draws.seeds(v) for v in in_order(draws.variants)}
    one = [v for v, n in seeds.items() if n == 1]
    anchors = np.unique(draws.keys["anchors"])
    told = (
        f"Measured on {facts['documents']} documents with layers {facts['kv_layers']} of {facts['target']} ({facts['device']}, "
        f"{facts['date']}, revision {facts['git_revision']}); {anchors.min():,} to {anchors.max():,} anchors a draft step."
    )
    return told + (f" One seed of {names(one)}: their intervals cover documents only." if one else "")
