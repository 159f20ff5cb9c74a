"""A target's verification on plain tensors: one forward over T tokens after a prefix of N, with nothing that decides anything on the way.

So it can be captured as a CUDA graph, and its time is that of its arithmetic and its memory, not of launching kernels from Python. For
Llama, Qwen3 and others of their kind (RMSNorm, RoPE, grouped-query attention, gated MLP without biases), and equal to them (tests).

Every query sees the whole prefix, so attention over it needs no mask: the R query heads of a KV head become rows of one product with its
keys, which are read once and never repeated, and the fused kernel splits a long prefix over the device. What the T tokens see of one
another is a small product beside it; both are merged by their log-sum-exps, as in `attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers import PreTrainedModel

from ..errors import StudyError


class Weights(NamedTuple):
    """One layer's; ``query_norm`` and ``key_norm`` are None where heads aren't normed."""

    attention_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def weights_of(layer: nn.Module) -> Weights:
    """The tensors of one of transformers' decoder layers, themselves and not copies."""
    attention, mlp = layer.self_attn, layer.mlp
    if any(isinstance(part, nn.Linear) and part.bias is not None for part in layer.modules()):
        raise StudyError(
            f"{type(layer).__name__} has biases, which the plain forward leaves out; take a Llama or Qwen3"
        )
    norms = [getattr(attention, name).weight if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    return Weights(
        layer.input_layernorm.weight, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, *norms,
        attention.o_proj.weight, layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
    )  # fmt: skip


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight.shape, weight, eps)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [T, H, D] heads, cos and sin [T, D]"""
    low, high = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


def heads_of(x: Tensor, w: Weights, cos: Tensor, sin: Tensor, size: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """[T, d] -> queries [H, T, D], keys and values [G, T, D]"""
    x = normed(x, w.attention_norm, eps)
    query, key, value = (linear(x, weight).unflatten(-1, (-1, size)) for weight in (w.query, w.key, w.value))
    if w.query_norm is not None:
        query, key = normed(query, w.query_norm, eps), normed(key, w.key_norm, eps)
    return tuple(part.transpose(0, 1) for part in (rotated(query, cos, sin), rotated(key, cos, sin), value))


def finished(x: Tensor, attended: Tensor, w: Weights, eps: float) -> Tensor:
    """Output projection, residual and MLP: [T, d], [T, H · D] -> [T, d]"""
    x = x + linear(attended, w.output)
    inner = normed(x, w.mlp_norm, eps)
    return x + linear(silu(linear(inner, w.gate)) * linear(inner, w.up), w.down)


def over_prefix(rows: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of [1, G, Q, D] rows over [1, G, N, D] without a mask -> output, and log-sum-exp [1, G, Q]."""
    if rows.device.type == "cuda":
        return torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values)[:2]
    if rows.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, values)
    scores = (rows @ keys.transpose(-1, -2)).float() * rows.shape[-1] ** -0.5
    return scores.softmax(-1).to(rows.dtype) @ values, scores.logsumexp(-1)


def merged(rows: Tensor, keys: Tensor, values: Tensor, unseen: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Join what rows [G, R · T, D] found in the prefix (out, lse) with what they see of the T new tokens [G, T, D].

    ``unseen`` [T, T] bool. Returns [T, H · D].
    """
    tokens = len(unseen)
    scores = (rows @ keys.transpose(-1, -2)).float() * rows.shape[-1] ** -0.5
    scores = scores.unflatten(1, (-1, tokens)).masked_fill(unseen, float("-inf")).flatten(1, 2)
    total = torch.logaddexp(lse, scores.logsumexp(-1))[..., None]
    found = out * (lse[..., None] - total).exp() + (scores - total).exp().to(rows.dtype) @ values
    return found.to(rows.dtype).unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1)


@dataclass(frozen=True)
class Kernels:
    """The functions above that hold many small operations, as they are or compiled."""

    heads_of: Callable = heads_of
    finished: Callable = finished
    merged: Callable = merged
    normed: Callable = normed

    def compiled(self) -> "Kernels":
        """Each fused by torch.compile, once for one token and once for any other number."""
        return Kernels(*(torch.compile(part) for part in (heads_of, finished, merged, normed)))


class PlainTarget:
    """A model's layers over caches that are given, for one shape of proposal.

    Parameters
    ----------
    prefix : per layer, keys and values [1, G, N + T, D], whose first N entries are the prefix; the T new ones are written behind them.
    positions : [T] RoPE positions. sees : [T, T] bool, which of the new tokens each sees (itself among them).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: list[tuple[Tensor, Tensor]],
        positions: Tensor,
        sees: Tensor,
        kernels: Kernels,
    ):
        decoder, config = model.get_decoder(), model.config
        self.layers = [weights_of(layer) for layer in decoder.layers]
        self.embedding, self.norm = model.get_input_embeddings().weight, decoder.norm.weight
        self.head, self.eps, self.kernels = model.get_output_embeddings().weight, config.rms_norm_eps, kernels
        self.size, self.prefix, self.unseen = prefix[0][0].shape[-1], prefix, ~sees
        cos, sin = decoder.rotary_emb(self.embedding[:1], positions[None])
        self.cos, self.sin = cos[0], sin[0]

    def __call__(self, tokens: Tensor) -> Tensor:
        """[T] ids -> logits [T, V]"""
        x, count = self.embedding[tokens], len(tokens)
        for w, (keys, values) in zip(self.layers, self.prefix, strict=True):
            query, key, value = self.kernels.heads_of(x, w, self.cos, self.sin, self.size, self.eps)
            keys[0, :, -count:], values[0, :, -count:] = key, value
            rows = query.unflatten(0, (len(key), -1)).flatten(1, 2)  # [G, R · T, D]
            out, lse = over_prefix(rows[None], keys[:, :, :-count], values[:, :, :-count])
            x = self.kernels.finished(
                x, self.kernels.merged(rows, key, value, self.unseen, out[0], lse[0]), w, self.eps
            )
        return linear(self.kernels.normed(x, self.norm, self.eps), self.head)
