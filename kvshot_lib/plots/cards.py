"""Figure, tables and sentences of notebook 08: the scorecard of the paper's claims, and the paper's numbers beside ours.

Every verdict is computed in ``claims``; nothing here decides anything.
"""

import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metrics.claims import CLAIMS, Claim, in_favour
from ..metrics.resampling import Interval
from ..metrics.tables import in_order
from .forest import forest
from .report import markdown_table
from .style import STYLE

# Colour and marker of each verdict.
LOOKS = {
    "reproduced": ("#009E73", "o"),
    "as expected": ("#009E73", "o"),
    "not reproduced": ("#D55E00", "X"),
    "not as expected": ("#D55E00", "X"),
    "supported": ("#009E73", "o"),
    "not supported": ("#D55E00", "X"),
    "reached": ("#009E73", "o"),
    "not reached": ("#D55E00", "X"),
    "inconclusive": ("#777777", "s"),
    "not run": ("#aaaaaa", ""),
}
HOLDS = {"above": "> {:g}", "below": "< {:g}", "within": "within ±{:g}"}


def claims_table(claims: tuple[Claim, ...] = CLAIMS) -> str:
    """The claims as stated before any data: statement, statistic, and where it must lie."""
    rows = [[c.claim, c.statement, f"`{c.statistic}`", HOLDS[c.direction].format(c.threshold)] for c in claims]
    return _table(rows, ["claim", "statement", "statistic", "holds if"])


def in_short(card: pd.DataFrame) -> str:
    """Which claims were reproduced, which not: whole claims only, then the controls."""
    whole = card[~_is_part(card)]
    lines = []
    for kind, words in (("claim", ("reproduced", "not reproduced")), ("control", ("as expected", "not as expected"))):
        own = whole[whole["kind"] == kind]
        groups = [
            (word, own.loc[own["verdict"] == word, "claim"].tolist()) for word in (*words, "inconclusive", "not run")
        ]
        told = "; ".join(f"**{word}** {len(names)}{_listed(names)}" for word, names in groups)
        lines.append(f"- Of {len(own)} {'claims of the paper' if kind == 'claim' else 'controls'}: {told}.")
    for row in whole[whole["kind"] == "hypothesis"].itertuples():
        lines.append(f"- {row.claim}, the explanation that the paper argues and does not measure: **{row.verdict}**.")
    for row in whole[whole["kind"] == "goal"].itertuples():
        lines.append(f"- {row.claim}, a goal of this study: **{row.verdict}**.")
    return "\n".join(lines)


def verdict_table(card: pd.DataFrame) -> str:
    """The verdicts: a row for each claim, its parts and the controls."""
    rows = []
    for row in card.itertuples():
        holds = HOLDS[row.direction].format(row.threshold) if row.direction else "all parts"
        name = f"**{row.claim}**" if not _part(row.claim) else row.claim
        found = _cell(row.value, row.low, row.high)
        measured = f"{_cell(row.measured_value, row.measured_low, row.measured_high)} {row.measured_verdict}".strip()
        seeds = "" if pd.isna(row.seeds) else row.seeds
        told = f"**{row.verdict}**" + (f"<br>needs {_code(row.missing.split())}" if row.verdict == "not run" else "")
        rows.append([name, row.statement, holds, _number(row.paper_value), found, told, measured or "–", seeds])
    header = ["claim", "statement", "holds if", "paper", "here", "verdict", "by measured MAT", "seeds"]
    return _table(rows, header)


def disagreements(card: pd.DataFrame) -> str:
    """Where the paper's MAT, a product of marginals, and measured MAT lead to different verdicts."""
    both = card[(card["measured_verdict"] != "") & (card["verdict"] != "not run")]
    differ = both[both["verdict"] != both["measured_verdict"]]
    if both.empty:
        return "No claim about MAT was run."
    if differ.empty:
        return f"Expected and measured MAT lead to the same verdict in all {len(both)} rows that have both."
    told = "; ".join(
        f"{row.claim} is {row.verdict} by expected MAT and {row.measured_verdict} by measured MAT"
        for row in differ.itertuples()
    )
    return f"Of {len(both)} rows with both, {len(differ)} {'differs' if len(differ) == 1 else 'differ'}: {told}."


