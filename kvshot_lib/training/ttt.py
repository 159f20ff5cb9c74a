"""Training-time test: run a drafter on its own state over ground-truth tokens, K draft steps from every anchor, and score it.

Index rules in one example, an answer span x3 … x6 (answer mask 0001111), K = 3. Step k at anchor t needs x_{t+1} … x_{t+2+k} in
the span:

    anchor t      2     3     4     5      (t itself may be the last prompt token)
    tokens after  4     3     2     1      answer tokens in a row from x_{t+1} on
    valid steps   0 1 2 0 1   0     -      k + 2 ≤ tokens after

Block-wise training is the same loss: a `block` drafter's K = block_size - 1 steps come from one pass (`block.py`), its anchors are drawn
with the share ``anchor_fraction``, and step_decay^k is DFlash's weight exp(-k/γ) with γ = -1 / ln(step_decay) (0.8: γ = 4.5).

For `kv` there is no third thing between. It feeds no state back, so K steps of TTT from an anchor *are* a block of K teacher-forced
tokens under causal attention, with gradients through every draft-side key and value: training it block-wise "in the causal sense"
is TTT with ``anchor_fraction=1``, to the last gradient (a test holds it to one pass over a block with an explicit causal mask). What can
differ is how many anchors later steps run on (``anchor_fraction``), their weights (``step_decay``) and their number (``ttt_steps``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parallel
from ..drafters.attention import prefix_mask
from ..drafters.block import draft_blocks
from ..drafters.drafter import Drafter
from ..drafters.layers import View
from ..features.spec import Features
from .cross_entropy import SoftCrossEntropy


@dataclass(frozen=True)
class Anchors:
    """The anchors of a batch that have at least one valid draft step, left-aligned per document.

    index : [B, M] int64 anchor positions t, padded with 0.
    valid : [B, M, K] bool, False on padding.
    weight : [B, M] float32: what each anchor stands for (1, or anchors / sampled anchors of its document).
    """

    index: Tensor
    valid: Tensor
    weight: Tensor


def find_anchors(answer_mask: Tensor, ttt_steps: int) -> Anchors:
    """All anchors of a batch, from its answer mask [B, n]."""
    length = answer_mask.shape[1]
    places = torch.arange(length, device=answer_mask.device)
    ends = torch.where(
        answer_mask, length, places
    )  # the next token at or after i outside an answer: a running minimum from behind
    ends = ends.flip(1).cummin(1).values.flip(1)
    following = torch.zeros_like(ends)
    following[:, :-1] = (ends - places)[:, 1:]  # answer tokens in a row from x_{t+1} on
    steps = torch.arange(ttt_steps, device=answer_mask.device)
    valid = following[..., None] >= steps + 2
    used = valid[..., 0]
    order = torch.argsort(~used, dim=1, stable=True)[:, : max(1, int(used.sum(1).max()))]
    rows = valid.gather(1, order[..., None].expand(-1, -1, ttt_steps))
    index = torch.where(rows[..., 0], order, 0)
    return Anchors(index, rows, torch.ones(index.shape, device=index.device))


def sample_anchors(anchors: Anchors, fraction: float, generator: torch.Generator) -> tuple[Anchors, Tensor]:
    """Draw ceil(fraction · M_d) of each document's M_d anchors, uniformly without replacement.

    Returns
    -------
    The subset, each weighted by M_d / ceil(fraction · M_d), so that a weighted sum over it is an unbiased estimate of the sum
    over all anchors; and [B, m] where in ``anchors`` each was. ``fraction=1`` keeps all, in order, with weight 1.
    """
    used = anchors.valid[..., 0]
    number = used.sum(1)
    keep = torch.ceil(number * fraction).long()
    uniform = parallel.draw(lambda rows, columns: torch.rand(rows, columns, generator=generator), *used.shape)
    rank = uniform.to(used.device).masked_fill(~used, 2.0).argsort(1).argsort(1)
    chosen = rank < keep[:, None]
    place = torch.argsort(~chosen, dim=1, stable=True)[:, : max(1, int(keep.max()))]
    real = chosen.gather(1, place)
    weight = real * (number / keep.clamp(min=1))[:, None]
    valid = anchors.valid.gather(1, place[..., None].expand(-1, -1, anchors.valid.shape[2])) & real[..., None]
    return Anchors(anchors.index.gather(1, place), valid, weight), place


def draft_steps(
    drafter: Drafter, features: Features, anchors: Anchors, ttt_steps: int,
    subset: tuple[Anchors, Tensor] | None = None, *, kv_lag: Tensor | None = None, cross_alone: bool = False,
) -> Iterator[tuple[int, Anchors, Tensor]]:  # fmt: skip
    """Run K draft steps from every anchor; inputs are the ground-truth tokens, only the drafter's state is its own.

    ``kv_lag`` [B] hides the newest entries of the target's KV, so many a document; ``cross_alone`` runs a hybrid as if its gate were 1.

    Yields
    ------
    k, the anchors of this step, and the drafter's output [B, M, d] before its final norm. Steps k ≥ 1 run on ``subset`` alone, if
    given: chains of different anchors share nothing but the prefix. A `block` drafter runs on it at every step: they are one pass.
    """
    if drafter.config.paradigm == "block":
        anchors = anchors if subset is None else subset[0]
        outputs = draft_blocks(drafter, features, anchors.index, ttt_steps)
        yield from ((k, anchors, outputs[:, k]) for k in range(ttt_steps))
        return
    prefix, fused = drafter.prefix(features)
    last = features.tokens.shape[1] - 1
    state = None if fused is None else take(fused, anchors.index)
    masks = _masks(drafter, anchors, last, kv_lag)
    views = [View(entries, masks[0], {}, True, masks[1], cross_alone) for entries in prefix]
    for k in range(ttt_steps):
        if k == 1 and subset is not None:
            anchors, place = subset
            state = None if fused is None else take(state, place)
            masks = _masks(drafter, anchors, last, kv_lag)
            for view in views:
                view.mask, view.lagged_mask = masks
                view.chains = {name: _take_entries(chain, place) for name, chain in view.chains.items()}
        places = (anchors.index + 1 + k).clamp(max=last)
        for view in views:
            view.first = k == 0
        output = drafter.step(features.tokens.gather(1, places), places, state, views)
        yield k, anchors, output
        state = drafter.feedback(output)


def _masks(drafter: Drafter, anchors: Anchors, length: int, kv_lag: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Masks over the prefix, and over the target's KV if that lags behind (one entry stays)."""
    visible = drafter.visible(anchors.index)
    lagged = None if kv_lag is None else prefix_mask((visible - kv_lag[:, None]).clamp(min=1), length)
    return prefix_mask(visible, length), lagged


