"""How `block` drafters run: a whole block of tokens from one forward pass (DFlash drafts like this).

A block of b slots stands at positions t+1 … t+b. Slot 0 holds x_{t+1}, all others one learned MASK
embedding. Attention is bidirectional inside the block and sees the target's state at s ≤ t; mask slot j
predicts x_{t+1+j}, draft step k = j - 1:

    t = 4, b = 4    x0 x1 x2 x3 x4 | x5  M  M  M        slot        0   1   2   3
                    target state     0   1  2  3        predicts    -   x6  x7  x8
                                                        draft step      0   1   2

Blocks of different anchors share the target's state and nothing else, so that many of one document run in
one pass: the prefix part of the attention by a fused kernel under a mask that only says s ≤ t, the b × b
part of each block on its own, both merged by their log-sum-exps (`attention.chain_attention`). No mask
over pairs of slots is ever made.

Rows of M blocks lie slot by slot, [B, b · M, d]: slot 0 of all blocks, then slot 1, and so on.
"""

import torch
from torch import Tensor

from ..errors import StudyError
from ..features.spec import Features
from .layers import View


def run_blocks(drafter, tokens: Tensor, positions: Tensor, views: list[View]) -> Tensor:
    """One forward pass over the blocks of M anchors.

    Parameters
    ----------
    tokens, positions : [B, M] x_{t+1} and its position t+1, per anchor t.
    views : one per layer, with the prefix entries and the mask over them.

    Returns
    -------
    [B, b, M, d], the output of every slot before the final norm.
    """
    slots = drafter.config.block_size
    known = drafter.embed(tokens)[:, None]  # [B, 1, M, d]
    masked = drafter.mask_embedding.to(known.dtype).expand(len(tokens), slots - 1, tokens.shape[1], -1)
    rows = torch.cat([known, masked], 1).flatten(1, 2)
    places = (positions[:, None] + torch.arange(slots, device=positions.device)[:, None]).flatten(1)
    rotary = drafter.rotary(rows, places)
    for layer, view in zip(drafter.layers, views, strict=True):
        rows = layer(rows, rotary, view, slots)
    return rows.unflatten(1, (slots, -1))


def draft_blocks(drafter, features: Features, anchors: Tensor, draft_length: int) -> Tensor:
    """The blocks of anchors [B, M] -> outputs of draft steps 0 … K-1, [B, K, M, d], before the final norm.

    Raises
    ------
    StudyError : more draft steps than a block has mask slots.
    """
    if draft_length >= drafter.config.block_size:
        most = drafter.config.block_size - 1
        raise StudyError(
            f"a block of {most + 1} slots drafts {most} tokens, not {draft_length}; ask for {most} or fewer"
        )
    entries, _ = drafter.prefix(features)
    last = features.tokens.shape[1] - 1
    mask = drafter.mask(anchors, last)
    views = [View(layer, mask, {}, True) for layer in entries]
    tokens = features.tokens.gather(1, (anchors + 1).clamp(max=last))
    return run_blocks(drafter, tokens, anchors + 1, views)[:, 1 : draft_length + 1]