def coverage(runs: pd.DataFrame) -> str:
    """What the intervals cover, and whether the variants had equal training."""
    seeds = runs.groupby("variant")["seed"].nunique()
    lines = []
    for count, variants in seeds.groupby(seeds):
        names = _code(in_order(variants.index))
        covers = (
            "documents only: how another training would move a number is not in them"
            if count == 1
            else "documents and seeds"
        )
        lines.append(f"- {count} seed{'s' if count > 1 else ''} of {names}: intervals cover {covers}.")
    tokens = {v: sorted(set(runs.loc[runs["variant"] == v, "trained_tokens"])) for v in in_order(runs["variant"])}
    told = {v: f"{found[0]:,}" + (f" to {found[-1]:,}" if len(found) > 1 else "") for v, found in tokens.items()}
    if (runs.groupby("seed")["trained_tokens"].nunique() == 1).all():
        alike = ", those of the same seed on equally many" if runs["trained_tokens"].nunique() > 1 else ""
        low, high = (f"{edge:,}" for edge in (runs["trained_tokens"].min(), runs["trained_tokens"].max()))
        lines.append(f"- Every drafter was trained on {low if low == high else f'{low} to {high}'} tokens{alike}.")
    else:
        lines.append(f"- **Training was not equal**, in tokens: {'; '.join(f'`{v}` {n}' for v, n in told.items())}.")
    warm = runs[runs["init_from"].notna() & runs["init_from"].ne("")] if "init_from" in runs else runs[:0]
    for variant in in_order(warm["variant"].unique()):
        start = warm.loc[warm["variant"] == variant, "init_from"].iloc[0]
        lines.append(f"- `{variant}` started from the trained `{start}`, whose tokens come on top.")
    return "\n".join(lines)


def paper_table(compared: pd.DataFrame) -> str:
    """The paper's numbers and ours: values, differences from the baseline, and whether the ordering holds."""
    rows = []
    for row in compared.itertuples():
        metric = (
            f"$\\alpha_{{{row.draft_step}}}$"
            if not pd.isna(row.draft_step)
            else row.metric.replace("_", " ").replace("mat", "MAT")
        )
        found, gap = _cell(row.value, row.low, row.high), _cell(row.difference, row.difference_low, row.difference_high)
        against = f"`{row.baseline}`" if row.baseline else "–"
        rows.append([f"`{row.variant}`", metric, _number(row.paper_value), found, against])
        rows[-1] += [_number(row.paper_difference, "+"), gap if row.baseline else "–", row.ordering]
    return _table(
        rows, ["variant", "metric", "paper", "here", "against", "paper's difference", "ours", "same ordering"]
    )


def orderings(compared: pd.DataFrame) -> str:
    """How many of the paper's orderings hold, and which are reversed."""
    told = compared.loc[compared["baseline"] != "", "ordering"]
    words = ("yes", "no", "not distinguishable", "not run", "paper value not known")
    counts = ", ".join(f"{word} {int((told == word).sum())}" for word in words)
    reversed_ = compared[compared["ordering"] == "no"]
    names = ", ".join(f"{_metric(row)} of `{row.variant}`" for row in reversed_.itertuples()) or "none"
    return f"Same ordering as in the paper, of {len(told)} numbers: {counts}. Reversed here: {names}."


