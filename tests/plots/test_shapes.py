"""The shapes draw what their table holds, say what they leave out, and refuse what can't be read."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.plots.bars import bars
from kvshot_lib.plots.forest import forest
from kvshot_lib.plots.labels import spread
from kvshot_lib.plots.lines import lines
from kvshot_lib.plots.plane import plane
from kvshot_lib.plots.style import look


def steps_of(*variants, **more):
    rows = [[v, k, 0.5 - 0.02 * k * (i + 1), i] for i, v in enumerate(variants) for k in range(4)]
    table = pd.DataFrame(rows, columns=["variant", "draft_step", "value", "place"])
    return table.assign(low=table["value"] - 0.01, high=table["value"] + 0.01, **more)


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_lines_hold_the_values_in_the_looks_of_their_variants():
    table = steps_of("hidden", "kv_2")
    axes = lines(table, "draft_step").axes[0]
    drawn = {line.get_color(): line for line in reversed(axes.get_lines())}  # threads to names come last
    for variant in ("hidden", "kv_2"):
        line = drawn[look(variant)[0]]
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(line.get_ydata(), table.loc[table["variant"] == variant, "value"])


def test_names_stand_at_the_ends_of_lines_or_above_many_panels():
    table = pd.concat([steps_of("hidden", "kv_2", metric=metric) for metric in "abcd"])
    assert sorted(texts(lines(table[table["metric"] == "a"], "draft_step"))) == ["hidden", "kv_2"]
    figure = lines(table, "draft_step", panels="metric", title={"a": "First"})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["First", "b", "c", "d"]
    assert texts(figure) == [] and [t.get_text() for t in figure.legends[0].get_texts()] == ["hidden", "kv_2"]


def test_nothing_is_cut_off_at_a_limit_that_was_set_before_the_last_line():
    high, low = steps_of("kv_2"), steps_of("hidden")
    table = pd.concat([low.assign(panel=1), high.assign(panel=2, value=high["value"] + 1, high=2.0)])
    figure = lines(table, "draft_step", panels="panel", ylim=(0, None))
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 2 for axes in figure.axes)


def test_bins_are_drawn_in_the_order_of_the_table():
    table = steps_of("hidden").assign(bin=["0-15", "16-31", "32-63", "64-127"])
    labels = [label.get_text() for label in lines(table, "bin").axes[0].get_xticklabels()]
    assert labels == ["0-15", "16-31", "32-63", "64-127"]


def test_the_second_of_two_kinds_is_dashed():
    table = pd.concat([steps_of("hidden", kind=kind) for kind in ("step", "chain")])
    styles = [line.get_linestyle() for line in lines(table, "draft_step", dashes="kind").axes[0].get_lines()]
    assert styles == ["-", "--"]
    with pytest.raises(StudyError, match="3 kinds of kind can't be told apart"):
        lines(pd.concat([table, steps_of("hidden", kind="third")]), "draft_step", dashes="kind")


def test_too_many_lines_or_none_are_refused():
    with pytest.raises(StudyError, match="8 lines can't be told apart: choose at most 7"):
        lines(steps_of(*map(str, range(8))), "draft_step")
    for draw in (
        lambda t: lines(t, "draft_step"),
        lambda t: forest(t, label="variant"),
        lambda t: bars(t, label="variant"),
    ):
        with pytest.raises(StudyError, match="nothing to draw"):
            draw(steps_of("hidden")[:0])


def test_names_at_line_ends_do_not_overlap():
    assert spread([0, 5, 5.2], 1) == pytest.approx([0, 4.6, 5.6])
    assert spread([0, 0, 0], 1) == pytest.approx([-1, 0, 1])
    assert spread([0, 1.2, 1.3, 2.1], 1) == pytest.approx([-0.35, 0.65, 1.65, 2.65])
    assert spread([], 1) == []


def differences():
    columns = ["group", "variant", "value", "low", "high", "seed_low", "seed_high"]
    rows = [["norms", "hidden_31", 0.3, 0.2, 0.4, 0.28, 0.31], ["depth", "kv_2", -0.1, -0.2, 0.0, -0.1, -0.1]]
    return pd.DataFrame([*rows, ["depth", "kv_4", *[np.nan] * 5]], columns=columns)


def test_forest_writes_names_numbers_and_what_was_not_measured():
    figure = forest(differences(), label="variant", group="group")
    told = texts(figure)
    assert told[:2] == ["norms", "depth"]
    assert told[2:] == ["hidden_31", "+0.300 [0.200, 0.400]", "kv_2", "−0.100 [−0.200, 0.000]", "kv_4", "not measured"]
    points = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 1]
    assert [point.get_xdata()[0] for point in points] == [0.3, -0.1]


def test_bars_stand_stacked_or_beneath_each_other():
    table = pd.DataFrame({"plan": ["a", "a", "b"], "part": ["draft", "verify", "draft"], "value": [1.0, 2.0, 4.0]})
    stacked = bars(table, label="plan", by="part", stack=True).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in stacked.patches] == [(0, 1), (0, 4), (1, 2)]
    assert [text.get_text().strip() for text in stacked.texts] == ["3.00", "4.00"]
    beside = bars(table, label="plan", by="part").axes[0]
    assert len({round(bar.get_y(), 3) for bar in beside.patches}) == 3


def test_plane_names_the_chosen_and_refuses_more_than_ten():
    points = pd.DataFrame({"variant": [f"kv_{n}" for n in range(12)], "cost": np.linspace(0.1, 1, 12), "value": 2.0})
    figure = plane(points, "cost", named=["kv_1", "kv_2", "absent"])
    assert [text for text in texts(figure) if text.startswith("kv")] == ["kv_1", "kv_2"]
    assert "1.4×" in texts(figure)
    with pytest.raises(StudyError, match="12 names can't be read in one figure: choose at most 10"):
        plane(points, "cost")


def test_names_in_the_plane_do_not_lie_on_one_another():
    points = pd.DataFrame(
        {"variant": ["kv_1", "kv_2", "hidden"], "cost": [0.5, 0.51, 0.52], "value": [2.0, 2.001, 2.002]}
    )
    figure = plane(points, "cost")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() in set(points["variant"])]
    assert len(boxes) == 3 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
