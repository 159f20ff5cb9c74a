"""Notebook 09: its tables by hand, and figures and sentences over a whole made-up matrix and over next to nothing."""

import numpy as np
import pandas as pd
import pytest
import synthetic
from matplotlib.transforms import Bbox

from kvshot_lib.drafters.variants import CURES, VARIANTS, parameters_of
from kvshot_lib.metrics import budgets as beyond
from kvshot_lib.metrics import claims, goals, paper, tables
from kvshot_lib.metrics import resampling as bootstrap
from kvshot_lib.plots import beyond as figures_beyond
from kvshot_lib.plots import report_beyond


def history(variant: str, points: dict[int, float], steps: int = 7) -> pd.DataFrame:
    rows = [
        [variant, 0, n, 10 * n, 1.0, "validation", k, np.nan, a, 0.0] for n, a in points.items() for k in range(steps)
    ]
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["history"])).astype({"draft_step": "Int64"})


def compute(**flops: float) -> pd.DataFrame:
    row = dict.fromkeys(tables.SCHEMAS["compute"], 0) | {"target_bytes": 100, "target_flops": 100, "tokens": 100}
    rows = [row | {"variant": v, "training_flops": f, "chain_bytes": 50, "chain_flops": 25} for v, f in flops.items()]
    return pd.DataFrame(rows).assign(seed=0).astype(tables.SCHEMAS["compute"])


@pytest.fixture(scope="module")
def whole():
    """Every variant of the study, with costs that crowd: `kv_2` and its ablations all cost the same."""
    made = synthetic.matrix(seeds=1, documents=60)
    draws = bootstrap.draw(made["counts"], made["run_lengths"], 50)
    counted = compute(**{name: 1e15 * (1 + len(name)) for name in VARIANTS})
    depth = [min(4, 1 + sum(int(d) for d in name if d.isdigit())) for name in counted["variant"]]
    counted["chain_bytes"] = [
        9 * n if name.startswith("block") else 23 * n + 20 for n, name in zip(depth, counted["variant"])
    ]
    return made, draws, counted, beyond.cost_table(made["runs"], counted, draws)


def test_validation_along_tokens_and_flops_by_hand():
    """Acceptance .5 at seven steps: 1 + .9921875. Half the tokens are half the FLOPs; a validation of one step is left out."""
    told = pd.concat([history("kv_2", {5: 0.5, 10: 0.0}), history("kv_2_no_ttt", {10: 0.9}, 1)])
    found = beyond.budget_table(told, compute(kv_2=8.0, kv_2_no_ttt=8.0))
    assert found[["variant", "trained_tokens", "flops", "value"]].to_numpy().tolist() == [
        ["kv_2", 50, 4.0, 1.9921875],
        ["kv_2", 100, 8.0, 1.0],
    ]
    assert beyond.at_compute(found, "kv_2", 6.0) == pytest.approx(1.49609375)
    assert np.isnan(beyond.at_compute(found, "kv_2", 3.9)) and np.isnan(beyond.at_compute(found, "hidden", 5.0))


def test_comparisons_name_what_lacks_a_run():
    made = synthetic.matrix(("kv_2", "kv_2_all_anchors"), 2, 40)
    draws = bootstrap.draw(made["counts"], made["run_lengths"], 50)
    table = beyond.pair_table(draws, {"dense": beyond.DENSE})
    assert table["variant"].tolist() == [a for a, _ in beyond.DENSE] and table["value"].notna().sum() == 1
    row = table[table["variant"] == "kv_2_all_anchors"].iloc[0]
    wanted = draws.difference(("kv_2_all_anchors", "measured_mat"), ("kv_2", "measured_mat"))
    assert row["value"] == pytest.approx(wanted.value) and row["seeds"] == 2


