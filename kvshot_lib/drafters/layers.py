"""The drafters' decoder layers: over hidden states (EAGLE-3), the stream alone, both behind a gate, and blocks.

A layer has two entry points: ``prefix`` makes the keys and values that all anchors share, once;
``forward`` advances any set of anchors by one draft step. A branch is an attention with keys and values
of its own: ``self`` over entries made from hidden states, ``cross`` over the target's mapped KV.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ..features.spec import FeatureSpec
from .attention import Entries, PrefixAttention, chain_attention
from .config import DrafterConfig
from .context import Fusion, PrefixSource


@dataclass
class View:
    """What one layer sees at one draft step: its prefix entries, the mask over them, and the anchors' chains so far.

    prefix : branch -> keys and values [B, G, n-1, D]. mask : [B, 1, M, n-1].
    chains : branch -> keys and values [B, G, M, J, D] of the anchors' own entries; empty at first.
    first : draft step 0.
    lagged_mask : what branches over the target's KV see instead, in a training that lags it (None: the same).
    cross_alone : a hybrid's output is its cross branch alone, as if its gate were 1.
    asked : [B, M, width] what queries are made from instead of the layer's own input (`DrafterConfig.query_from`).
    """

    prefix: dict[str, Entries]
    mask: Tensor
    chains: dict[str, Entries]
    first: bool
    lagged_mask: Tensor | None = None
    cross_alone: bool = False
    asked: Tensor | None = None

    @property
    def kv_mask(self) -> Tensor:
        """The mask over entries of the target's KV."""
        return self.mask if self.lagged_mask is None else self.lagged_mask


class DecoderLayer(nn.Module):
    """Attention, then an MLP, each added to the stream.

    reads_state : a fed-back state is part of its input. Then a column of the prefix is (f_s, x_{s+1}),
        and its entry at s = t is that of the anchor's step 0, which therefore appends none of its own.
    own_prefix : its prefix entries are its own keys and values of the columns, so that what the next
        layer's are made from is its output there.
    branch : what its chain and entries are called.
    """

    reads_state = False
    own_prefix = False
    branch = "self"

    def inputs(self, embedding: Tensor, state: Tensor) -> Tensor:
        """What its attention reads, of embeddings and stream [B, M, d] each."""
        return self.attention_norm(state)

    def prefix(self, source: PrefixSource) -> dict[str, Entries]:
        """Entries of columns s: the layer's own keys and values there."""
        inputs = self.inputs(source.token, source.stream)
        return {self.branch: tuple(self.attention.project(inputs, source.token_rotary, "k", "v"))}

    def columns(self, source: PrefixSource, entries: dict[str, Entries], first: int | Tensor, window: int) -> Tensor:
        """The layer's output at the columns themselves, [B, n-1, d]: what the next layer's entries are made from."""
        inputs = self.inputs(source.token, source.stream)
        attended = self.attention.columns(inputs, source.token_rotary, entries[self.branch], first, window)
        return self.finish(source.stream, attended)

    def forward(
        self, embedding: Tensor, state: Tensor, rotary: Entries, view: View
    ) -> tuple[Tensor, dict[str, Entries]]:
        """[B, M, d] embeddings and stream -> the layer's output [B, M, d] and the longer chains."""
        attended, chains = self.attend(self.inputs(embedding, state), rotary, view)
        return self.finish(state, attended), chains

    def attend(self, inputs: Tensor, rotary: Entries, view: View) -> tuple[Tensor, dict[str, Entries]]:
        """Over prefix and chain; where a state is read, step 0's own entry is the prefix's last visible one."""
        mask, append = (view.mask, not view.first) if self.reads_state else (view.kv_mask, True)
        return _attend(self.attention, self.branch, inputs, rotary, view, mask, append)

    def finish(self, stream: Tensor, attended: Tensor) -> Tensor:
        """Residual and MLP, [B, M, d] twice -> [B, M, d]"""
        stream = stream + attended
        return stream + self.mlp(self.mlp_norm(stream))


class HiddenLayer(DecoderLayer):
    """EAGLE-3's layer: attention reads [norm(embedding); norm(state)], the stream is the state."""

    reads_state = True
    own_prefix = True

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        for name in ("embedding_norm", "state_norm", "mlp_norm"):
            setattr(self, name, LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps))
        width, groups = 2 * sizes.hidden_size, sizes.num_key_value_heads
        self.attention = PrefixAttention(sizes, width, groups, qk_norm=config.qk_norm)
        self.mlp = LlamaMLP(sizes)

    def inputs(self, embedding: Tensor, state: Tensor) -> Tensor:
        return self.read(embedding, state)

    def read(self, embedding: Tensor, state: Tensor) -> Tensor:
        """[B, M, d] twice -> [B, M, 2d]"""
        return torch.cat([self.embedding_norm(embedding), self.state_norm(state)], -1)


