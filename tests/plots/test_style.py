"""Figures: the same bytes when drawn twice, the table beside each, and the recorded ones redrawn by their notebook."""

import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.testing.compare import compare_images
from notebook_checks import ROOT, run_here
from PIL import Image

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import resampling as bootstrap
from kvshot_lib.plots import matrix as figures_matrix
from kvshot_lib.plots import style as figures
from kvshot_lib.study.profiles import load_profile


def draws_of(*variants, seeds=1):
    """Draws of made-up runs, whose late steps match less often."""
    chance = np.random.default_rng(0)
    made = []
    for variant in variants:
        for seed in range(seeds):
            match = chance.random((5, 40, 4)) < [0.8, 0.6, 0.5, 0.45]
            made.append(metrics.count_run(variant, seed, [(m, np.ones_like(m)) for m in match]))
    return bootstrap.draw(*(pd.concat(tables) for tables in zip(*made)), samples=50)


def history_of(*variants):
    rows = [
        [v, 0, n, 100 * n, n / 2, split, k, 9 / n, 0.1 * n / (k + 1), 1e-3]
        for v in variants
        for split in ("train", "validation")
        for n in (1, 2, 3)
        for k in (0, 1, 2)
    ]
    columns = [
        "variant",
        "seed",
        "step",
        "trained_tokens",
        "seconds",
        "split",
        "draft_step",
        "loss",
        "acceptance",
        "learning_rate",
    ]
    return pd.DataFrame(rows, columns=columns).astype({"draft_step": "Int64"})


def every_figure(draws, reference="hidden"):
    """Name, figure and table of each figure of notebook 03."""
    summary = bootstrap.summary_table(draws)
    table = figures.pick(summary, *figures.STEP_METRICS)
    yield "decay", figures.draw_decay(table), table
    yield "chain", figures.draw_chain(table), table
    table = figures.pick(bootstrap.difference_table(draws, reference), *figures.STEP_METRICS)
    yield "gap", figures.draw_gap(table, reference), table
    table = figures.pick(summary, "retention", "chain_retention")
    yield "retention", figures_matrix.draw_retention(table), table
    table = figures.pick(summary, "expected_mat", "measured_mat")
    yield "mat", figures_matrix.draw_mat(table), table
    table = figures.training_table(history_of(*draws.variants))
    yield "training", figures.draw_training(table), table


def test_drawn_twice_has_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        for name, figure, table in every_figure(draws_of("hidden", "kv_2")):
            figures.save_figure(figure, table, tmp_path / folder, name)
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == sorted(
        f"{name}.{kind}"
        for name in ("decay", "chain", "gap", "retention", "mat", "training")
        for kind in ("csv", "png")
    )
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_table_beside_a_figure_is_the_table_drawn(tmp_path):
    name, figure, table = next(every_figure(draws_of("kv_2", "hidden", seeds=2)))
    beside = pd.read_csv(figures.save_figure(figure, table, tmp_path, name).with_suffix(".csv"))
    pd.testing.assert_frame_equal(beside, table, check_dtype=False, rtol=1e-5)
    lines = {line.get_color(): line for line in reversed(figure.axes[0].get_lines())}  # a thread to a name comes last
    for variant in ("hidden", "kv_2"):
        shown = beside[(beside["variant"] == variant) & (beside["metric"] == "step_acceptance")]
        drawn = lines[figures.look(variant)[0]]
        assert drawn.get_xdata().tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(drawn.get_ydata(), shown["value"], rtol=1e-5)


def test_changed_number_changes_the_picture(tmp_path):
    """The image comparison of recorded figures can fail: one point moved by .02 is seen."""
    _, figure, table = next(every_figure(draws_of("hidden", "kv_2")))
    moved = table.copy()
    moved.loc[2, "value"] += 0.02
    first = figures.save_figure(figure, table, tmp_path, "first")
    second = figures.save_figure(figures.draw_decay(moved), moved, tmp_path, "second")
    assert compare_images(str(first), str(second), tol=2) is not None


@pytest.mark.parametrize(
    "variants", [["hidden"], ["none_1", "something_new", "block_16"], [f"kv_{i}" for i in range(7)]]
)
def test_any_set_of_variants_can_be_drawn(tmp_path, variants):
    draws = draws_of(*variants, seeds=2)
    summary = bootstrap.summary_table(draws)
    table = figures.pick(summary, "retention", "chain_retention")
    figures.save_figure(figures_matrix.draw_retention(table), table, tmp_path, "retention")
    table = figures.pick(summary, "expected_mat", "measured_mat")
    figures.save_figure(figures_matrix.draw_mat(table), table, tmp_path, "mat")
    table = figures.pick(summary, *figures.STEP_METRICS)
    figures.save_figure(figures.draw_decay(table), table, tmp_path, "decay")


def test_drafter_that_never_matches_can_be_drawn(tmp_path):
    """Its chain acceptance is 0 at step 0 and undefined later, its retention 0 / 0."""
    none = np.zeros((9, 3), bool)
    draws = bootstrap.draw(*metrics.count_run("kv_1", 0, [(none, ~none)] * 3), samples=20)
    summary = bootstrap.summary_table(draws)
    for draw, names in (
        (figures.draw_decay, figures.STEP_METRICS),
        (figures_matrix.draw_retention, ["retention", "chain_retention"]),
    ):
        table = figures.pick(summary, *names)
        figures.save_figure(draw(table), table, tmp_path, names[0])
    assert "too few anchors" in [text.get_text() for text in draw(table).axes[0].texts]


