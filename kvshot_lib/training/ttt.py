"""Training-time test: run a drafter on its own state over ground-truth tokens, K draft steps from every anchor.

For `kv` and `block` there is no third thing between TTT and block-wise training. A `block` drafter's K = block_size -
1 steps come from one pass. `kv` feeds no state back, so K steps of TTT from an anchor *are* a block of K
teacher-forced tokens under causal attention, with gradients through every draft-side key and value: training it
block-wise "in the causal sense" is TTT with ``anchor_fraction=1``, to the last gradient (a test holds it to one pass
with an explicit causal mask). What can differ is how many anchors later steps run on (``anchor_fraction``), their
weights (``step_decay``) and their number (``ttt_steps``).
"""

from collections.abc import Iterator

from torch import Tensor

from ..drafters.attention import Entries
from ..drafters.block import draft_blocks
from ..drafters.drafter import Drafter
from ..drafters.layers import View
from ..features.spec import Features
from .anchors import Anchors


def draft_steps(
    drafter: Drafter, features: Features, anchors: Anchors, ttt_steps: int,
    subset: tuple[Anchors, Tensor] | None = None, *, kv_lag: Tensor | None = None, cross_alone: bool = False,
) -> Iterator[tuple[int, Anchors, Tensor]]:  # fmt: skip
    """Run K draft steps from every anchor; inputs are the ground-truth tokens, only the drafter's state is its own.

    Parameters
    ----------
    subset : from :func:`~anchors.sample_anchors`: steps k ≥ 1 run on it alone, for chains of different anchors share
        nothing but the prefix. A `block` drafter runs on it at every step: they are one pass.
    kv_lag : [B] hides the newest entries of the target's KV, so many a document.
    cross_alone : run a hybrid as if its gate were 1.

    Yields
    ------
    k, the anchors of this step, and the drafter's output [B, M, d] before its final norm.
    """
    if drafter.config.paradigm == "block":
        anchors = anchors if subset is None else subset[0]
        outputs = draft_blocks(drafter, features, anchors.index, ttt_steps)
        yield from ((k, anchors, outputs[:, k]) for k in range(ttt_steps))
        return
    prefix, fused = drafter.prefix(features)
    last = features.tokens.shape[1] - 1
    state = None if fused is None else _at(fused, anchors.index)
    masks = _masks(drafter, anchors, last, kv_lag)
    views = [View(entries, masks[0], {}, True, masks[1], cross_alone) for entries in prefix]
    for k in range(ttt_steps):
        if k == 1 and subset is not None:
            anchors, place = subset
            state = None if fused is None else _at(state, place)
            masks = _masks(drafter, anchors, last, kv_lag)
            for view in views:
                view.mask, view.lagged_mask = masks
                view.chains = {branch: _chains_at(chain, place) for branch, chain in view.chains.items()}
        places = (anchors.index + 1 + k).clamp(max=last)
        asked = drafter.asked(features, places, anchors.index)
        for view in views:
            view.first, view.asked = k == 0, asked
        output = drafter.step(features.tokens.gather(1, places), places, state, views)
        yield k, anchors, output
        state = drafter.feedback(output)


def _masks(drafter: Drafter, anchors: Anchors, length: int, kv_lag: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Masks over the prefix, and over the target's KV if that lags behind (one entry stays)."""
    lagged = None if kv_lag is None else drafter.mask(anchors.index, length, kv_lag)
    return drafter.mask(anchors.index, length), lagged


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """[B, n, d] at [B, M] -> [B, M, d]"""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def _chains_at(chain: Entries, place: Tensor) -> Entries:
    """Chain entries [B, G, M, J, D] of the anchors at ``place`` [B, m]."""
    groups, entries, size = (chain[0].shape[axis] for axis in (1, 3, 4))
    index = place[:, None, :, None, None].expand(-1, groups, -1, entries, size)
    return chain[0].gather(2, index), chain[1].gather(2, index)