def take(rows: Tensor, index: Tensor) -> Tensor:
    """[B, n, …] at [B, M] -> [B, M, …]"""
    shaped = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, shaped)


def _take_entries(chain: tuple[Tensor, Tensor], place: Tensor) -> tuple[Tensor, Tensor]:
    """Chain entries [B, G, M, J, D] of the anchors at ``place`` [B, m]."""
    groups, entries, size = (chain[0].shape[axis] for axis in (1, 3, 4))
    index = place[:, None, :, None, None].expand(-1, groups, -1, entries, size)
    return chain[0].gather(2, index), chain[1].gather(2, index)


@dataclass(frozen=True)
class TTTLoss:
    """``loss`` is the scalar to minimise; the rest is per draft step, [K], detached: mean loss, and counts for acceptance."""

    loss: Tensor
    step_loss: Tensor
    matches: Tensor
    pairs: Tensor


def ttt_loss(
    drafter: Drafter, features: Features, *, ttt_steps: int = 7, step_decay: float = 0.8, anchor_fraction: float = 1.0,
    generator: torch.Generator | None = None, anchors: Anchors | None = None, kv_lag: Tensor | None = None,
    cross_alone: bool = False,
) -> TTTLoss:  # fmt: skip
    """L = Σ_k step_decay^k · mean over valid (t, k) of CE(softmax(p_{t+1+k} on the draft vocabulary), q_{t,k}).

    A pair whose target argmax is outside the draft vocabulary is dropped from the loss. With ``anchor_fraction`` < 1 steps k ≥ 1
    are estimated on a random subset of anchors, without bias: the mean's denominator stays that of all pairs, the sampled terms are
    weighted up (with a `block` drafter every step is). ``anchors`` may name some of the anchors, instead of all. ``matches`` and
    ``pairs`` count what was computed (dropped pairs count as misses). ``kv_lag`` and ``cross_alone`` are those of
    :func:`draft_steps`.
    """
    anchors = anchors or find_anchors(features.answer_mask, ttt_steps)
    subset = sample_anchors(anchors, anchor_fraction, generator) if anchor_fraction < 1 else None
    wanted = drafter.to_draft[features.target_argmax]  # [B, n] draft index of the target's argmax, -1 outside
    probabilities = target_probabilities(drafter, features)
    last, losses, matches, pairs = features.tokens.shape[1] - 1, [], [], []
    scored = torch.stack([_scored(anchors, k, wanted, last)[1].sum() for k in range(ttt_steps)])
    denominators = parallel.summed(scored).clamp(min=1)  # of the whole batch, if several processes share it
    steps = draft_steps(drafter, features, anchors, ttt_steps, subset, kv_lag=kv_lag, cross_alone=cross_alone)
    for k, current, output in steps:
        places, scored = _scored(current, k, wanted, last)
        document, row = scored.nonzero(as_tuple=True)
        place = places[document, row]
        weight = current.weight[document, row]
        hidden = drafter.norm(output[document, row])
        flat = document * features.tokens.shape[1] + place
        total, best = SoftCrossEntropy.apply(
            hidden, drafter.head, probabilities, flat, weight, drafter.score, drafter.logit_cap
        )
        losses.append(total / denominators[k])
        matches.append((best == wanted[document, place]).sum())
        pairs.append(current.valid[..., k].sum())
    decay = torch.tensor([step_decay**k for k in range(ttt_steps)], device=losses[0].device)
    step_loss = torch.stack(losses)
    return TTTLoss((step_loss * decay).sum(), step_loss.detach(), torch.stack(matches), torch.stack(pairs))


