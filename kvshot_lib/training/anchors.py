"""Anchors, the places that a drafter drafts from, and which draft steps count there.

Index rules in one example, an answer span x3 … x6 (answer mask 0001111), K = 3. Step k at anchor t needs x_{t+1} …
x_{t+2+k} in the span:

    anchor t      2     3     4     5      (t itself may be the last prompt token)
    tokens after  4     3     2     1      answer tokens in a row from x_{t+1} on
    valid steps   0 1 2 0 1   0     -      k + 2 ≤ tokens after
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import parallel
from ..features.spec import moved


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


def find_anchors(answer_mask: Tensor, ttt_steps: int, columns: int = 0) -> Anchors:
    """All anchors of a batch, from its answer mask [B, n]; M is ``columns``, or 0: as many as one document has."""
    length = answer_mask.shape[1]
    places = torch.arange(length, device=answer_mask.device)
    ends = torch.where(answer_mask, length, places)
    ends = ends.flip(1).cummin(1).values.flip(1)  # the next token at or after i that is outside an answer
    following = torch.zeros_like(ends)
    following[:, :-1] = (ends - places)[:, 1:]  # answer tokens in a row from x_{t+1} on
    steps = torch.arange(ttt_steps, device=answer_mask.device)
    valid = following[..., None] >= steps + 2
    used = valid[..., 0]
    order = torch.argsort(~used, dim=1, stable=True)[:, : columns or max(1, int(used.sum(1).max()))]
    rows = valid.gather(1, order[..., None].expand(-1, -1, ttt_steps))
    index = torch.where(rows[..., 0], order, 0)
    return Anchors(index, rows, torch.ones(index.shape, device=index.device))


def sample_anchors(
    anchors: Anchors, fraction: float, generator: torch.Generator, columns: int = 0
) -> tuple[Anchors, Tensor]:
    """Draw ceil(fraction · M_d) of each document's M_d anchors, uniformly without replacement; m as in `find_anchors`.

    Returns
    -------
    The subset, each weighted by M_d / ceil(fraction · M_d), so that a weighted sum over it is an unbiased estimate of
    the sum over all anchors; and [B, m] where in ``anchors`` each was. ``fraction=1`` keeps all, in order, with
    weight 1.
    """
    used = anchors.valid[..., 0]
    number = used.sum(1)
    keep = torch.ceil(number * fraction).long()
    uniform = parallel.draw(lambda rows, columns: torch.rand(rows, columns, generator=generator), *used.shape)
    rank = moved(uniform, used.device).masked_fill(~used, 2.0).argsort(1).argsort(1)
    chosen = rank < keep[:, None]
    place = torch.argsort(~chosen, dim=1, stable=True)[:, : columns or max(1, int(keep.max()))]
    real = chosen.gather(1, place)
    weight = real * (number / keep.clamp(min=1))[:, None]
    valid = anchors.valid.gather(1, place[..., None].expand(-1, -1, anchors.valid.shape[2])) & real[..., None]
    return Anchors(anchors.index.gather(1, place), valid, weight), place
