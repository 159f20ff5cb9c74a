"""What one optimiser step minimises: TTT or the block-wise loss, plus the cures for a hybrid whose cross branch starves.

A hybrid's attention output is s + g ⊙ (c - s): with a small gate g the cross branch c gets a small gradient, stays poor, and the gate has
no reason to open. Each cure is one parameter of `TrainConfig` (``gate_floor`` and ``kv_init`` are the drafter's own):

    branch_warmup_steps          the branch first: output c alone, so neither self-attention nor gate are trained yet
    branch_loss_weight           an auxiliary loss: predict from the branch alone, fed back its own state, as if the gate were 1
    branch_learning_rate_scale   the branch's own learning rate
    kv_lag_augment_tokens        GLIDE's trick: hide the newest 0 … m entries of the target's KV, m drawn per document, as if the draft were
                                 m steps further on; the self branch, whose last entry is its own, still sees all
"""

from dataclasses import replace

import torch
from torch import nn

from .. import parallel
from ..drafters.config import DrafterConfig
from ..errors import StudyError
from ..features.spec import Features
from .ttt import TTTLoss, ttt_loss


def training_loss(drafter, features: Features, config, step: int, generator: torch.Generator) -> TTTLoss:
    """The loss of optimiser step ``step`` (from 0); ``config`` is a `TrainConfig`, ``generator`` draws lags and anchors.

    ``step_loss``, ``matches`` and ``pairs`` are those of the whole drafter, or of the branch alone while it warms up.
    """
    kv_lag = draw_lags(len(features.tokens), config.kv_lag_augment_tokens, generator, features.tokens.device)
    given = {
        "ttt_steps": config.ttt_steps, "step_decay": config.step_decay, "anchor_fraction": config.anchor_fraction,
        "generator": generator, "kv_lag": kv_lag,
    }  # fmt: skip
    if step < config.branch_warmup_steps:
        return ttt_loss(drafter, features, **given, cross_alone=True)
    whole = ttt_loss(drafter, features, **given)
    if not config.branch_loss_weight:
        return whole
    branch = ttt_loss(drafter, features, **given, cross_alone=True)
    return replace(whole, loss=whole.loss + config.branch_loss_weight * branch.loss)


def draw_lags(documents: int, most: int, generator: torch.Generator, device) -> torch.Tensor | None:
    """A lag of 0 … ``most`` tokens for each document, all equally likely, [B] int64; None, and nothing drawn, if ``most`` is 0."""
    if not most:
        return None
    draw = lambda rows, columns: torch.randint(most + 1, (rows, columns), generator=generator)
    return parallel.draw(draw, documents)[:, 0].to(device)


def parameter_groups(drafter: nn.Module, config) -> list[dict]:
    """What the optimiser is given: all that is trained in one group, or the cross branch in a second with its own ``scale``."""
    scale, trained = config.branch_learning_rate_scale, [p for p in drafter.parameters() if p.requires_grad]
    if scale == 1:
        return [{"params": trained}]
    branch = set(branch_parameters(drafter))
    rest, own = [p for p in trained if p not in branch], [p for p in trained if p in branch]
    return [{"params": rest}, {"params": own, "scale": scale}]


def branch_parameters(drafter: nn.Module) -> list[nn.Parameter]:
    """The cross branch of a hybrid: its attention and the fusion of the target's KV that it reads. The gate belongs to both branches."""
    return [p for layer in drafter.layers for part in (layer.cross, layer.fusion) for p in part.parameters()]


CURES = {"branch_warmup_steps": 0, "branch_loss_weight": 0.0, "branch_learning_rate_scale": 1.0}


def check_objective(drafter: DrafterConfig, training) -> None:
    """Refuse a training that its drafter can't have.

    Raises
    ------
    StudyError : a block that is trained in part or asked for more than it drafts; a cure for a branch or a lag of KV that isn't there.
    """
    if drafter.paradigm == "block" and training.ttt_steps != drafter.block_size - 1:
        raise StudyError(
            f"ttt_steps={training.ttt_steps} contradicts block_size={drafter.block_size}: a block is trained whole, on "
            f"its {drafter.block_size - 1} mask slots; set ttt_steps={drafter.block_size - 1}"
        )
    for name, default in CURES.items():
        if getattr(training, name) != default and (drafter.paradigm != "hybrid" or drafter.cross_only):
            raise StudyError(
                f"{name}={getattr(training, name)} needs a hybrid with both branches (paradigm='hybrid', cross_only=False)"
            )
    lags = drafter.paradigm in ("kv", "hybrid") and drafter.kv_control in ("", "shuffled")
    if training.kv_lag_augment_tokens and not lags:
        raise StudyError(
            f"kv_lag_augment_tokens={training.kv_lag_augment_tokens} needs a kv or hybrid drafter over the target's own KV "
            f"(kv_control=''), not paradigm={drafter.paradigm!r} with kv_control={drafter.kv_control!r}"
        )
