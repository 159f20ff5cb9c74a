"""`block` drafters: a whole block of tokens from one forward pass, the way out that the paper points at (DFlash drafts like this).

A block of b slots stands at positions t+1 … t+b. Slot 0 holds x_{t+1}, all others one learned MASK embedding. Attention is
bidirectional inside the block and sees the target's state at s ≤ t; mask slot j predicts x_{t+1+j}, which is draft step k = j - 1:

    t = 4, b = 4    x0 x1 x2 x3 x4 | x5  M  M  M        slot        0   1   2   3
                    target state     0   1  2  3        predicts    -   x6  x7  x8
                                                        draft step      0   1   2

Blocks of different anchors share the target's state and nothing else, so that many of one document run in one pass: the prefix part of
the attention by a fused kernel under a mask that only says s ≤ t, the b × b part of each block on its own, both merged by their
log-sum-exps (`attention.chain_attention`, to which a slot is one more query head). No mask over pairs of slots is ever made.

Rows of M blocks lie slot by slot, [B, b · M, d]: slot 0 of all blocks, then slot 1, and so on.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ..errors import StudyError
from ..features.spec import Features, FeatureSpec
from .attention import chain_attention, prefix_mask
from .config import DrafterConfig
from .layers import Entries, HiddenLayer, KVFusion, PrefixAttention, PrefixSource, View


class BlockLayer(nn.Module):
    """A pre-norm decoder layer over the slots of a block and the target's state.

    ``block_context`` says what its prefix entries s ≤ t are made from: ``kv`` the target's projected KV (`layers.KVFusion`), ``hidden``
    the fused hidden states, normed and sent through the layer's own key and value maps (as DFlash does; its norm is shared by all
    layers, ours is each layer's own), ``both`` the entries of both, side by side in one softmax.
    """

    reads_state = False  # no state is fed back: there is no second pass

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        self.attention_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.fusion = KVFusion(sizes, spec, config) if config.block_context != "hidden" else None
        over_hidden = config.block_context != "kv"
        self.context_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps) if over_hidden else None
        groups = self.fusion.groups if self.fusion else sizes.num_key_value_heads
        self.attention = PrefixAttention(sizes, sizes.hidden_size, groups)
        self.mlp = LlamaMLP(sizes)

    def prefix(self, source: PrefixSource) -> dict[str, Entries]:
        """Entries s from target state at s, keys with the RoPE of s: ``cross`` projected KV, ``state`` projected hidden states."""
        entries = {}
        if self.fusion:
            entries["cross"] = self.fusion(source.features, source.rotary)
        if self.context_norm:
            context = self.context_norm(source.state)
            entries["state"] = tuple(self.attention.project(context, source.rotary, "k", "v"))
        return entries

    def forward(self, rows: Tensor, rotary: Entries, view: View, slots: int) -> Tensor:
        """[B, b · M, d] -> [B, b · M, d]; rotary of every row."""
        return self.finish(rows, self.attend(self.attention_norm(rows), rotary, view, slots))

    def attend(self, inputs: Tensor, rotary: Entries, view: View, slots: int) -> Tensor:
        """Every slot attends to the prefix of its anchor and to all slots of its block: [B, b · M, d] -> [B, b · M, d]"""
        query, *own = self.attention.project(inputs, rotary, "q", "k", "v")  # [B, heads, b · M, D]
        block = tuple(part.unflatten(2, (slots, -1)).transpose(2, 3) for part in own)  # [B, G, M, b, D]
        prefix = tuple(torch.cat(parts, 2) for parts in zip(*view.prefix.values(), strict=True))
        mask = view.mask.repeat(1, 1, 1, len(view.prefix))
        heads = chain_attention(query.unflatten(2, (slots, -1)).flatten(1, 2), prefix, mask, block)  # [B, H · b, M, D]
        return self.attention.merge(heads.unflatten(1, (-1, slots)).flatten(2, 3))

    finish = HiddenLayer.finish


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
    """The blocks of some anchors [B, M] of a batch -> outputs of draft steps 0 … K-1, [B, K, M, d], before the final norm.

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
    mask = prefix_mask(drafter.visible(anchors), last)
    views = [View(layer, mask, {}, True) for layer in entries]
    tokens = features.tokens.gather(1, (anchors + 1).clamp(max=last))
    return run_blocks(drafter, tokens, anchors + 1, views)[:, 1 : draft_length + 1]