@mpl.rc_context(STYLE)
def draw_scorecard(card: pd.DataFrame) -> Figure:
    """Forest plot: how far each claim's statistic lies on the claim's side of its threshold, with its 95% interval.

    Right of the line the claim holds. The plain value stands at the right, with what the claim asks of it.
    """
    rows = card[card["direction"] != ""].reset_index(drop=True)
    lines = rows["statement"].map(lambda statement: _label(statement).count("\n") + 1).to_numpy()
    heights = np.maximum(1, 0.45 * lines) + 0.6 * rows["kind"].ne(rows["kind"].shift()).to_numpy()
    places = heights.cumsum() - heights[0]
    height = 1.5 + 0.4 * (places[-1] + 1)
    figure = Figure(figsize=(10.6, height))
    axes = figure.add_axes((0.36, 0.8 / height, 0.35, 1 - 1.5 / height))
    for place, row in zip(places, rows.itertuples()):
        _draw_row(axes, place, row)
    axes.axvline(0, color="#222222", lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set_ylim(places[-1] + 0.7, -0.7)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _scale(axes)
    _legend(axes, rows)
    return figure


def _label(statement: str) -> str:
    return textwrap.fill(statement.replace("`", ""), 46, break_on_hyphens=False)


def _draw_row(axes: Axes, place: float, row) -> None:
    """One claim: its name at the left, marker and whisker, its plain value and what the claim asks of it at the right."""
    colour, marker = LOOKS[row.verdict]
    beside = {"xycoords": axes.get_yaxis_transform(), "va": "center", "fontsize": 9.5, "annotation_clip": False}
    name = _label(row.statement)
    axes.annotate(row.claim, (-1.0, place), weight="bold", **beside)
    axes.annotate(name, (-0.87, place), linespacing=1.0, **beside)
    if row.verdict == "not run":
        axes.annotate("not run", (1.03, place), color=colour, **beside)
        return
    asked = HOLDS[row.direction].format(row.threshold)
    axes.annotate(_minus(_cell(row.value, row.low, row.high)), (1.03, place), color=colour, **beside)
    axes.annotate(f"({asked})", (1.56, place), color=colour, **beside)
    found = in_favour(Interval(row.value, row.low, row.high), row.direction, row.threshold)
    axes.hlines(place, found.low, found.high, color=colour, lw=2)
    axes.plot(found.value, place, color=colour, marker=marker, ms=6.5, ls="none")


def _scale(axes: Axes) -> None:
    """An axis that shows differences of .02 and of 1: linear up to ±.1, logarithmic beyond, symmetric about 0."""
    edge = 1.15 * np.nanmax([0.1, *np.abs(axes.dataLim.intervalx[np.isfinite(axes.dataLim.intervalx)])])
    axes.set_xscale("symlog", linthresh=0.1, linscale=1)
    axes.set_xlim(-edge, edge)
    ticks = [tick for tick in (-1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0) if abs(tick) <= edge]
    axes.set_xticks(ticks, [_minus(f"{tick:g}") for tick in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlabel("← against the claim | in its favour →\ndistance from the threshold (linear up to ±0.1)")


def _legend(axes: Axes, rows: pd.DataFrame) -> None:
    """The verdicts that occur, above the axes."""
    looks: dict[tuple, list[str]] = {}
    for verdict in (word for word in LOOKS if word in set(rows["verdict"]) and word != "not run"):
        looks.setdefault(LOOKS[verdict], []).append(verdict)
    for (colour, marker), words in looks.items():
        axes.plot([], [], color=colour, marker=marker, ms=6.5, ls="none", label=" / ".join(words))
    if looks:
        place = {"loc": "lower left", "bbox_to_anchor": (-1.03, 1)}
        axes.legend(ncols=len(looks), borderaxespad=0.2, handletextpad=0.2, **place)


def _table(rows: list[list], header: list[str]) -> str:
    """A Markdown table with numbers in the middle of sentences: everything left-aligned."""
    return markdown_table(rows, header).replace("--:", ":--")


def _part(claim: str) -> bool:
    return claim[-1].isalpha()


def _is_part(card: pd.DataFrame) -> pd.Series:
    return card["claim"].map(_part)


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _code(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _number(value: float, sign: str = "") -> str:
    return "–" if np.isnan(value) else f"{value:{sign}.3f}"


def _cell(value: float, low: float, high: float) -> str:
    return "" if np.isnan(value) else str(Interval(value, low, high))


def _metric(row) -> str:
    return row.metric if pd.isna(row.draft_step) else f"{row.metric}[{row.draft_step}]"


def cards(card: pd.DataFrame, title: str = "") -> Figure:
    """Scorecard: how far each claim's statistic lies on the claim's side of its threshold, with its 95% interval.

    Right of the dashed line the claim holds. At the right stands the plain value with what the claim asks of it.

    Parameters
    ----------
    card
        Rows of a scorecard: claim, statement, direction, threshold, value, low, high, verdict. Wholes of several parts, which have no
        statistic of their own, are left out. Hand in a kind at a time: a dozen rows can be read.
    """
    rows = card[card["direction"] != ""].reset_index(drop=True)
    found = [
        in_favour(Interval(row.value, row.low, row.high), row.direction, row.threshold) for row in rows.itertuples()
    ]
    texts = [
        "not run" if row.verdict == "not run" else
        f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]\n{row.verdict}: {HOLDS[row.direction].format(row.threshold)} asked"
        for row in rows.itertuples()
    ]
    shown = rows.assign(
        label=[textwrap.fill(f"{row.claim}  {row.statement}".replace("`", ""), 52) for row in rows.itertuples()],
        **{name: [getattr(one, name) for one in found] for name in ("value", "low", "high")},
        told=texts,
    )
    figure = forest(shown, label="label", told="told", title=title, looks=lambda row: LOOKS[row["verdict"]])
    _scale(figure.axes[0])
    return figure