def test_training_figure_tells_which_documents_its_loss_is_of(tmp_path):
    both = history_of("hidden")
    no_loss = both.assign(loss=both["loss"].where(both["split"] == "train"))
    for history, told, metrics_drawn in (
        (both, "thick: validation, thin: training", {"loss", "acceptance"}),
        (no_loss, "training documents", {"loss", "acceptance"}),
        (both[both["split"] == "train"], "training documents", {"loss"}),
    ):
        table = figures.training_table(history)
        figure = figures.draw_training(table)
        figures.save_figure(figure, table, tmp_path, "training")
        assert set(table["metric"]) == metrics_drawn
        assert figure.axes[0].get_title(loc="left").splitlines()[1] == told


def test_names_at_line_ends_do_not_overlap():
    assert figures.spread([0, 5, 5.2], 1) == pytest.approx([0, 4.6, 5.6])
    assert figures.spread([0, 0, 0], 1) == pytest.approx([-1, 0, 1])
    assert figures.spread([0, 1.2, 1.3, 2.1], 1) == pytest.approx([-0.35, 0.65, 1.65, 2.65])
    assert figures.spread([], 1) == []


def test_variants_of_the_study_look_different():
    looks = [figures.look(variant) for variant in figures.LOOKS]
    assert len(set(looks)) == len(looks)
    assert figures.look("block_16_both") == figures.FAMILIES["block"]


def test_main_variants():
    """A few variants are all drawn; of many those wanted, and the reference."""
    assert figures.main_variants(["mine", "kv_3", "hidden"]) == ["hidden", "kv_3", "mine"]
    assert figures.main_variants(figures.LOOKS, ["kv_2", "hidden", "absent"], "kv_3") == ["hidden", "kv_2", "kv_3"]
    assert len(figures.main_variants(figures.LOOKS)) == 7
    assert figures.main_variants([f"own_{i}" for i in range(8)]) == [f"own_{i}" for i in range(8)]


def test_nothing_in_the_chain_figure_is_cut_off():
    table = figures.pick(bootstrap.summary_table(draws_of("hidden", "kv_2")), *figures.STEP_METRICS)
    for panel in figures.draw_chain(table).axes[:2]:
        assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > table["high"].max()


def test_colours_survive_the_palette():
    """A pale band over half of the picture, a line of one pixel and 2,000 greys: band and line as they were, greys to within a few levels."""
    pixels = np.full((100, 100, 3), 255, dtype=np.uint8)
    pixels[:50], pixels[60] = (225, 240, 235), (200, 30, 90)
    pixels[70:90] = np.linspace(0, 255, 2000).astype(np.uint8).reshape(20, 100, 1) * (1, 1, 0) + np.array(
        (0, 0, 7), np.uint8
    )
    found = np.asarray(figures._in_256_colours(Image.fromarray(pixels)).convert("RGB")).astype(int)
    assert (found[:61] == pixels[:61]).all() and np.abs(found - pixels).max() < 16


def test_nothing_to_draw_is_told():
    with pytest.raises(StudyError, match="nothing to draw: the summary has no tree_mat"):
        figures.pick(bootstrap.summary_table(draws_of("hidden")), "tree_mat")


RECORDED = sorted(path.parent for path in (ROOT / "figures").glob("*/decay.png"))


@pytest.mark.pipeline
@pytest.mark.filterwarnings("default")  # as in a kernel
@pytest.mark.parametrize("folder", RECORDED, ids=lambda folder: folder.name)
def test_recorded_figures_are_what_their_notebook_draws(folder, tmp_path):
    """Redraw a profile's figures from its recorded tables: numbers to a thousandth, pictures to 2 grey levels (rms)."""
    drawn = tmp_path / "figures"
    folders = {"tables_dir": str(ROOT / "data/recorded" / folder.name), "figures_dir": str(drawn)}
    run_here(
        ROOT / "notebooks/04_long_range_decay.ipynb",
        load_profile(ROOT / f"notebooks/profiles/{folder.name}.yaml").decay | folders,
    )
    assert {path.name for path in drawn.iterdir()} <= {path.name for path in folder.iterdir()}
    for path in sorted(drawn.glob("*.csv")):
        pd.testing.assert_frame_equal(pd.read_csv(path), pd.read_csv(folder / path.name), rtol=1e-3)
    for path in sorted(drawn.glob("*.png")):
        baseline = shutil.copy(folder / path.name, tmp_path / f"recorded_{path.name}")
        assert compare_images(str(baseline), str(path), tol=2) is None, path.name


def test_points_on_few_anchors_are_not_drawn():
    columns = ["variant", "metric", "draft_step", "anchors"]
    rows = [("a", "chain_acceptance", 0, 90), ("a", "chain_acceptance", 1, 50), ("a", "chain_acceptance", 2, 49)]
    rows += [("b", "chain_acceptance", 0, 90), ("b", "chain_acceptance", 1, 49), ("b", "chain_acceptance", 2, 90)]
    summary = pd.DataFrame(rows, columns=columns).astype({"draft_step": "Int64"})
    kept = figures.supported(summary, summary)
    assert kept[["variant", "draft_step"]].values.tolist() == [["a", 0], ["a", 1], ["b", 0], ["b", 2]]
    gaps = figures.supported(summary[summary["variant"] == "b"], summary, reference="a")
    assert gaps["draft_step"].tolist() == [0]
