"""What one optimiser step minimises: soft cross-entropy of K draft steps against the target, by TTT or block-wise.

L = Σ_k λ^k · mean over valid (t, k) of CE(softmax(p_{t+1+k} on the draft vocabulary), q_{t,k})

Block-wise training is the same loss: a `block` drafter's K = block_size - 1 steps come from one pass, its anchors are
drawn with the share ``anchor_fraction``, and λ^k is DFlash's weight exp(-k/γ) with γ = -1 / ln λ (λ = 0.8: γ = 4.5).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from .. import parallel
from ..drafters.drafter import Drafter
from ..features.spec import Features, moved
from .anchors import Anchors, find_anchors, sample_anchors
from .config import TrainConfig
from .ttt import draft_steps


@dataclass(frozen=True)
class Loss:
    """``loss`` is the scalar to minimise; the rest is per draft step, [K], detached: mean loss, counts of pairs."""

    loss: Tensor
    step_loss: Tensor
    matches: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class Draw:
    """What one loss is computed on.

    anchors, subset, kv_lag : see :func:`~ttt.draft_steps`. pairs : [K] that enter its means, of the whole batch if
    several processes share it. fixed : shapes follow from the batch's alone, and rows that don't count are computed.
    """

    anchors: Anchors
    subset: tuple[Anchors, Tensor] | None
    kv_lag: Tensor | None
    pairs: Tensor
    fixed: bool = False


def training_loss(
    drafter: Drafter, features: Features, config: TrainConfig, step: int, generator: torch.Generator
) -> Loss:
    """The loss of optimiser step ``step`` (from 0), cures for a hybrid's branch included; ``generator`` draws lags
    and anchors.

    ``step_loss``, ``matches`` and ``pairs`` are those of the whole drafter, or of the branch alone while it warms up.
    """
    return loss_of_parts(drafter, features, config, draw_parts(drafter, features, config, step, generator))


def draw_parts(
    drafter: Drafter, features: Features, config: TrainConfig, step: int, generator: torch.Generator,
    fixed: bool = False,
) -> dict[str, Draw]:  # fmt: skip
    """What optimiser step ``step`` is computed on: of the ``whole`` drafter, of its cross ``branch`` alone, or both."""
    lag = draw_lags(len(features.tokens), config.kv_lag_augment_tokens, generator, features.tokens.device)
    parts = ["branch"] if step < config.branch_warmup_steps else ["whole"]
    parts += ["branch"] if config.branch_loss_weight and parts == ["whole"] else []
    given = features, config.ttt_steps, config.anchor_fraction, generator
    return {part: draw(drafter, *given, kv_lag=lag, fixed=fixed) for part in parts}


def loss_of_parts(drafter: Drafter, features: Features, config: TrainConfig, parts: dict[str, Draw]) -> Loss:
    """The loss of :func:`training_loss`, on what is drawn."""
    losses = [drawn_loss(drafter, features, own, config.step_decay, part == "branch") for part, own in parts.items()]
    if len(losses) == 1:
        return losses[0]
    whole, branch = losses
    return replace(whole, loss=whole.loss + config.branch_loss_weight * branch.loss)


def with_gradients(work: Callable[[], Loss], device: torch.device, dtype: torch.dtype) -> Loss:
    """The loss that ``work`` computes in this dtype, detached; its gradients are added to the parameters'."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = work()
    loss.loss.backward()
    return replace(loss, loss=loss.loss.detach())


def draw_lags(documents: int, most: int, generator: torch.Generator, device) -> Tensor | None:
    """A lag of 0 … ``most`` tokens a document, all equally likely, [B]; None, and nothing drawn, if ``most`` is 0."""
    if not most:
        return None
    draw = lambda rows, columns: torch.randint(most + 1, (rows, columns), generator=generator)
    return moved(parallel.draw(draw, documents)[:, 0], device)


def ttt_loss(
    drafter: Drafter, features: Features, *, ttt_steps: int = 7, step_decay: float = 0.8, anchor_fraction: float = 1.0,
    generator: torch.Generator | None = None, anchors: Anchors | None = None, kv_lag: Tensor | None = None,
    cross_alone: bool = False,
) -> Loss:  # fmt: skip
    """L, as at the top of this module.

    Parameters
    ----------
    anchor_fraction : below 1, steps k ≥ 1 (of a `block`, all) are estimated on a random subset of anchors, without
        bias: the mean's denominator stays that of all pairs, the sampled terms are weighted up.
    anchors : some of the anchors, instead of all. kv_lag, cross_alone : see :func:`~ttt.draft_steps`.

    Notes
    -----
    A pair whose target argmax is outside the draft vocabulary is dropped from the loss, and counts as a miss in
    ``matches`` and ``pairs``, which count what was computed.
    """
    drawn = draw(drafter, features, ttt_steps, anchor_fraction, generator, anchors=anchors, kv_lag=kv_lag)
    return drawn_loss(drafter, features, drawn, step_decay, cross_alone)


