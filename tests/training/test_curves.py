"""Curves in TensorBoard hold the history's rows, cost no number, and nothing of it is touched where nobody asked."""

import importlib
import math
import sys

import examples
import numpy as np
import pytest
import torch
from killed import Killed, die_before_step

from kvshot_lib.errors import StudyError
from kvshot_lib.training.config import TrainConfig, configurations
from kvshot_lib.training.loop import train

CONFIG = TrainConfig(
    epochs=3, batch_documents=2, ttt_steps=3, anchor_fraction=0.5, validate_every=4, checkpoint_every_s=0.0
)


def run(folder, **given):
    """Nine steps, with reports at 4, 8 and 9; weights and history."""
    drafter, source = examples.drafter("hidden"), examples.live()
    history = train(drafter, source, source, CONFIG, folder, **given)
    return drafter.state_dict(), history


def test_event_files_hold_the_history_once_even_after_a_kill(tmp_path, monkeypatch):
    """Killed after the report of step 8, resumed from step 4: step 8 is reported again, in a second file."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_before_step(patch, 8, last_save=4)
        run(tmp_path, log_to="tensorboard")
    weights, history = run(tmp_path, log_to="tensorboard")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    shown = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {name: [(event.step, event.value) for event in shown.Scalars(name)] for name in shown.Tags()["scalars"]}
    wanted = {"learning_rate": list(dict(zip(history["step"], history["learning_rate"], strict=True)).items())}
    for row in history.to_dict("records"):
        for column in ("loss", "acceptance"):
            if math.isfinite(row[column]):
                wanted.setdefault(f"{column}/{row['split']}_{row['draft_step']}", []).append((row["step"], row[column]))
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        np.testing.assert_allclose(found[name], points, rtol=1e-6)
    without, _ = run(tmp_path / "without")
    assert all(torch.equal(without[name], tensor) for name, tensor in weights.items())


def test_nothing_is_imported_or_written_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it would raise
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "tensorboard" in path.name] == []


def test_a_missing_package_and_another_place_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(StudyError, match="needs a package that isn't installed: pip install tensorboard$"):
        run(tmp_path, log_to="tensorboard")
    assert not list(tmp_path.iterdir()), "no step was trained"
    with pytest.raises(StudyError, match="log_to='wandb' must be"):
        configurations({"log_to": "wandb"})
