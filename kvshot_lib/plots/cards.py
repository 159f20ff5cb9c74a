"""Scorecards: how far claims hold, or don't. Every verdict is computed in ``metrics.claims``; nothing here decides anything."""

import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metrics.claims import HOLDS, in_favour
from ..metrics.resampling import Interval
from .forest import forest

GOOD, BAD, OPEN = ("#009E73", "o"), ("#D55E00", "X"), ("#777777", "s")  # colour and marker
LOOKS = {
    **dict.fromkeys(("reproduced", "as expected", "supported", "reached"), GOOD),
    **dict.fromkeys(("not reproduced", "not as expected", "not supported", "not reached"), BAD),
    "inconclusive": OPEN,
    "not run": ("#aaaaaa", ""),
}


def cards(card: pd.DataFrame, title: str = "") -> Figure:
    """Scorecard: how far each claim's statistic lies on the claim's side of its threshold, with its 95% interval.

    Right of the dashed line the claim holds. At the right stands the plain value with what the claim asks of it.

    Parameters
    ----------
    card
        Rows of a scorecard: claim, statement, direction, threshold, value, low, high, verdict. Wholes of several parts,
        which have no statistic of their own, are left out. Hand in a kind at a time: eighteen rows can be read.
    """
    rows = card[card["direction"] != ""].reset_index(drop=True)
    found = [in_favour(Interval(row.value, row.low, row.high), row.direction, row.threshold) for row in rows.itertuples()]
    numbers = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]\n{row.verdict}: " for row in rows.itertuples()]
    asked = [HOLDS[row.direction].format(row.threshold) + " asked" for row in rows.itertuples()]
    names = [f"{row.claim}  {row.statement}".replace("`", "") for row in rows.itertuples()]
    shown = rows.assign(
        label=[textwrap.fill(name, 52) for name in names],
        told=[number + ask for number, ask in zip(numbers, asked)],
        **{name: [getattr(one, name) for one in found] for name in ("value", "low", "high")},
    )
    figure = forest(shown, label="label", told="told", title=title, looks=lambda row: LOOKS[row["verdict"]])
    _scale(figure.axes[0])
    return figure


def _scale(axes: Axes) -> None:
    """An axis that shows differences of .02 and of 1: linear up to ±.1, logarithmic beyond, symmetric about 0."""
    reach = np.abs(axes.dataLim.intervalx)
    edge = 1.15 * max([0.1, *reach[np.isfinite(reach)]])
    axes.set_xscale("symlog", linthresh=0.1, linscale=1)
    axes.set_xlim(-edge, edge)
    ticks = [tick for tick in (-1.0, -0.1, 0.0, 0.1, 1.0) if abs(tick) <= edge]
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlabel("← against the claim | in its favour →\ndistance from the threshold (linear up to ±0.1)")
