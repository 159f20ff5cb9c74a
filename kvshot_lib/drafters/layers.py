"""The drafters' decoder layers: `hidden` (EAGLE-3), `kv` (KV-only reuse) and `hybrid` (both, behind a gate).

A layer has two entry points: ``prefix`` turns target state into keys and values once, ``forward`` advances any set of anchors by
one draft step. A branch is an attention with keys and values of its own: ``self`` over entries made from hidden states, ``cross``
over the target's projected KV.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from ..errors import StudyError
from ..features.spec import Features, FeatureSpec
from .attention import chain_attention
from .config import DrafterConfig

Entries = tuple[Tensor, Tensor]
"""Keys and values, each [B, G, entries, D]."""


class PrefixAttention(nn.Module):
    """Attention over prefix entries and an anchor's own chain, with its projections.

    ``width`` is what q, k and v read, ``groups`` the number of KV heads, ``grad_scale`` multiplies the gradient of k_proj and v_proj.
    """

    def __init__(self, sizes: LlamaConfig, width: int, groups: int, grad_scale: float = 1.0):
        super().__init__()
        heads, self.head_dim = sizes.num_attention_heads, sizes.head_dim
        if heads % groups:
            raise StudyError(f"{heads} query heads can't share {groups} KV heads evenly; choose kv_fusion='linear'")
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, sizes.hidden_size, bias=False)
        if grad_scale != 1:
            for linear in (self.k_proj, self.v_proj):
                linear.weight.register_hook(lambda gradient: gradient * grad_scale)

    def project(self, inputs: Tensor, rotary: Entries, *names: str) -> list[Tensor]:
        """[B, M, width] -> for each of ``q``, ``k``, ``v``: [B, heads, M, D], queries and keys rotated."""
        out = []
        for name in names:
            heads = getattr(self, f"{name}_proj")(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            out.append(heads if name == "v" else rotated(heads, rotary))
        return out

    def forward(
        self, inputs: Tensor, rotary: Entries, prefix: Entries, mask: Tensor, chain: Entries | None, append: bool
    ) -> tuple[Tensor, Entries | None]:
        """[B, M, width] -> [B, M, d], and the chain [B, G, M, J, D]; with ``append`` the anchors' own entries join it first."""
        if append:
            query, *own = self.project(inputs, rotary, "q", "k", "v")
            chain = extend(chain, own)
        else:
            (query,) = self.project(inputs, rotary, "q")
        return self.merge(chain_attention(query, prefix, mask, chain)), chain

    def merge(self, heads: Tensor) -> Tensor:
        """[B, H, M, D] -> [B, M, d]"""
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def extend(chain: Entries | None, own: list[Tensor]) -> Entries:
    """[B, G, M, J, D] and one more entry each, [B, G, M, D] -> [B, G, M, J+1, D]"""
    own = tuple(part.unsqueeze(3) for part in own)
    return own if chain is None else tuple(torch.cat(pair, dim=3) for pair in zip(chain, own, strict=True))


class KVFusion(nn.Module):
    """Target state at positions s -> keys and values of one drafter layer (``kv_fusion``, ``kv_rope``, ``kv_control``, ``kv_with_hidden``)."""

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        self.config, self.head_dim = config, spec.head_dim
        width, reused = spec.num_kv_heads * spec.head_dim, len(spec.kv_layers)
        self.groups = spec.num_kv_heads * (reused if config.kv_fusion == "heads" else 1)
        from_hidden, states = config.kv_control == "from_hidden", len(spec.hidden_layers) * spec.hidden_size
        if from_hidden or config.kv_with_hidden:  # a few of their channels are hundreds of times the others
            self.norm = LlamaRMSNorm(spec.hidden_size, sizes.rms_norm_eps)
        for name in ("keys", "values"):
            setattr(self, name, _fusion(config.kv_fusion, states if from_hidden else reused * width, width))
            if config.kv_with_hidden:
                setattr(self, f"hidden_{name}", nn.Linear(states, width, bias=False))

    def forward(self, features: Features, rotary: Entries) -> Entries:
        """[B, n, S, G, D] of S layers, rotary at s = 0 … n-1 -> [B, G', n, D] each; keys have the RoPE of their position."""
        if self.config.kv_control == "from_hidden":
            return self.of_hidden(features.hidden_states, rotary, self.keys, self.values)
        cached = self.of_cache(features.keys, features.values, rotary)
        if not self.config.kv_with_hidden:
            return cached
        made = self.of_hidden(features.hidden_states, rotary, self.hidden_keys, self.hidden_values)
        return cached[0] + made[0], cached[1] + made[1]

    def of_hidden(self, states: Tensor, rotary: Entries, keys: nn.Module, values: nn.Module) -> Entries:
        """[B, n, S, d] through two maps -> [B, G, n, D] each"""
        read = self.norm(states).flatten(2)
        return rotated(self.heads(keys(read)), rotary), self.heads(values(read))

    def of_cache(self, keys: Tensor, values: Tensor, rotary: Entries) -> Entries:
        """[B, n, S, G, D] of keys and values -> [B, G', n, D] each"""
        if self.config.kv_control == "zero":
            keys, values = torch.zeros_like(keys), torch.zeros_like(values)
        if self.config.kv_rope == "raw":
            return self.heads(self.keys(keys.flatten(2))), self.heads(self.values(values.flatten(2)))
        cos, sin = rotary
        stacked = keys.flatten(2, 3).transpose(1, 2)  # RoPE by the opposite angle takes it off
        plain = rotated(stacked, (cos, -sin)) / (cos**2 + sin**2)[:, None]
        fused = self.heads(self.keys(plain.transpose(1, 2).flatten(2).to(keys.dtype)))
        return rotated(fused, rotary), self.heads(self.values(values.flatten(2)))

    def heads(self, flat: Tensor) -> Tensor:
        """[B, n, G' · D] -> [B, G', n, D]"""
        return flat.unflatten(-1, (self.groups, self.head_dim)).transpose(1, 2)


