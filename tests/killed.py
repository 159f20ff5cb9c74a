"""Trainings that die where a test says, and what was done before."""

import pytest

from kvshot_lib.training.loop import Training


class Killed(BaseException):
    """What a kill looks like from inside: nothing that the library catches."""


def die_before_step(monkeypatch: pytest.MonkeyPatch, step: int, last_save: int | None = None) -> None:
    """Die just before optimiser step ``step`` (from 0); the last checkpoint is that after ``last_save`` steps."""
    one_step, save = Training.step, Training.save

    def killing(training, indices):
        if training.progress.step == step:
            raise Killed
        one_step(training, indices)

    def saving(training):
        if last_save is None or training.progress.step <= last_save:
            save(training)

    monkeypatch.setattr(Training, "step", killing)
    monkeypatch.setattr(Training, "save", saving)


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The optimiser steps (from 0) that are done from here on."""
    done, one_step = [], Training.step

    def counted(training, indices):
        done.append(training.progress.step)
        one_step(training, indices)

    monkeypatch.setattr(Training, "step", counted)
    return done
