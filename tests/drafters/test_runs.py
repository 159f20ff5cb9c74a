"""Runs of a results folder: found in the study's order, and the command that makes one that is missing."""

import json
import shlex
from pathlib import Path

import examples
import pytest
import yaml
from notebook_checks import ROOT

from kvshot_lib.drafters.checkpoint import load_drafter, warm_start
from kvshot_lib.drafters.runs import find_runs
from kvshot_lib.errors import StudyError
from kvshot_lib.study.notebooks import check_parameters


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
    with pytest.raises(StudyError, match="'kv_1_none' is called 'none_1' now"):
        find_runs(results, ["kv_1_none/seed0"])


@pytest.mark.parametrize("results_dir", ["../results/mine", "results/mine"])
def test_a_missing_warm_start_names_the_command_that_makes_it(results_dir):
    with pytest.raises(StudyError, match="train it first") as caught:
        warm_start(examples.drafter("hybrid"), Path(results_dir) / "runs/hidden_post_norm/seed2")
    text = str(caught.value)
    assert "\n" not in text and "what makes it" not in text
    command = shlex.split(text[text.index("python -m") :])
    assert command == shlex.split(
        "python -m kvshot_lib notebook run notebooks/03_train_drafter.ipynb "
        "results/mine/notebooks/03_train_drafter.hidden_post_norm.seed2.ipynb -p variant hidden_post_norm "
        "-p paradigm hidden -p feedback post_norm -p seed 2 -p draft_vocab_size 410 "
        "-p results_dir ../results/mine -p figures_dir ../results/mine/figures"
    )
    check_parameters(ROOT / command[5], {name: yaml.safe_load(value) for _, name, value in pairs(command[7:])})


def pairs(words: list[str]) -> list[tuple[str, str, str]]:
    """``-p NAME VALUE -p NAME VALUE …`` -> triples"""
    return list(zip(words[::3], words[1::3], words[2::3], strict=True))


def test_the_command_for_other_folders(tmp_path):
    with pytest.raises(StudyError, match="add your budget, what makes it this variant") as caught:
        load_drafter(tmp_path / "a folder/runs/mine/seed0", examples.target())
    command = shlex.split(str(caught.value).split("): ")[1])
    assert command[6] == f"{tmp_path}/a folder/notebooks/03_train_drafter.mine.seed0.ipynb"
    assert ("-p", "results_dir", f"{tmp_path}/a folder") in pairs(command[7:])
