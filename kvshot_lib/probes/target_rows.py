"""Where the target itself looks: its attention rows, recomputed from its own queries and cached keys."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..drafters.attention import rotated
from ..drafters.hooks import watching
from ..errors import StudyError
from ..target.capture import attention_rows, capture
from ..target.load import Target


@dataclass(frozen=True)
class TargetState:
    """Queries [S, H, n, D] (after RoPE) and cached keys [S, G, n, D] of one document, for S layers, float32."""

    queries: Tensor
    keys: Tensor

    @property
    def length(self) -> int:
        """Tokens n of the document."""
        return self.queries.shape[2]

    def rows(self, place: int, positions: Tensor) -> Tensor:
        """The target's attention in layer number ``place`` of the S at some positions [M]: [H, M, n]."""
        return attention_rows(self.queries[place][None], self.keys[place][None], positions)[0]


@torch.no_grad()
def compute_state(target: Target, tokens: Tensor, layers: Sequence[int]) -> TargetState:
    """Run the target over tokens [n] and keep queries and keys of ``layers``."""
    with capture(target.model, kv=layers, queries=True) as taken:
        target.model.get_decoder()(input_ids=tokens[None].to(target.device), use_cache=False)
    return TargetState(
        *(torch.stack([part[layer][0] for layer in layers]).float() for part in (taken.queries, taken.keys))
    )


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """JS divergence of distributions over the last axis, nats: 0 for equal, ln 2 for disjoint ones (Lin 1991).

    Each is made to sum to 1 first; NaN where one has no mass. [..., N], [..., N] -> [...]
    """
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    mean = (a + b) / 2
    both = torch.special.xlogy(a, a / mean) + torch.special.xlogy(b, b / mean)
    return (both.nan_to_num(0).sum(-1) / 2).where(a.sum(-1).isfinite() & b.sum(-1).isfinite(), torch.nan)


@torch.no_grad()
def row_error(target: Target, layers: Sequence[int], tokens: Tensor) -> float:
    """Largest difference between outputs of recomputed rows and what enters the target's ``o_proj``; tokens [n]."""
    outputs, decoder = {}, target.model.get_decoder()

    def seen(layer, forward, entering):
        outputs[layer] = entering
        return forward(entering)

    projections = {layer: decoder.layers[layer].self_attn.o_proj for layer in layers}
    with capture(target.model, kv=layers, queries=True) as taken, watching(projections, "forward", seen):
        decoder(input_ids=tokens[None].to(target.device), use_cache=False)
    everywhere, worst = torch.arange(len(tokens), device=target.device), 0.0
    for layer in layers:
        weights = attention_rows(taken.queries[layer], taken.keys[layer], everywhere)
        values = taken.values[layer].repeat_interleave(weights.shape[1] // taken.values[layer].shape[1], dim=1)
        again = (weights @ values.float()).transpose(1, 2).flatten(2)
        worst = max(worst, float((again - outputs[layer].float()).abs().max()))
    return worst


def check_rows(target: Target, layers: Sequence[int], tokens: Tensor) -> None:
    """Refuse a target whose attention on some tokens [n] is not softmax(q k / √D).

    Raises
    ------
    StudyError : learned sinks, capped scores, gated outputs; a sliding window, whose rows don't cover the prefix.
    """
    try:
        error = row_error(target, layers, tokens)
    except (AttributeError, RuntimeError) as cause:
        raise StudyError(
            f"target {target.name}: its attention can't be recomputed ({cause}); choose another target"
        ) from cause
    if not error < 1e-3:
        raise StudyError(
            f"target {target.name}: attention recomputed from queries and keys differs from its own by {error:.2g} "
            f"in layers {list(layers)}, so its rows are not comparable; choose a target with plain softmax attention"
        )


def plain_queries(state: TargetState, rotary: LlamaRotaryEmbedding) -> Tensor:
    """True queries without RoPE, ``rotary`` being the target's, as every drafter has it: [n, S, H · D]."""
    cos, sin = rotary(state.queries, torch.arange(state.length, device=state.queries.device)[None])
    scale = rotary.attention_scaling**2
    return rotated(state.queries, (cos / scale, -sin / scale)).permute(2, 0, 1, 3).flatten(2)