def draw(
    drafter: Drafter, features: Features, ttt_steps: int, anchor_fraction: float, generator: torch.Generator | None, *,
    anchors: Anchors | None = None, kv_lag: Tensor | None = None, fixed: bool = False,
) -> Draw:  # fmt: skip
    """All anchors, or those given, the subset of them for later draft steps, and how many pairs they make."""
    room = features.tokens.shape[1] if fixed else 0
    anchors = anchors or find_anchors(features.answer_mask, ttt_steps, room)
    subset = None
    if anchor_fraction < 1:
        subset = sample_anchors(anchors, anchor_fraction, generator, math.ceil(room * anchor_fraction))
    wanted, last = drafter.to_draft[features.target_argmax], features.tokens.shape[1] - 1
    scored = torch.stack([_scored(anchors, k, wanted, last)[1].sum() for k in range(ttt_steps)])
    return Draw(anchors, subset, kv_lag, parallel.summed(scored).clamp(min=1), fixed)


def drawn_loss(drafter: Drafter, features: Features, drawn: Draw, step_decay: float, cross_alone: bool) -> Loss:
    """L of :func:`ttt_loss`; with a ``fixed`` draw nothing in it waits for the device."""
    wanted = drafter.to_draft[features.target_argmax]  # [B, n] draft index of the target's argmax, -1 outside
    probabilities = target_probabilities(drafter, features)
    (documents, length), steps = features.tokens.shape, len(drawn.pairs)
    losses, matches, pairs = [], [], []
    score = _compiled_score() if drafter.compiled else score_rows
    given = {"kv_lag": drawn.kv_lag, "cross_alone": cross_alone}
    for k, current, output in draft_steps(drafter, features, drawn.anchors, steps, drawn.subset, **given):
        places, scored = _scored(current, k, wanted, length - 1)
        if drawn.fixed:
            wanted_row = (places + length * torch.arange(documents, device=places.device)[:, None]).flatten()
            output, weight = output.flatten(0, 1), (current.weight * scored).flatten()
        else:
            document, row = scored.nonzero(as_tuple=True)
            wanted_row, output = document * length + places[document, row], output[document, row]
            weight = current.weight[document, row]
        total, best = SoftCrossEntropy.apply(
            drafter.norm(output), drafter.head, probabilities, wanted_row, weight, score, drafter.logit_cap
        )
        losses.append(total / drawn.pairs[k])
        matches.append(((best == wanted.flatten()[wanted_row]) & (weight > 0)).sum())
        pairs.append(current.valid[..., k].sum())
    step_loss = torch.stack(losses)
    loss = (step_loss * _decay(step_decay, steps, step_loss.device)).sum()
    return Loss(loss, step_loss.detach(), torch.stack(matches), torch.stack(pairs))


@cache
def _decay(step_decay: float, steps: int, device: torch.device) -> Tensor:
    """λ^k [K]"""
    return torch.tensor([step_decay**k for k in range(steps)], device=device)


def _scored(anchors: Anchors, k: int, wanted: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Positions t+1+k of the target state that judges step k [B, M], and which pairs enter the loss [B, M]."""
    places = (anchors.index + 1 + k).clamp(max=last)
    return places, anchors.valid[..., k] & (wanted.gather(1, places) >= 0)


@torch.no_grad()
def target_probabilities(drafter: Drafter, features: Features) -> Tensor:
    """softmax of p_t on the draft vocabulary, [B·n, V_draft] float32; every draft step gathers from it."""
    return drafter.logits(features.final_hidden.flatten(0, 1)).float().softmax(-1)


class SoftCrossEntropy(torch.autograd.Function):
    """Σ_r w_r · CE(p_r, softmax(h_r Wᵀ)) for a frozen head W, a chunk of rows at a time.

    The gradient of a row is w (softmax(z) - p) W; it is formed at once and only [rows, d] of it kept, so that logits
    of K draft steps never stand in memory together. Inputs: hidden [R, d], head [V, d], probabilities [P, V], index
    [R] into them, weight [R], ``score`` (:func:`score_rows`, or what torch.compile made of it), ``cap`` of the
    logits. Returns the sum and argmax z [R].
    """

    @staticmethod
    def forward(ctx, hidden, head, probabilities, index, weight, score, cap):
        rows = 256 if hidden.device.type == "cpu" else 8192
        total, best, gradient = hidden.new_zeros((), dtype=torch.float32), [], torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part].to(head.dtype) @ head.T
            loss, chosen, difference = score(logits, probabilities, index[part], weight[part], cap)
            total += loss
            best.append(chosen)
            gradient[part] = (difference.to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        best = torch.cat(best) if best else index.new_zeros(0)
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx, grad_total, _grad_best):
        return grad_total.to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None, None, None, None, None


def score_rows(
    logits: Tensor, probabilities: Tensor, index: Tensor, weight: Tensor, cap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted soft cross-entropy of rows z [R, V] against p = probabilities[index]: its sum, argmax z, and w
    (softmax(z) - p).

    With ``cap`` the logits are y = cap · tanh(z / cap), and the gradient is w (softmax(y) - p) (1 - (y / cap)²).
    """
    logits, wanted = logits.float(), probabilities[index]
    if cap:
        logits = cap * torch.tanh(logits / cap)
        slope = 1 - (logits / cap) ** 2
    best, normaliser = logits.argmax(-1), logits.logsumexp(-1)
    total = (weight * (normaliser - torch.linalg.vecdot(logits, wanted))).sum()
    gradient = logits.sub_(normaliser[:, None]).exp_().sub_(wanted).mul_(weight[:, None])
    return total, best, gradient.mul_(slope) if cap else gradient


@cache
def _compiled_score():
    return torch.compile(score_rows, dynamic=True)
