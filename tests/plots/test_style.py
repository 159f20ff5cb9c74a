"""Figures: the same bytes when drawn twice, a table beside, alternative text; recorded ones are redrawn."""

import html
import shutil
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.testing.compare import compare_images
from notebook_checks import ROOT, run_here
from PIL import Image

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.plots import style
from kvshot_lib.plots.lines import lines
from kvshot_lib.study.pipeline import drawings

TABLE = pd.DataFrame(
    {"variant": ["hidden"] * 3 + ["kv_2"] * 3, "draft_step": [0, 1, 2] * 2, "value": [0.5, 0.4, 0.35, 0.5, 0.48, 0.47]}
)


def drawn(table=TABLE):
    return lines(table, "draft_step")


def test_drawn_twice_has_the_same_bytes(tmp_path):
    paths = [style.show(drawn(), TABLE, tmp_path / folder, "decay", "").path for folder in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(paths[0].with_suffix(".csv")), TABLE, check_dtype=False)


def test_changed_number_changes_the_picture(tmp_path):
    """The image comparison of recorded figures can fail: one point moved by .02 is seen."""
    moved = TABLE.assign(value=TABLE["value"] + 0.02 * (TABLE.index == 2))
    first, second = (style.show(drawn(t), t, tmp_path, n, "").path for t, n in ((TABLE, "first"), (moved, "second")))
    assert compare_images(str(first), str(second), tol=2) is not None


class Images(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_a_notebook_shows_picture_and_alternative_text(tmp_path):
    told = 'kv_2 "stays" above\n  hidden & falls'
    picture = style.show(drawn(), TABLE, tmp_path, "decay", told)
    ((tag, attributes),) = Images(picture._repr_html_()).found
    assert (tag, attributes["alt"], attributes["width"]) == ("img", 'kv_2 "stays" above hidden & falls', "800")
    assert attributes["src"].startswith("data:image/png;base64,")
    assert repr(picture) == 'Figure: kv_2 "stays" above hidden & falls'
    assert html.escape("&") in picture._repr_html_()


def test_variants_look_as_the_registry_says():
    assert style.look("hidden") == (VARIANTS["hidden"].colour, VARIANTS["hidden"].marker)
    assert style.look("kv_2_checkpoint") == style.look("kv_2") != style.KIN["kv"]
    assert style.look("block_of_my_own") == style.KIN["block"]
    assert style.look("mine") == style.KIN[""]


def test_colours_survive_the_palette():
    """A pale band over half of the picture, a line of one pixel, 2,000 greys: greys alone change, by a few levels."""
    pixels = np.full((100, 100, 3), 255, dtype=np.uint8)
    pixels[:50], pixels[60] = (225, 240, 235), (200, 30, 90)
    greys = np.linspace(0, 255, 2000).astype(np.uint8).reshape(20, 100, 1)
    pixels[70:90] = greys * (1, 1, 0) + np.array((0, 0, 7), np.uint8)
    found = np.asarray(style._in_256_colours(Image.fromarray(pixels)).convert("RGB")).astype(int)
    assert (found[:61] == pixels[:61]).all() and np.abs(found - pixels).max() < 16


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_picture_in_a_notebook_has_alternative_text(path):
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if "data" in output]
    images = [image for data in shown for image in Images(data.get("text/html", "")).found if image[0] == "img"]
    assert all(len(attributes.get("alt", "")) > 20 for _, attributes in images)
    assert not any("image/png" in data for data in shown)  # JupyterLab would show it without its text


TRACKED = sorted((ROOT / "figures").glob("*/*.png"))


@pytest.mark.parametrize("path", TRACKED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_tracked_figures_fit_a_screen(path):
    """Shown at 800 pixels; at most 900 tall as they are, with their table beside them."""
    with Image.open(path) as picture:
        width, height = picture.size
    assert width <= 1000 and height <= 900
    assert path.with_suffix(".csv").is_file()


@pytest.mark.pipeline
@pytest.mark.filterwarnings("default")  # as in a kernel
@pytest.mark.parametrize("profile", sorted({path.parent.name for path in TRACKED} - {"laptop"}))
def test_recorded_figures_are_what_their_notebook_draws(profile, tmp_path, monkeypatch):
    """A profile's first notebook that draws, again: numbers to a thousandth, pictures to 2 grey levels (rms).

    Of `laptop` all figures are drawn again, and to the byte: ``test_figures``.
    """
    monkeypatch.chdir(ROOT)
    folder, drawn_here = ROOT / "figures" / profile, tmp_path / "figures"
    notebook, _, parameters = drawings(profile)[0]
    monkeypatch.chdir(ROOT / "notebooks")
    run_here(ROOT / notebook, parameters | {"figures_dir": str(drawn_here)})
    assert {path.name for path in drawn_here.iterdir()} <= {path.name for path in folder.iterdir()}
    for path in sorted(drawn_here.glob("*.csv")):
        pd.testing.assert_frame_equal(pd.read_csv(path), pd.read_csv(folder / path.name), rtol=1e-3)
    for path in sorted(drawn_here.glob("*.png")):
        baseline = shutil.copy(folder / path.name, tmp_path / f"recorded_{path.name}")
        assert compare_images(str(baseline), str(path), tol=2) is None, path.name
