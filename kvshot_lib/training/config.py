"""How a drafter is trained: the parameters of a training, and what follows from them alone (batches, learning rates).

A hybrid's attention output is s + g ⊙ (c - s): with a small gate g the cross branch c gets a small gradient, stays
poor, and the gate has no reason to open. Four of the parameters are cures for that (``gate_floor`` and ``kv_init``
are the drafter's):

    branch_warmup_steps          the branch first: output c alone, so neither self-attention nor gate are trained yet
    branch_loss_weight           an auxiliary loss: predict from the branch alone, fed back its own state
    branch_learning_rate_scale   the branch's own learning rate
    kv_lag_augment_tokens        GLIDE's trick: hide the newest 0 … m entries of the target's KV, m drawn per document,
                                 as if the draft were m steps further on; the self branch still sees all
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from ..drafters.config import DrafterConfig
from ..errors import StudyError
from ..settings import check_settings, check_value


@dataclass(frozen=True)
class TrainConfig:
    """How a drafter is trained; what it is, says `DrafterConfig`.

    epochs : passes over the training documents. max_steps : stop earlier (0: don't); the schedule ends there too.
    batch_documents : documents an optimiser step. anchor_fraction : ρ, share of anchors that draft steps k ≥ 1 run on.
    step_decay : λ of the loss. learning_rate falls to 0 along a cosine after warmup_fraction of all steps.
    validate_every : optimiser steps between validations (0: only at the end). checkpoint_every_s : seconds.

    Raises
    ------
    StudyError : a value of another type, or out of range.
    """

    seed: int = 0
    epochs: int = 2
    max_steps: int = 0
    batch_documents: int = 2
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.03
    weight_decay: float = 0.01
    clip_norm: float = 0.5
    ttt_steps: int = 7
    step_decay: float = 0.8
    anchor_fraction: float = 0.2
    validate_every: int = 50
    checkpoint_every_s: float = 60.0
    branch_warmup_steps: int = 0
    branch_loss_weight: float = 0.0
    branch_learning_rate_scale: float = 1.0
    kv_lag_augment_tokens: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        positive = ("epochs", "batch_documents", "learning_rate", "clip_norm", "ttt_steps", "step_decay")
        for name in (*positive, "branch_learning_rate_scale", "anchor_fraction"):
            if not getattr(self, name) > 0:
                raise StudyError(f"{name}={getattr(self, name)} must be above 0")
        cures = ("branch_warmup_steps", "branch_loss_weight", "kv_lag_augment_tokens")
        periods = ("max_steps", "validate_every", "checkpoint_every_s")
        for name in ("seed", "weight_decay", "warmup_fraction", *periods, *cures):
            if getattr(self, name) < 0:
                raise StudyError(f"{name}={getattr(self, name)} must be 0 or more")
        for name, most in (("anchor_fraction", 1), ("warmup_fraction", 1), ("seed", 2**32 - 1)):
            if getattr(self, name) > most:
                raise StudyError(f"{name}={getattr(self, name)} must be at most {most}")


def configurations(values: Mapping) -> tuple[DrafterConfig, TrainConfig]:
    """The drafter and its training, from parameters of the training notebook; what means something else is left alone.

    Raises
    ------
    StudyError : values that no drafter or training can have, or that contradict one another.
    """
    drafter = DrafterConfig.of(values)
    training = TrainConfig(**{field.name: values[field.name] for field in fields(TrainConfig) if field.name in values})
    check_training(drafter, training)
    for name in BESIDE.keys() & values.keys():
        check_value(name, values[name], BESIDE[name])
    for name in ("draft_vocab_size", "draft_length"):
        if values.get(name, 1) < 1:
            raise StudyError(f"{name}={values[name]} must be 1 or more")
    if drafter.paradigm == "block" and values.get("draft_length", 1) >= drafter.block_size:
        raise StudyError(f"draft_length={values['draft_length']} must be below block_size={drafter.block_size}")
    return drafter, training


BESIDE = {
    "draft_vocab_size": int, "draft_length": int, "init_from": str, "device": str, "dtype": str, "compile_steps": bool,
    "features_on_device": bool, "log_to": Literal["", "tensorboard"],
}  # fmt: skip
"""What else a training is given, and its kind."""
BRANCH_CURES = {"branch_warmup_steps": 0, "branch_loss_weight": 0.0, "branch_learning_rate_scale": 1.0}


def check_training(drafter: DrafterConfig, training: TrainConfig) -> None:
    """Refuse a training that its drafter can't have.

    Raises
    ------
    StudyError : a block trained in part, or on more than it drafts; a cure for a branch, a lag of KV, that isn't there.
    """
    if drafter.paradigm == "block" and training.ttt_steps != drafter.block_size - 1:
        raise StudyError(
            f"ttt_steps={training.ttt_steps} contradicts block_size={drafter.block_size}: a block is trained whole, on "
            f"its {drafter.block_size - 1} mask slots; set ttt_steps={drafter.block_size - 1}"
        )
    for name, default in BRANCH_CURES.items():
        if getattr(training, name) != default and (drafter.paradigm != "hybrid" or drafter.cross_only):
            given = f"{name}={getattr(training, name)}"
            raise StudyError(f"{given} needs a hybrid with both branches (paradigm='hybrid', cross_only=False)")
    lags = drafter.paradigm in ("kv", "hybrid") and drafter.kv_control in ("", "shuffled")
    if training.kv_lag_augment_tokens and not lags:
        given = f"kv_lag_augment_tokens={training.kv_lag_augment_tokens}"
        raise StudyError(
            f"{given} needs a kv or hybrid drafter over the target's own KV (kv_control=''), not "
            f"paradigm={drafter.paradigm!r} with kv_control={drafter.kv_control!r}"
        )


def total_steps(config: TrainConfig, documents: int) -> int:
    """Optimiser steps of the whole run."""
    steps = config.epochs * math.ceil(documents / config.batch_documents)
    return min(steps, config.max_steps) if config.max_steps else steps


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero at ``total``; ``step`` from 0."""
    warm = max(1, round(config.warmup_fraction * total))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def batches(lengths: list[int], config: TrainConfig, first: int, total: int) -> Iterator[list[int]]:
    """Documents of optimiser steps ``first`` … ``total`` - 1."""
    a_pass = math.ceil(len(lengths) / config.batch_documents)
    for epoch in range(first // a_pass, config.epochs):
        for place, batch in enumerate(batch_plan(lengths, config.batch_documents, config.seed, epoch), epoch * a_pass):
            if first <= place < total:
                yield batch


def batch_plan(lengths: list[int], batch_documents: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one pass, every document once, as a function of its arguments alone.

    Documents are shuffled, sorted by length within runs of 16 batches (little padding), and the batches shuffled again.
    """
    random = np.random.default_rng([seed, epoch])
    order, found = random.permutation(len(lengths)), []
    for start in range(0, len(order), 16 * batch_documents):
        run = sorted(order[start : start + 16 * batch_documents].tolist(), key=lambda i: lengths[i])
        found += [run[i : i + batch_documents] for i in range(0, len(run), batch_documents)]
    return [found[i] for i in random.permutation(len(found))]
