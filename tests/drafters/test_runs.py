"""Runs of a results folder: found in the study's order, and what makes one that is missing."""

import json
from pathlib import Path

import examples
import pytest

from kvshot_lib.drafters.checkpoint import warm_start
from kvshot_lib.drafters.runs import find_runs
from kvshot_lib.errors import StudyError


def leave(folder, name: str, *files: str) -> None:
    """A run's folder with these files."""
    (folder / "runs" / name).mkdir(parents=True)
    for file in files:
        (folder / "runs" / name / file).write_text("{}")


@pytest.fixture
def results(tmp_path):
    leave(tmp_path, "kv_2/seed10", "drafter.json", "run.json")
    leave(tmp_path, "kv_2/seed2", "drafter.json", "run.json")
    leave(tmp_path, "hidden/seed0", "drafter.json")
    leave(tmp_path, "zoo/seed0", "drafter.json", "run.json")
    leave(tmp_path, "kv_1/seed0")
    leave(tmp_path, "kv_1/seed0.kept", "drafter.json", "run.json")  # a copy that someone put aside
    return tmp_path


def test_runs_in_the_order_of_the_study(results):
    assert list(find_runs(results)) == ["kv_2/seed2", "kv_2/seed10", "zoo/seed0"]
    assert list(find_runs(results, finished=False)) == ["hidden/seed0", "kv_2/seed2", "kv_2/seed10", "zoo/seed0"]
    assert find_runs(results, ["zoo/seed0", "kv_2/seed2"]) == {
        name: results / "runs" / name for name in ("kv_2/seed2", "zoo/seed0")
    }


def test_a_folder_of_checkpoints(tmp_path):
    for name, seed in (("kv_2", 1), ("hidden_31", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "drafter.json").write_text(json.dumps({"seed": seed}))
    found = find_runs(tmp_path, finished=False)
    assert found == {"kv_2/seed1": tmp_path / "kv_2", "hidden_31/seed0": tmp_path / "hidden_31"}


def test_what_is_not_there_is_told(results, tmp_path):
    with pytest.raises(
        StudyError, match="hidden/seed0: no finished run in .*; there: kv_2/seed10, kv_2/seed2, zoo/seed0"
    ):
        find_runs(results, ["hidden/seed0"])
    with pytest.raises(StudyError, match="no trained drafter in .*: train one with notebooks/03_train_drafter.ipynb"):
        find_runs(tmp_path / "nowhere", finished=False)


def test_a_missing_warm_start_names_the_notebook_that_makes_it():
    told = (
        "no trained drafter in .*/runs/hidden/seed2; train it with notebooks/03_train_drafter.ipynb, which leaves it in"
    )
    with pytest.raises(StudyError, match=told) as caught:
        warm_start(examples.drafter("hybrid"), Path("results/mine/runs/hidden/seed2"))
    assert "\n" not in str(caught.value)
