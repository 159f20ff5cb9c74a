"""What a drafter's prefix entries are made from: the target's cache, its hidden states, both, or neither.

At position s the target leaves its cached key and value in some layers and the hidden states of some
others. A linear map of these is a prefix entry: a key with the RoPE of its position, and a value:

    cache    keys and values of the reused layers end to end    k_s = W_k [k_s^1; k_s^2; …]    (raw)
                                                                k_s = R_s W_k [R_s⁻¹ k_s^1; …] (unrotate)
    states   hidden states of some layers, each normed          k_s = R_s W_k [norm f_s^1; norm f_s^2; …]
    both     the sum of both
    neither  the drafter's own: of a token x_s, or of (f_s, x_{s+1}) as EAGLE has it (`layers`)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..errors import StudyError
from ..features.shuffled import ShuffledKV
from ..features.spec import Features, FeatureSpec, check_origin, feature_spec
from ..target.load import Target
from ..target.shared import norm_gain
from .attention import Entries, rotated
from .config import DrafterConfig


@dataclass(frozen=True)
class PrefixSource:
    """What layers make prefix entries of columns s = 0 … n-2 from.

    features : target state of positions s. rotary : RoPE of s, for entries made from it.
    fused : [B, n-1, d] the fused hidden states g_s; None for a drafter without.
    token : [B, n-1, d] embedding of the token that a column of the drafter's own belongs to: x_{s+1}
        where it is read beside g_s, else x_s; ``token_rotary`` : RoPE of that token's position.
    stream : [B, n-1, d] what enters the next layer at these columns.
    """

    features: Features
    rotary: Entries
    fused: Tensor | None
    token: Tensor
    token_rotary: Entries
    stream: Tensor


class Fusion(nn.Module):
    """Target state at positions s -> prefix entries of one drafter layer, by maps of its own.

    ``keys`` and ``values`` map the cache (hidden states with ``kv_control="from_hidden"``); with
    ``kv_with_hidden`` the maps ``hidden_keys`` and ``hidden_values`` of hidden states are added.
    """

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        self.config, self.head_dim = config, spec.head_dim
        width, reused = spec.num_kv_heads * spec.head_dim, len(spec.kv_layers)
        self.groups = spec.num_kv_heads * (reused if config.kv_fusion == "heads" else 1)
        from_states, states = config.kv_control == "from_hidden", len(spec.hidden_layers) * spec.hidden_size
        if from_states or config.kv_with_hidden:  # a few of their channels are hundreds of times the others
            self.norm = LlamaRMSNorm(spec.hidden_size, sizes.rms_norm_eps)
            if config.state_gains == "target":
                self.norm.weight = nn.Parameter(torch.ones(len(spec.hidden_layers), spec.hidden_size))
        for name in ("keys", "values"):
            setattr(self, name, _map(config.kv_fusion, states if from_states else reused * width, width))
            if config.kv_with_hidden:
                setattr(self, f"hidden_{name}", nn.Linear(states, width, bias=False))
            if config.kv_norm:
                setattr(self, f"{name}_norm", LlamaRMSNorm(width, sizes.rms_norm_eps))

    def forward(self, features: Features, rotary: Entries, key_norm: nn.Module | None = None) -> Entries:
        """State [B, n, S, …] of S target layers, RoPE of its positions, a key norm -> [B, G', n, D] each."""
        if self.config.kv_control == "from_hidden":
            return self.of_states(features.hidden_states, rotary, self.keys, self.values, key_norm)
        cached = self.of_cache(features.keys, features.values, rotary, key_norm)
        if not self.config.kv_with_hidden:
            return cached
        made = self.of_states(features.hidden_states, rotary, self.hidden_keys, self.hidden_values)
        return cached[0] + made[0], cached[1] + made[1]

    def of_states(
        self, states: Tensor, rotary: Entries, keys: nn.Module, values: nn.Module, key_norm: nn.Module | None = None
    ) -> Entries:
        """[B, n, S, d] through two maps -> [B, G, n, D] each"""
        read = self.norm(states).flatten(2)
        return rotated(self.heads(keys(read)), rotary, key_norm), self.heads(values(read))

    def of_cache(self, keys: Tensor, values: Tensor, rotary: Entries, key_norm: nn.Module | None) -> Entries:
        """[B, n, S, G, D] of keys and values -> [B, G', n, D] each"""
        if self.config.kv_control == "zero":
            keys, values = torch.zeros_like(keys), torch.zeros_like(values)
        mapped = self.heads(self.values(self.end_to_end(values, "values")))
        if self.config.kv_rope == "raw":
            return self.heads(self.keys(self.end_to_end(keys, "keys"))), mapped
        plain = unrotated(keys, rotary)
        return rotated(self.heads(self.keys(self.end_to_end(plain, "keys"))), rotary, key_norm), mapped

    def end_to_end(self, entries: Tensor, name: str) -> Tensor:
        """[B, n, S, G, D] -> [B, n, S · G · D], each layer normed by itself with ``kv_norm``."""
        if self.config.kv_norm:
            entries = getattr(self, f"{name}_norm")(entries.flatten(3))
        return entries.flatten(2)

    def heads(self, flat: Tensor) -> Tensor:
        """[B, n, G' · D] -> [B, G', n, D]"""
        return flat.unflatten(-1, (self.groups, self.head_dim)).transpose(1, 2)


def _map(kind: str, read: int, width: int) -> nn.Module:
    """From what is read, end to end, to one layer's width."""
    if kind == "heads":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(read, width, bias=False)
    return nn.Sequential(nn.Linear(read, read, bias=False), nn.SiLU(), nn.Linear(read, width, bias=False))


def unrotated(keys: Tensor, rotary: Entries) -> Tensor:
    """Take RoPE off cached keys [B, n, S, G, D]: turn by the opposite angle, undo the scale that some RoPE has."""
    cos, sin = rotary
    stacked = keys.flatten(2, 3).transpose(1, 2)
    plain = rotated(stacked, (cos, -sin)) / (cos**2 + sin**2)[:, None]
    return plain.transpose(1, 2).unflatten(2, keys.shape[2:4]).to(keys.dtype)


def drafter_spec(config: DrafterConfig, target: Target) -> FeatureSpec:
    """What a drafter reads of a target."""
    spec = feature_spec(target, config.kv_layers)
    return replace(spec, hidden_layers=spec.kv_layers) if config.state_layers == "kv" else spec


def layers_read(config: DrafterConfig, spec: FeatureSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Target layers whose cache, and whose inputs, a drafter reads."""
    return spec.kv_layers * config.reads_kv, spec.hidden_layers * ("hidden_states" in config.reads)


def read_by(config: DrafterConfig, spec: FeatureSpec, source):
    """A source of features of the drafter's target as it reads them: its layers, another document's KV if shuffled."""
    check_origin(source.spec, spec, "the features were recorded")
    kv, hidden = layers_read(config, spec)
    source = source.with_layers(kv or None, hidden or None)
    return ShuffledKV(source) if config.kv_control == "shuffled" else source


@torch.no_grad()
def start_from_target(drafter, target: Target) -> None:
    """``kv_init="target"``: start each draft-side key and value map as the target's own, sent through the fusion.

    An entry of the target's at s reaches the drafter as F [W_1 h_1; W_2 h_2; …] of S reused layers, W_l
    the target's projection with its input norm's gains folded in, h_l its normed input, F the fusion. A
    draft token x has no h_l yet; its entry starts as F [W_1; W_2; …] norm(x): in the space of the prefix
    entries, on their scale, from the one input that there is. F is the fusion as drawn; with ``kv_fusion="heads"`` it
    is the identity. Of a `hybrid`'s map of [norm(embedding); norm(state)] the second half starts at zero. Biases and
    per-head norms of the target's projections (Qwen) are left out, for the drafters have neither.

    Raises
    ------
    StudyError : a target without separate key and value projections after an input norm.
    """
    stacked = {name: _projections(target, drafter.spec.kv_layers, name) for name in ("k_proj", "v_proj")}
    for layer in drafter.layers:
        attention = getattr(layer, "cross", layer.attention)
        for name, fuse in (("k_proj", layer.fusion.keys), ("v_proj", layer.fusion.values)):
            weight, start = getattr(attention, name).weight, stacked[name].to(drafter.norm.weight)
            weight.zero_()
            weight[:, : start.shape[1]] = fuse.weight @ start if hasattr(fuse, "weight") else start


@torch.no_grad()
def start_gains(drafter, target: Target) -> None:
    """``state_gains="target"``: hidden states are normed as the attention of their own layers norms them."""
    gains = torch.stack([_input_gains(target, index, "state_gains", "ones") for index in drafter.spec.hidden_layers])
    for layer in drafter.layers:
        layer.fusion.norm.weight.copy_(gains)


def _input_gains(target: Target, index: int, parameter: str, other: str) -> Tensor:
    """[d]: what the norm before a target layer's attention multiplies by."""
    if (norm := getattr(target.model.get_decoder().layers[index], "input_layernorm", None)) is None:
        needed = f"input_layernorm in the layers of target {target.name}"
        raise StudyError(f"{parameter}='target' needs {needed}; choose {other!r}")
    return norm_gain(norm, target.name)


def _projections(target: Target, layers: tuple[int, ...], name: str) -> Tensor:
    """[S · G · D, d] of the target's layers, end to end, each times its input norm's gains."""
    gains = [_input_gains(target, index, "kv_init", "random") for index in layers]
    maps = [getattr(target.model.get_decoder().layers[index].self_attn, name, None) for index in layers]
    if None in maps:
        raise StudyError(f"kv_init='target' needs {name} in the layers of target {target.name}; choose 'random'")
    return torch.cat([own.weight.float() * gain for own, gain in zip(maps, gains)])
