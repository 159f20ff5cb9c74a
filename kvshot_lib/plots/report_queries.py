"""Sentences of notebook 04, computed from its tables: where drafters look, what a probe reads, what the oracle says, and the verdicts."""

import pandas as pd

from ..metrics.claims import MARGIN
from ..metrics.queries import reading
from ..metrics.resampling import Draws, Interval
from ..metrics.tables import in_order
from .report import markdown_table, names, signed

MISSING = (
    "**Not measured here**: `python -m kvshot_lib.probes.queries RESULTS_DIR` makes the tables, on trained `kv` and `hybrid` drafters "
    "and their features."
)
READINGS = {
    "bottleneck": "**query estimation is a bottleneck here**: the target's true query gains {oracle} tokens of MAT, {margin} or more",
    "no_bottleneck": (
        "**query estimation is not the bottleneck here**: the target's true query gains {oracle} tokens of MAT, and even perfect "
        "re-attention {perfect}, both less than {margin}"
    ),
    "worse": (
        "**no sign that query estimation is the bottleneck**: given the target's true query it drafts shorter ({oracle} tokens of MAT), and "
        "with perfect re-attention too ({perfect}), after equal re-training of its output side. It has learned to read something else from "
        "the cache than the target reads, and this much re-training doesn't make up for it; whether more would, this can't tell"
    ),
    "projection": (
        "**looking where the target looks would help, but its query alone doesn't make it look there**: perfect re-attention gains "
        "{perfect} tokens of MAT, {margin} or more, the true query through the drafter's key projection {oracle}, less than that; what "
        "stands between is the projection of the keys"
    ),
    "idle": (
        "**the oracle can't tell**: random queries cost it nothing ({random} tokens of MAT), so it has not learned to use this attention; "
        "the true query gains {oracle}, perfect re-attention {perfect}, both less than {margin}"
    ),
    "open": "**open**: the true query gains {oracle} tokens of MAT, perfect re-attention {perfect}; an interval holds {margin}",
}


def facts(overlap: pd.DataFrame, table: pd.DataFrame) -> str:
    """What was measured, and what the intervals cover; ``table`` is ``query_estimation_facts``, a row a measurement."""
    told = table.iloc[0]
    runs = overlap.loc[overlap["source"] == "drafter", ["variant", "seed"]].drop_duplicates()
    seeds = runs.groupby("variant")["seed"].nunique()
    one = [v for v in in_order(seeds.index) if seeds[v] == 1]
    text = (
        f"Measured on {told['documents']} evaluation documents of {told['target']} ({told['device']}, {told['dtype']}, {told['date']}, "
        f"revision {', '.join(dict.fromkeys(table['git_revision']))}): {names(in_order(seeds.index))}."
    )
    trained = table[table["retrained_documents"] > 0]
    if len(trained):
        documents, tokens = (
            " or ".join(f"{n:,.0f}" for n in trained[name].unique())
            for name in ("retrained_documents", "retrained_tokens")
        )
        text += (
            f" Each arm of the oracle ({names(' '.join(trained['runs']).split())}) was re-trained on {documents} training documents, "
            f"{tokens} tokens."
        )
    return text + (f" One seed of {names(one)}: their intervals cover documents only." if one else "")


def in_short(draws: Draws) -> str:
    """One line a drafter: the oracle's verdict."""
    lines = []
    for variant in _measured(draws):
        found = {arm: signed(draws.contrast((1, variant, f"{arm}_gain"))) for arm in ("oracle", "perfect", "random")}
        lines.append(f"- `{variant}`: {READINGS[reading(draws, variant)].format(**found, margin=MARGIN)}.")
    return "\n".join(lines)


def _measured(draws: Draws) -> list[str]:
    return in_order(draws.keys.loc[draws.keys["metric"] == "oracle_gain", "variant"])


def overlaps(table: pd.DataFrame) -> str:
    """Recall and divergence of each drafter's last layer and of the references, a row each, at the first and last draft step."""
    steps, rows = [table["draft_step"].min(), table["draft_step"].max()], []
    last = table.groupby("variant")["layer"].transform("max")
    for name, own in _named(table[table["layer"].isna() | (table["layer"] == last)]):
        cells = [_cell(own, measure, step) for measure in ("recall", "js") for step in steps]
        rows.append([name, *cells, *(_cell(own, f"{measure}_with_sink", steps[-1]) for measure in ("recall", "js"))])
    header = ["whose row", *(f"{measure}, k = {step}" for measure in ("recall", "JS") for step in steps)]
    header += [f"{measure} with the sink, k = {steps[-1]}" for measure in ("recall", "JS")]
    return f"{markdown_table(rows, header)}\n\n{_above_floor(table, last, steps[-1])}"