def _scored(anchors: Anchors, k: int, wanted: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Positions t+1+k of the target state that judges step k [B, M], and which pairs enter the loss [B, M]."""
    places = (anchors.index + 1 + k).clamp(max=last)
    return places, anchors.valid[..., k] & (wanted.gather(1, places) >= 0)


@torch.no_grad()
def target_probabilities(drafter: Drafter, features: Features) -> Tensor:
    """softmax of p_t on the draft vocabulary, [B·n, V_draft] float32: once per batch, every draft step gathers from it."""
    return drafter.logits(features.final_hidden.flatten(0, 1)).float().softmax(-1)


@torch.no_grad()
def predict(drafter: Drafter, features: Features, anchors: Anchors, ttt_steps: int) -> Tensor:
    """Greedy drafts under teacher forcing: argmax q_{t,k} as target token ids, [B, M, K] (rubbish where not valid)."""
    predictions = torch.zeros(anchors.valid.shape, dtype=torch.int64, device=anchors.index.device)
    for k, _, output in draft_steps(drafter, features, anchors, ttt_steps):
        document, row = anchors.valid[..., k].nonzero(as_tuple=True)
        for part in torch.arange(len(row), device=row.device).split(2048):
            hidden = drafter.norm(output[document[part], row[part]])
            best = drafter.logits(hidden).argmax(-1)
            predictions[document[part], row[part], k] = drafter.draft_ids[best]
    return predictions