class HybridLayer(HiddenLayer):
    """`hidden` plus cross-attention over the target's KV behind a gate: s + g ⊙ (c - s), the gated delta as we read it.

    With ``cross_only`` the output is c, and neither self-attention nor gate exists.
    """

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__(sizes, spec, config)
        self.fusion, self.gate_floor = Fusion(sizes, spec, config), config.gate_floor
        self.cross = PrefixAttention(sizes, 2 * sizes.hidden_size, self.fusion.groups, config.kv_grad_scale)
        if config.cross_only:
            self.attention = self.gate = None
        else:
            self.gate = nn.Linear(2 * sizes.hidden_size, sizes.hidden_size)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, config.gate_bias)

    def prefix(self, source: PrefixSource) -> dict[str, Entries]:
        own = {} if self.attention is None else super().prefix(source)
        return {**own, "cross": self.fusion(source.features, source.rotary)}

    def attend(self, inputs: Tensor, rotary: Entries, view: View) -> tuple[Tensor, dict[str, Entries]]:
        cross, chains = _attend(self.cross, "cross", inputs, rotary, view, view.kv_mask, append=True)
        if self.attention is None or view.cross_alone:
            return cross, chains
        own, longer = super().attend(inputs, rotary, view)
        return self.mix(inputs, own, cross), {**longer, **chains}

    def mix(self, inputs: Tensor, own: Tensor, cross: Tensor) -> Tensor:
        """The gated delta s + g ⊙ (c - s), g = sigmoid(W u + b) or more: [B, M, 2d], [B, M, d] twice -> [B, M, d]"""
        gate = torch.sigmoid(self.gate(inputs))
        if self.gate_floor:
            gate = self.gate_floor + (1 - self.gate_floor) * gate
        return own + gate * (cross - own)


class PlainLayer(DecoderLayer):
    """A pre-norm decoder layer over the stream alone.

    In `kv` its prefix entries are made from target state, or, with ``kv_control="none"``, from the stream
    at the columns. In `hidden` it stands after the first layer, and they are made from that one's output.
    """

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        self.reads_state = config.paradigm == "hidden"
        self.own_prefix = self.reads_state or config.kv_control == "none"
        self.branch = "self" if self.reads_state else "cross"
        self.attention_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        made = config.reads_kv or config.kv_control == "from_hidden"
        self.fusion = Fusion(sizes, spec, config) if made else None
        if config.paradigm == "block" and config.fuses_hidden:
            self.context_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        groups = self.fusion.groups if self.fusion else sizes.num_key_value_heads
        read = len(spec.hidden_layers)
        asked = {"own": 0, "constant": 1, "target": read * sizes.hidden_size, "anchor": (read + 1) * sizes.hidden_size}
        given = config.kv_grad_scale, config.qk_norm, asked[config.query_from]
        self.attention = PrefixAttention(sizes, sizes.hidden_size, groups, *given)
        self.mlp = LlamaMLP(sizes)

    def prefix(self, source: PrefixSource) -> dict[str, Entries]:
        """Entries s: mapped target state of position s, or the layer's own of column s."""
        if self.fusion:
            return {"cross": self.fusion(source.features, source.rotary, self.attention.k_norm)}
        return super().prefix(source)


class BlockLayer(PlainLayer):
    """A pre-norm decoder layer over the slots of a block and the target's state.

    ``block_context`` says what its prefix entries s ≤ t are made from: ``kv`` the target's mapped KV,
    ``hidden`` the fused hidden states, normed and sent through the layer's own key and value maps (as
    DFlash does; its norm is shared by all layers, ours is each layer's own), ``both`` the entries of
    both, side by side in one softmax.
    """

    def prefix(self, source: PrefixSource) -> dict[str, Entries]:
        """Entries s from target state at s: ``cross`` mapped KV, ``state`` mapped hidden states."""
        entries = super().prefix(source) if self.fusion else {}
        if hasattr(self, "context_norm"):
            context = self.context_norm(source.fused)
            entries["state"] = tuple(self.attention.project(context, source.rotary, "k", "v"))
        return entries

    def forward(self, rows: Tensor, rotary: Entries, view: View, slots: int) -> Tensor:
        """[B, b · M, d] -> [B, b · M, d]; rotary of every row."""
        return self.finish(rows, self.attend(self.attention_norm(rows), rotary, view, slots))

    def attend(self, inputs: Tensor, rotary: Entries, view: View, slots: int) -> Tensor:
        """Every slot over the prefix of its anchor and all slots of its block: [B, b · M, d] -> [B, b · M, d]"""
        query, *own = self.attention.project(inputs, rotary, "q", "k", "v")  # [B, heads, b · M, D]
        block = tuple(part.unflatten(2, (slots, -1)).transpose(2, 3) for part in own)  # [B, G, M, b, D]
        prefix = tuple(torch.cat(parts, 2) for parts in zip(*view.prefix.values(), strict=True))
        mask = view.mask.repeat(1, 1, 1, len(view.prefix))
        query = query.unflatten(2, (slots, -1)).flatten(1, 2)  # a slot is one more query head
        heads = chain_attention(query, prefix, mask, block)  # [B, H · b, M, D]
        return self.attention.merge(heads.unflatten(1, (-1, slots)).flatten(2, 3))


def _attend(
    attention: PrefixAttention, branch: str, inputs: Tensor, rotary: Entries, view: View, mask: Tensor, append: bool
) -> tuple[Tensor, dict[str, Entries]]:
    """One branch at one draft step -> its output [B, M, d], and its chain if there is one by now."""
    chain = view.chains.get(branch)
    out, chain = attention(inputs, rotary, view.prefix[branch], mask, chain, append, view.asked)
    return out, {} if chain is None else {branch: chain}


COMPILED = ("read", "project", "merge", "mix", "finish")
"""What `Drafter.compile_steps` fuses: methods of layers and attention with small operations between matrix products."""

LAYERS = {
    "hidden": (HiddenLayer, PlainLayer), "kv": (PlainLayer, PlainLayer), "hybrid": (HybridLayer, HybridLayer),
    "block": (BlockLayer, BlockLayer),
}  # fmt: skip


def compiled(function: Callable) -> Callable:
    """The same by torch.compile, for any shapes: training, validation, evaluation, drafters and plans have others."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


def make_layers(sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig) -> nn.ModuleList:
    """The drafter's ``num_layers`` layers; the first may be another kind than the rest."""
    first, rest = LAYERS[config.paradigm]
    return nn.ModuleList((rest if index else first)(sizes, spec, config) for index in range(config.num_layers))