def _named(table: pd.DataFrame):
    """(name of the row, its rows): the last layer of each drafter, then the references."""
    for variant in in_order(table.loc[table["source"] == "drafter", "variant"]):
        own = table[(table["variant"] == variant) & (table["source"] == "drafter")]
        yield f"`{variant}`, layer {own['layer'].max() + 1}", own
    for source, name in (("row_t", "the target's own at t"), ("other_document", "the target's, another document")):
        yield name, table[table["source"] == source]


def _cell(own: pd.DataFrame, measure: str, step: int) -> str:
    found = own[(own["measure"] == measure) & (own["draft_step"] == step)]
    return str(Interval(*found.iloc[0][["value", "low", "high"]])) if len(found) else "–"


def _above_floor(table: pd.DataFrame, last: pd.Series, step: int) -> str:
    """Whose recall lies above that of another document's row, and whose below, by intervals that don't overlap."""
    rows = table[(table["measure"] == "recall") & (table["draft_step"] == step)]
    floor = rows[rows["source"] == "other_document"].iloc[0]
    own = rows[(rows["source"] == "drafter") & (rows["layer"] == last[rows.index])].set_index("variant")
    own = own.loc[in_order(own.index)]
    groups = {
        "above": own.index[own["low"] > floor["high"]],
        "below": own.index[own["high"] < floor["low"]],
    }
    groups["not distinguishable from"] = own.index.difference([*groups["above"], *groups["below"]], sort=False)
    told = "; ".join(f"{word} it for {names(found)}" for word, found in groups.items() if len(found))
    return f"Recall at draft step {step} against that of another document's row, by whole intervals: {told}."


def probes(table: pd.DataFrame) -> str:
    """R² at the first and last draft step, a row for each layer of each drafter; and the floor."""
    steps, rows = sorted({table["draft_step"].min(), table["draft_step"].max()}), []
    for variant in in_order(table["variant"]):
        own = table[table["variant"] == variant]
        for layer in sorted(own["layer"].unique()):
            cells = [
                str(Interval(*found.iloc[0][["value", "low", "high"]]))
                for step in steps
                for found in [own[(own["layer"] == layer) & (own["draft_step"] == step) & (own["labels"] == "true")]]
            ]
            rows.append([f"`{variant}`", layer + 1, *cells])
    floor = table.loc[table["labels"] == "shuffled", "value"]
    told = f"With shuffled labels R² is {floor.min():.3f} to {floor.max():.3f}."
    return f"{markdown_table(rows, ['variant', 'layer', *(f'R², k = {step}' for step in steps)])}\n\n{told}"


def arms(draws: Draws) -> str:
    """Every arm's gain in expected MAT over the own query, and the share of the gap that comes back, a row a drafter."""
    rows = []
    for variant in _measured(draws):
        gain = {arm: draws.contrast((1, variant, f"{arm}_gain")) for arm in ("own", "random", "oracle", "perfect")}
        gap = gain["perfect"].verdict(0)
        share = draws.contrast((1, variant, "returned")) if gap == "above" else "no gap to close"
        mat = draws.contrast((1, variant, "mat_as_trained"))
        rows.append([f"`{variant}`", str(mat), *(signed(g) for g in gain.values()), str(share)])
    header = ["drafter", "expected MAT as trained", "re-trained, own query", "random minus own", "oracle minus own"]
    return markdown_table(rows, [*header, "perfect minus own (the gap)", "share of the gap that comes back"])


def controls(draws: Draws) -> str:
    """Whether the intervention bites: a random query should cost something, else what the attention reads hardly matters."""
    lines = []
    for variant in _measured(draws):
        found = draws.contrast((1, variant, "random_gain"))
        told = {
            "below": "so what this attention reads matters to it",
            "above": "so its own query is worse than chance",
            "not distinguishable from": "no difference can be told from chance, so where this attention looks hardly matters to it",
        }[found.verdict(0)]
        lines.append(f"- `{variant}` with random queries: {signed(found)} tokens of MAT against its own, {told}.")
    return "\n".join(lines)