def _fusion(kind: str, read: int, width: int) -> nn.Module:
    """Map of the reused layers' entries, end to end, to one layer's."""
    if kind == "heads":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(read, width, bias=False)
    return nn.Sequential(nn.Linear(read, read, bias=False), nn.SiLU(), nn.Linear(read, width, bias=False))


def rotated(heads: Tensor, rotary: Entries) -> Tensor:
    """RoPE: [B, heads, n, D], rotary [B, n, D] each -> the same, in the dtype of ``heads``."""
    return apply_rotary_pos_emb(heads, heads, *rotary)[0].to(heads.dtype)


@dataclass
class View:
    """What one layer sees at one draft step: its prefix entries, the mask over them, and the anchors' chains so far.

    prefix : branch -> keys and values [B, G, n-1, D]. mask : [B, 1, M, n-1].
    chains : branch -> keys and values [B, G, M, J, D] of the anchors' own entries; empty before the first.
    first : draft step 0.
    lagged_mask : what branches over the target's KV see instead, in a training that lags it; None: the same.
    cross_alone : a hybrid's output is its cross branch alone, as if its gate were 1.
    """

    prefix: dict[str, Entries]
    mask: Tensor
    chains: dict[str, Entries]
    first: bool
    lagged_mask: Tensor | None = None
    cross_alone: bool = False

    @property
    def kv_mask(self) -> Tensor:
        """The mask over entries of the target's KV."""
        return self.mask if self.lagged_mask is None else self.lagged_mask


class HiddenLayer(nn.Module):
    """EAGLE-3's layer: attention reads [norm(embedding); norm(state)], the residual stream is the state."""

    reads_state = True

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        for name in ("embedding_norm", "state_norm", "mlp_norm"):
            setattr(self, name, LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps))
        self.attention = PrefixAttention(sizes, 2 * sizes.hidden_size, sizes.num_key_value_heads)
        self.mlp = LlamaMLP(sizes)

    def read(self, embedding: Tensor, state: Tensor) -> Tensor:
        """[B, M, d] twice -> [B, M, 2d]"""
        return torch.cat([self.embedding_norm(embedding), self.state_norm(state)], -1)

    def prefix(self, source: "PrefixSource") -> dict[str, Entries]:
        """Entries of columns s: keys and values of step 0, from (x_{s+1}, f_s)."""
        inputs = self.read(source.next_embedding, source.state)
        return {"self": tuple(self.attention.project(inputs, source.next_rotary, "k", "v"))}

    def attend(self, inputs: Tensor, rotary: Entries, view: View) -> tuple[Tensor, dict[str, Entries]]:
        """The state path: at step 0 the own entry is the prefix's last visible one, so nothing is appended."""
        out, chain = self.attention(
            inputs, rotary, view.prefix["self"], view.mask, view.chains.get("self"), append=not view.first
        )
        return out, {} if chain is None else {"self": chain}

    def forward(
        self, embedding: Tensor, state: Tensor, rotary: Entries, view: View
    ) -> tuple[Tensor, dict[str, Entries]]:
        """[B, M, d] embeddings and state -> the layer's output [B, M, d] and the longer chains."""
        attended, chains = self.attend(self.read(embedding, state), rotary, view)
        return self.finish(state, attended), chains

    def finish(self, state: Tensor, attended: Tensor) -> Tensor:
        """Residual and MLP, [B, M, d] twice -> [B, M, d]"""
        state = state + attended
        return state + self.mlp(self.mlp_norm(state))


