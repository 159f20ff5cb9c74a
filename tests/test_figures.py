"""Figures are what the recorded tables show: drawn anew, nothing is missing, changed or left over."""

import re
from pathlib import Path

import pytest
from notebook_checks import ROOT, run_here

from kvshot_lib.study.notebooks import read_code_cells
from kvshot_lib.study.pipeline import drawings, recorded_profiles
from kvshot_lib.study.profiles import DRAWING, NOTEBOOKS


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
def test_the_smaller_recorded_study_is_drawn_as_it_is_committed(tmp_path, monkeypatch):
    jobs = drawings("laptop")
    monkeypatch.chdir(ROOT / "notebooks")
    for notebook, _, parameters in jobs:
        run_here(ROOT / notebook, parameters | {"figures_dir": str(tmp_path)})
    drawn, committed = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, ROOT / "figures/laptop")
    )
    assert drawn.keys() == committed.keys()
    assert [name for name in drawn if drawn[name] != committed[name]] == []


def test_every_recorded_study_has_its_figures_and_every_figure_a_notebook(capsys):
    """Those of the larger study are compared by nbval, where the notebooks show them."""
    code = "".join(cell.source for key in DRAWING for cell in read_code_cells(NOTEBOOKS[key]))
    named = set(re.findall(r'"(\w+)"', code))
    for profile in recorded_profiles():
        if not drawings(profile):  # another's notebook draws it, too
            assert f'"../data/recorded/{profile}"' in code
            continue
        stems = {path.stem for path in Path("figures", profile).iterdir()}
        assert stems and stems <= named, stems - named
