"""The scorecard: each claim's statistic against the threshold that was stated for it."""

import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..metrics.claims import WORDS, in_favour
from ..metrics.resampling import with_interval
from .forest import forest
from .style import STYLE

FOR, AGAINST, OPEN = ("#000000", "o"), ("#b2182b", "X"), ("#8a8a8a", "s")  # no variant's colours
LOOKS = {word: look for words in WORDS.values() for word, look in zip(words, (FOR, AGAINST))}
LOOKS |= {"inconclusive": OPEN, "not run": OPEN}


@mpl.rc_context(STYLE)
def cards(card: pd.DataFrame) -> Figure:
    """How far each claim's statistic lies on the claim's side of its threshold, with its 95% interval.

    Right of the dashed line the claim holds; the plain value stands at the right.

    ``card`` holds rows of a scorecard: claim, statement, direction, threshold, value, low, high, verdict. Wholes of
    several parts, which have no statistic of their own, are left out.
    """
    rows = card[card["direction"].fillna("") != ""].reset_index(drop=True)
    found = [in_favour(row, row.direction, row.threshold) for row in rows.itertuples()]
    shown = rows.assign(
        label=[textwrap.fill(f"{r.claim}  {r.statement}".replace("`", ""), 58) for r in rows.itertuples()],
        told=[with_interval(row) for row in rows.itertuples()],
        **{name: [getattr(one, name) for one in found] for name in ("value", "low", "high")},
    )
    figure = forest(shown, label="label", told="told", title=" ", looks=lambda row: LOOKS[row["verdict"]])
    _scale(figure.axes[0])
    verdicts: dict[tuple, list[str]] = {}
    for verdict in (word for word in LOOKS if word in set(rows["verdict"]) and word != "not run"):
        verdicts.setdefault(LOOKS[verdict], []).append(verdict)
    handles = [Line2D([], [], color=c, marker=m, ls="none", label=" / ".join(v)) for (c, m), v in verdicts.items()]
    figure.legend(handles=handles, loc="upper left", ncols=3, borderaxespad=0.2, handletextpad=0.2)
    return figure


def _scale(axes: Axes) -> None:
    """An axis that shows differences of .02 and of 1: linear up to ±.1, logarithmic beyond, symmetric about 0."""
    reach = axes.dataLim.intervalx
    edge = 1.15 * np.max([0.1, *np.abs(reach[np.isfinite(reach)])])
    axes.set_xscale("symlog", linthresh=0.1, linscale=1)
    axes.set_xlim(-edge, edge)
    ticks = [tick for tick in (-1.0, -0.1, 0.0, 0.1, 1.0) if abs(tick) <= edge]
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlabel("← against the claim | in its favour →\ndistance from the threshold (linear up to ±0.1)")