def test_every_comparison_is_of_the_studys_variants_and_changes_what_it_says():
    for groups in (beyond.LEVERS, beyond.CURED):
        assert set(beyond.named(groups)) <= set(VARIANTS)
    for a, b in beyond.DENSE:
        assert parameters_of(a) == parameters_of(b) | {"anchor_fraction": 1.0}
    for name in beyond.CURES:
        own, start = parameters_of(name), parameters_of("hybrid_warm")
        changed = own.keys() - start.keys()
        assert len(changed) == 1 or name in ("hybrid_warm_unrotate_mlp", "hybrid_warm_combined")
        assert own.items() >= start.items()
    assert parameters_of("block_kv_2_equal_compute").items() - parameters_of("block_kv_2").items() == {("anchor_fraction", 0.285)}


def test_the_cost_model_by_hand(whole):
    made, draws, _, _ = whole
    table = beyond.cost_table(made["runs"], compute(hidden=1.0), draws).set_index("variant")
    assert table.loc["hidden", "bytes_ratio"] == 0.5 and table.loc["hidden", "flops_ratio"] == 0.25
    assert table.loc["hidden", "predicted_speedup"] == pytest.approx(draws.mean("hidden", "measured_mat").value / 1.5)
    assert table["bytes_ratio"].isna().sum() == len(VARIANTS) - 1, "what is not counted is empty, not zero"


def test_timed_chains_keep_the_fastest_plan():
    row = dict.fromkeys(tables.SCHEMAS["decoding"], 0.0) | {
        "variant": "kv_1",
        "mode": "chain",
        "category": "all",
        "device": "cpu",
        "dtype": "float32",
    }
    row |= {"decoded_mat": 2.0, "draft_s": 1.0, "project_s": 0.5, "verify_s": 3.0}
    rows = [
        row | {"plan": "2", "speedup": 1.2},
        row | {"plan": "7", "speedup": 1.1},
        row | {"mode": "tree", "plan": "t", "speedup": 9.0},
    ]
    found = beyond.timed_table(pd.DataFrame(rows))
    assert found["plan"].tolist() == ["2"] and found["cost_ratio"].tolist() == [0.5]
    assert found["predicted_speedup"].iloc[0] == pytest.approx(2 / 1.5)
    assert beyond.timed_table(tables.empty("decoding")).empty


def test_depth_compares_drafters_that_differ_in_depth_alone(whole):
    found = beyond.depth_table(whole[3])
    assert found[found["family"] == "kv_N"]["variant"].tolist() == ["kv_1", "kv_2", "kv_3", "kv_4"]
    assert set(found["family"]) == set(figures_beyond.FAMILY_LOOKS)
    assert not {"block_kv_2_b16", "kv_2_heads", "states_4_continued", "none_1"} & set(found["variant"])


def test_spread_lists_every_seed():
    made = synthetic.matrix(("kv_2", "block_kv_2"), 2, 40)
    draws = bootstrap.draw(made["counts"], made["run_lengths"], 5)
    first, second = draws.rows("block_kv_2", "measured_mat")[:, 0]
    assert report_beyond.spread(draws, ["block_kv_2", "kv_9"]) == (
        f"Measured MAT seed by seed: `block_kv_2` {first:.3f}, {second:.3f}."
    )


def test_labels_of_the_plane_overlap_neither_one_another_nor_the_points(whole):
    """All variants of the study; labels are where the picture has them."""
    table = whole[3]
    figure = figures_beyond.draw_plane(table, "bytes_ratio", "cost", "MAT")
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    labels = {
        text.get_text(): text.get_window_extent(renderer)
        for text in axes.texts
        if text.get_text() in set(table["variant"])
    }
    assert set(labels) == set(table["variant"]) - set(CURES)
    points = axes.transData.transform(table[["bytes_ratio", "value"]].to_numpy())
    boxes, frame = list(labels.values()), axes.get_window_extent().padded(1)
    overlaps = sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    covered = sum(box.contains(*point) for box in boxes for point in points)
    assert overlaps == 0 and covered == 0
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