class HybridLayer(HiddenLayer):
    """`hidden` plus cross-attention over the target's KV, fused by a gate: s + g ⊙ (c - s), our reading of the gated delta.

    With ``cross_only`` the output is c, and neither self-attention nor gate exists.
    """

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__(sizes, spec, config)
        self.fusion, self.gate_floor = KVFusion(sizes, spec, config), config.gate_floor
        self.cross = PrefixAttention(sizes, 2 * sizes.hidden_size, self.fusion.groups, config.kv_grad_scale)
        if config.cross_only:
            self.attention = self.gate = None
        else:
            self.gate = nn.Linear(2 * sizes.hidden_size, sizes.hidden_size)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, config.gate_bias)

    def prefix(self, source: "PrefixSource") -> dict[str, Entries]:
        own = {} if self.attention is None else super().prefix(source)
        return {**own, "cross": self.fusion(source.features, source.rotary)}

    def attend(self, inputs: Tensor, rotary: Entries, view: View) -> tuple[Tensor, dict[str, Entries]]:
        cross, chain = self.cross(
            inputs, rotary, view.prefix["cross"], view.kv_mask, view.chains.get("cross"), append=True
        )
        if self.attention is None or view.cross_alone:
            return cross, {"cross": chain}
        own, chains = super().attend(inputs, rotary, view)
        return self.mix(inputs, own, cross), {**chains, "cross": chain}

    def mix(self, inputs: Tensor, own: Tensor, cross: Tensor) -> Tensor:
        """The gated delta s + g ⊙ (c - s), g = sigmoid(W u + b) or more: [B, M, 2d], [B, M, d] twice -> [B, M, d]"""
        gate = torch.sigmoid(self.gate(inputs))
        if self.gate_floor:
            gate = self.gate_floor + (1 - self.gate_floor) * gate
        return own + gate * (cross - own)


class KVLayer(nn.Module):
    """A pre-norm decoder layer whose prefix is the target's projected KV; it reads tokens alone, no target hidden state."""

    reads_state = False

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        self.attention_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.fusion = None if config.kv_control == "none" else KVFusion(sizes, spec, config)
        groups = self.fusion.groups if self.fusion else sizes.num_key_value_heads
        self.attention = PrefixAttention(sizes, sizes.hidden_size, groups, config.kv_grad_scale)
        self.mlp = LlamaMLP(sizes)

    def prefix(self, source: "PrefixSource") -> dict[str, Entries]:
        """Entries s: projected target KV of position s; without target state the layer's own, from x_s."""
        if self.fusion:
            return {"cross": self.fusion(source.features, source.rotary)}
        inputs = self.attention_norm(source.embedding)
        return {"cross": tuple(self.attention.project(inputs, source.rotary, "k", "v"))}

    def forward(
        self, embedding: Tensor, state: Tensor, rotary: Entries, view: View
    ) -> tuple[Tensor, dict[str, Entries]]:
        """State [B, M, d] (the embedding, in the first layer) -> the layer's output [B, M, d] and the longer chain."""
        attended, chain = self.attention(
            self.attention_norm(state),
            rotary,
            view.prefix["cross"],
            view.kv_mask,
            view.chains.get("cross"),
            append=True,
        )
        return self.finish(state, attended), {"cross": chain}

    finish = HiddenLayer.finish


COMPILED = ("read", "project", "merge", "mix", "finish")
"""Methods of layers and their attention that hold the small operations; torch.compile fuses each (`Drafter.compile_steps`)."""

LAYERS = {"hidden": HiddenLayer, "hybrid": HybridLayer, "kv": KVLayer}


@dataclass(frozen=True)
class PrefixSource:
    """What layers make prefix entries s = 0 … n-2 from: target state, and both tokens that meet there.

    ``embedding`` [B, n-1, d] and ``rotary`` are of x_s at s, ``next_embedding`` and ``next_rotary`` of x_{s+1} at s+1;
    ``state`` [B, n-1, d] the fused hidden states, None for drafters without.
    """

    features: Features
    embedding: Tensor
    next_embedding: Tensor
    rotary: Entries
    next_rotary: Entries
    state: Tensor | None
