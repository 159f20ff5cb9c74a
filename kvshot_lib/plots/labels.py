"""Names beside what they name: at the ends of lines, and beside points."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from .style import look

HOW = {"fontsize": 9.5, "weight": "bold", "va": "center", "zorder": 5}
LINE = 0.2  # inches from one name to the next


def name_ends(axes: Axes, ends: Sequence[tuple], inches: float) -> None:
    """Write each line's name right of the panel, (x, y, name, colour) each; names that would overlap move apart.

    A dotted thread leads from the line's end to a name that is not beside it. ``inches`` is the panel's height.
    Our own, for adjustText lets names in a column change places.
    """
    if not ends:
        return
    place = axes.transData + axes.transAxes.inverted()
    spots = place.transform([(x, y) for x, y, *_ in ends])
    order = np.argsort(spots[:, 1], kind="stable")
    heights, limit = spread(spots[order, 1].tolist(), LINE / inches), 1.0
    for i in reversed(range(len(heights))):  # none above the panel, where the title is
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LINE / inches
    for i, height in zip(order, heights):
        _, _, name, colour = ends[i]
        axes.text(1.03, height, name, color=colour, transform=axes.transAxes, **HOW)
        if spots[i, 0] < 0.94 or abs(spots[i, 1] - height) > 0.02:
            thread = ([spots[i, 0], 1.02], [spots[i, 1], height])
            axes.plot(*thread, color=colour, lw=0.8, ls=(0, (1, 2)), clip_on=False, transform=axes.transAxes)


def spread(heights: list[float], gap: float) -> list[float]:
    """Move ascending heights until neighbours are ``gap`` apart; those that collide stay centred on their mean.

    With gap 1: [0, 5, 5.2] becomes [0, 4.6, 5.6].
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _slots(groups[-2], gap)[-1] + gap > _slots(groups[-1], gap)[0]:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [slot for group in groups for slot in _slots(group, gap)]


def _slots(group: list[float], gap: float) -> list[float]:
    return [float(np.mean(group) + gap * (i - (len(group) - 1) / 2)) for i in range(len(group))]


def name_points(axes: Axes, table: pd.DataFrame, named: Sequence[str], x: str) -> None:
    """Write variants' names beside their points, on the side with more room; adjustText moves what covers something.

    The panel must have its final place: names are measured in pixels.
    """
    from adjustText import adjust_text  # with all of scipy, for the one shape that needs it

    spots = axes.transData.transform(table[[x, "value"]].to_numpy(float))
    points, frame = [Bbox.from_extents(*spot, *spot).padded(5) for spot in spots], axes.get_window_extent()
    texts, targets = [], []
    for spot, (_, row) in zip(spots, table.iterrows()):
        if row["variant"] not in named:
            continue
        right, left = (
            axes.text(*axes.transData.inverted().transform(spot + (gap, 0)), row["variant"], ha=side, **HOW)
            for gap, side in ((9, "left"), (-9, "right"))
        )
        less = min((right, left), key=lambda text: _covered(text.get_window_extent(), points, frame))
        (left if less is right else right).remove()
        less.set_color(look(row["variant"])[0])
        texts.append(less)
        targets.append((row[x], row["value"]))
    if texts:
        (across, up), thread = zip(*targets), {"arrowstyle": "-", "color": "#999999", "lw": 0.7}
        how = {"expand": (1.0, 1.1), "force_pull": (0, 0), "avoid_self": False, "min_arrow_len": 12}
        adjust_text(
            texts, target_x=across, target_y=up, objects=points, ax=axes, iter_lim=500, arrowprops=thread, **how
        )


def _covered(box: Bbox, points: list[Bbox], frame: Bbox) -> int:
    """How many points a name would cover; one that leaves the plane covers too many."""
    outside = box.x0 < frame.x0 or box.x1 > frame.x1
    return sum(box.overlaps(point) for point in points) + 99 * outside