def test_a_label_takes_the_nearest_free_place():
    frame = Bbox.from_bounds(0, 0, 200, 100)
    free = figures_beyond._free_place(np.array([50.0, 50.0]), 20, 10, [], frame, 1)
    assert (free.x0, free.y0) == (56, 45), "beside its point"
    beside = figures_beyond._free_place(np.array([50.0, 50.0]), 20, 10, [free], frame, 1)
    assert not beside.overlaps(free)


def test_lines_of_equal_speedup_are_those_of_the_cost_model(whole):
    figure = figures_beyond.draw_plane(whole[3], "bytes_ratio", "cost", "MAT")
    lines = [
        line.get_xydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_zorder() == 0
    ]
    assert len(lines) > 3
    for (x0, level), (x1, mat) in lines:
        assert x0 == 0 and mat / (1 + x1) == pytest.approx(level)


def test_all_figures_and_sentences_of_a_whole_study(whole):
    made, draws, counted, cost = whole
    budget = beyond.budget_table(made["history"], counted)
    pairs = beyond.pair_table(draws, beyond.LEVERS)
    assert (
        len(figures_beyond.draw_budgets(budget).axes)
        == len(figures_beyond.draw_depth(beyond.depth_table(cost)).axes)
        == 2
    )
    assert (
        figures_beyond.draw_pairs(pairs).axes and figures_beyond.draw_pairs(beyond.pair_table(draws, beyond.CURED)).axes
    )
    goal, speeds = goals.speed_goal(tables.empty("decode_prompts"), samples=20)
    stated = (*claims.BLOCK_CLAIMS, *goals.acceptance_goals(goals.contenders(made["runs"], made["history"])))
    card = pd.concat(
        [claims.scorecard(draws, paper.read_paper(), stated), claims.scorecard(speeds, paper.read_paper(), (goal,))]
    )
    assert report_beyond.spread(draws, ["hidden", "kv_1"]) == "One seed of each."
    assert report_beyond.duel(tables.empty("decode_prompts")).startswith("The two drafters of B2 have not met")
    told = report_beyond.in_short(draws, cost, card)
    assert "C18" in told and "B2, a tenth more tokens/s: **not run**" in told
    assert "Not run: 0 of" in report_beyond.levers(pairs) and "block_kv_2_equal_compute" in report_beyond.budgets(
        made["runs"], counted, draws, VARIANTS
    )
    assert report_beyond.equal_compute(draws, budget, counted, beyond.PARALLEL).count("\n") == len(beyond.PARALLEL) - 1
    assert report_beyond.cost(cost).count("\n") == len(VARIANTS) + 1
    assert "validation" in report_beyond.choice(made["runs"], made["history"])


def test_what_is_missing_is_told_with_its_command():
    made = synthetic.matrix(("hidden", "kv_1"), 1, 20)
    told = report_beyond.not_run(
        made["runs"], ["hidden", "block_kv_2"], compute(hidden=1.0), tables.empty("decoding"), "mine"
    )
    assert "sweep mine block_kv_2/seed0" in told and "lacking: `kv_1`" in told and "kvshot_lib.decoding.timing" in told
    assert report_beyond.latency(tables.empty("step_latency")).startswith("No latency")
    assert report_beyond.timed(beyond.timed_table(tables.empty("decoding"))).startswith("No decoding")


def test_latency_at_the_papers_scale():
    rows = [
        ["verify", 1, 512, 10.0],
        ["draft kv_1", 1, 512, 0.5],
        ["draft kv_1", 10, 512, 0.9],
        ["block block_kv_2", 7, 512, 0.8],
    ]
    table = pd.DataFrame(rows, columns=["what", "tokens", "prefix_tokens", "milliseconds"]).assign(
        device="gpu", architecture="big"
    )
    told = report_beyond.latency(table)
    assert (
        "| `kv_1` | 0.500 | 3.500 | 0.350 |" in told
        and "| `block_kv_2` | 0.800 | 0.800 | 0.080 |" in told
        and "10.00 ms" in told
    )
