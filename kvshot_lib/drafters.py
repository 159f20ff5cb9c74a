"""The drafters: `hidden` (EAGLE-3), `kv` (KV-only reuse) and `hybrid` (both, behind a gate).

All share the target's sizes, embedding and LM head (frozen, over a draft vocabulary) and one way of running: `prefix` turns target
state into keys and values once, `step` advances any set of anchors by one draft step. Training, evaluation and decoding call these
two; draft step k at anchor t reads token x_{t+1+k} at RoPE position t+1+k:

    t = 4:   x0 x1 x2 x3 x4 | x5 x6 x7      prefix entries made from target state at s = 0 … 4
    step 0   input x5, predicts x6          step 1   input x6, predicts x7

`kv` reads target keys at their own positions s. `hidden` makes its prefix entry s from (f_s, x_{s+1}), at position s+1; its own
step-0 entry is therefore entry s = t of the prefix, and its chain starts at step 1.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from .attention import chain_attention
from .errors import StudyError
from .features import Features, FeatureSpec
from .target import Target

PARADIGMS = ("hidden", "kv", "hybrid")
CHOICES = {"paradigm": PARADIGMS, "kv_fusion": ("linear",), "feedback": ("pre_norm", "post_norm")}

Entries = tuple[Tensor, Tensor]
"""Keys and values, each [B, G, entries, D]."""


@dataclass(frozen=True)
class DrafterConfig:
    """Everything that tells one drafter from another; sizes come from the target.

    paradigm : ``hidden``, ``kv`` or ``hybrid``.
    num_layers : decoder layers; 1 for ``hidden`` and ``hybrid``.
    kv_fusion : how the reused layers' KV become one layer's: ``linear`` (concatenate, one linear map).
    feedback : what ``hidden`` and ``hybrid`` feed back as state: ``pre_norm`` (EAGLE-3) or ``post_norm`` (EAGLE-3.1).
    gate_bias : initial bias of the hybrid's gate; the gate starts near sigmoid(gate_bias).
    """

    paradigm: str = "hidden"
    num_layers: int = 1
    kv_fusion: str = "linear"
    feedback: str = "pre_norm"
    gate_bias: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise StudyError(f"{name}={getattr(self, name)!r} is not known; choose from {', '.join(allowed)}")
        if self.num_layers < 1 or (self.paradigm != "kv" and self.num_layers != 1):
            raise StudyError(
                f"num_layers={self.num_layers} does not fit {self.paradigm}; kv takes 1 or more, hidden and hybrid take 1"
            )


class PrefixAttention(nn.Module):
    """Attention over prefix entries and an anchor's own chain, with its projections; ``width`` is what q, k and v read."""

    def __init__(self, sizes: LlamaConfig, width: int):
        super().__init__()
        heads, groups, self.head_dim = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, sizes.hidden_size, bias=False)

    def project(self, inputs: Tensor, rotary: Entries, *names: str) -> list[Tensor]:
        """[B, M, width] -> for each of ``q``, ``k``, ``v``: [B, heads, M, D], queries and keys rotated."""
        out = []
        for name in names:
            heads = getattr(self, f"{name}_proj")(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            out.append(heads if name == "v" else apply_rotary_pos_emb(heads, heads, *rotary)[0].to(heads.dtype))
        return out

    def forward(
        self,
        inputs: Tensor,
        rotary: Entries,
        prefix: Entries | None,
        mask: Tensor | None,
        chain: list[Entries],
        append: bool,
    ) -> Tensor:
        """[B, M, width] -> [B, M, d]. With ``append`` the anchors' own entries join ``chain`` (and are seen) first."""
        if append:
            query, key, value = self.project(inputs, rotary, "q", "k", "v")
            chain.append((key, value))
        else:
            (query,) = self.project(inputs, rotary, "q")
        own = tuple(torch.stack(part, dim=3) for part in zip(*chain, strict=True)) if chain else None
        out = chain_attention(query, prefix, mask, own)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LinearFusion(nn.Module):
    """KV of the reused layers -> keys and values of one drafter layer, by one linear map each (``kv_fusion="linear"``)."""

    def __init__(self, spec: FeatureSpec):
        super().__init__()
        width = spec.num_kv_heads * spec.head_dim
        self.keys = nn.Linear(len(spec.kv_layers) * width, width, bias=False)
        self.values = nn.Linear(len(spec.kv_layers) * width, width, bias=False)

    def forward(self, features: Features) -> Entries:
        """[B, n, S, G, D] keys and values of S layers -> [B, G, n, D] each; keys keep the RoPE of their position."""
        groups = features.keys.shape[3]
        pairs = ((self.keys, features.keys), (self.values, features.values))
        return tuple(linear(part.flatten(2)).unflatten(-1, (groups, -1)).transpose(1, 2) for linear, part in pairs)


class HiddenLayer(nn.Module):
    """EAGLE-3's layer: attention reads [norm(embedding); norm(state)], the residual stream is the state."""

    reads_state = True

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        for name in ("embedding_norm", "state_norm", "mlp_norm"):
            setattr(self, name, LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps))
        self.attention = PrefixAttention(sizes, 2 * sizes.hidden_size)
        self.mlp = LlamaMLP(sizes)

    def read(self, embedding: Tensor, state: Tensor) -> Tensor:
        """[B, M, d] twice -> [B, M, 2d]"""
        return torch.cat([self.embedding_norm(embedding), self.state_norm(state)], -1)

    def prefix(self, embedding: Tensor, state: Tensor, rotary: Entries, features: Features) -> dict[str, Entries]:
        """Entries of columns s: keys and values of step 0, from (x_{s+1}, f_s)."""
        return {"self": tuple(self.attention.project(self.read(embedding, state), rotary, "k", "v"))}

    def attend(self, inputs: Tensor, rotary: Entries, view: "View") -> Tensor:
        """The state path: at step 0 the own entry is the prefix's last visible one, so nothing is appended."""
        return self.attention(
            inputs, rotary, view.prefix["self"], view.mask, view.chain("self"), append=view.draft_step > 0
        )

    def forward(self, embedding: Tensor, state: Tensor, rotary: Entries, view: "View") -> Tensor:
        state = state + self.attend(self.read(embedding, state), rotary, view)
        return state + self.mlp(self.mlp_norm(state))


class HybridLayer(HiddenLayer):
    """`hidden` plus cross-attention over the target's KV, fused by a gate: s + g ⊙ (c - s), our reading of the gated delta."""

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__(sizes, spec, config)
        self.fusion = LinearFusion(spec)
        self.cross = PrefixAttention(sizes, 2 * sizes.hidden_size)
        self.gate = nn.Linear(2 * sizes.hidden_size, sizes.hidden_size)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, config.gate_bias)

    def prefix(self, embedding: Tensor, state: Tensor, rotary: Entries, features: Features) -> dict[str, Entries]:
        return {**super().prefix(embedding, state, rotary, features), "cross": self.fusion(features)}

    def attend(self, inputs: Tensor, rotary: Entries, view: "View") -> Tensor:
        own = super().attend(inputs, rotary, view)
        cross = self.cross(inputs, rotary, view.prefix["cross"], view.mask, view.chain("cross"), append=True)
        gate = torch.sigmoid(self.gate(inputs))
        return own + gate * (cross - own)


class KVLayer(nn.Module):
    """A pre-norm decoder layer whose prefix is the target's projected KV; it reads tokens alone, no target hidden state."""

    reads_state = False

    def __init__(self, sizes: LlamaConfig, spec: FeatureSpec, config: DrafterConfig):
        super().__init__()
        self.attention_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp_norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.fusion = LinearFusion(spec)
        self.attention = PrefixAttention(sizes, sizes.hidden_size)
        self.mlp = LlamaMLP(sizes)

    def prefix(
        self, embedding: Tensor, state: Tensor | None, rotary: Entries, features: Features
    ) -> dict[str, Entries]:
        """Entries s: projected target KV of position s."""
        return {"cross": self.fusion(features)}

    def forward(self, embedding: Tensor, state: Tensor, rotary: Entries, view: "View") -> Tensor:
        inputs = self.attention_norm(state)
        state = state + self.attention(
            inputs, rotary, view.prefix["cross"], view.mask, view.chain("cross"), append=True
        )
        return state + self.mlp(self.mlp_norm(state))


LAYERS = {"hidden": HiddenLayer, "hybrid": HybridLayer, "kv": KVLayer}


@dataclass
class View:
    """What one layer sees at one draft step: its prefix entries, the mask over them, and the chains of the anchors at hand."""

    prefix: dict[str, Entries]
    mask: Tensor
    chains: dict[str, list[Entries]]
    draft_step: int

    def chain(self, branch: str) -> list[Entries]:
        """The branch's chain so far: one (keys, values) pair [B, G, M, D] per entry; appending to it extends the chain."""
        return self.chains.setdefault(branch, [])


class Drafter(nn.Module):
    """A drafter bound to one target (by its sizes and hash) and one draft vocabulary.

    Parameters
    ----------
    draft_ids : [V_draft] int64, sorted target token ids that it can draft.
    embedding : [V, d] the target's token embedding, and ``head`` [V_draft, d] its LM-head rows; frozen, not saved with the drafter.
    """

    def __init__(
        self,
        config: DrafterConfig,
        spec: FeatureSpec,
        sizes: LlamaConfig,
        draft_ids: Tensor,
        embedding: Tensor,
        head: Tensor,
    ):
        super().__init__()
        self.config, self.spec, self.sizes = config, spec, sizes
        for name, frozen in (("draft_ids", draft_ids), ("embedding", embedding), ("head", head)):
            self.register_buffer(name, frozen.detach(), persistent=False)
        to_draft = torch.full((len(embedding),), -1)
        to_draft[draft_ids] = torch.arange(len(draft_ids))
        self.register_buffer("to_draft", to_draft, persistent=False)  # [V] place in the draft vocabulary, -1 outside
        self.rotary = LlamaRotaryEmbedding(sizes)
        layer = LAYERS[config.paradigm]
        if layer.reads_state:
            self.fuse_hidden = nn.Linear(len(spec.hidden_layers) * sizes.hidden_size, sizes.hidden_size, bias=False)
        self.layers = nn.ModuleList(layer(sizes, spec, config) for _ in range(config.num_layers))
        self.norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of `Features` that its prefix is made from."""
        return {"hidden": ("hidden_states",), "kv": ("keys", "values"), "hybrid": ("hidden_states", "keys", "values")}[
            self.config.paradigm
        ]

    def prefix(self, features: Features) -> tuple[list[dict[str, Entries]], Tensor | None]:
        """Turn target state into what every anchor's attention shares.

        Returns
        -------
        Per layer, branch -> entries [B, G, n-1, D] of s = 0 … n-2 (the last token has no successor to draft from);
        and g [B, n-1, d], the fused hidden states (None for `kv`).
        """
        columns = features.tokens.shape[1] - 1
        embedding = state = rotary = None
        if self.layers[0].reads_state:
            state = self.fuse_hidden(features.hidden_states[:, :columns].flatten(2))
            positions = torch.arange(1, columns + 1, device=state.device)[None]
            embedding, rotary = self.embed(features.tokens[:, 1:]), self.rotary(state, positions)
        entries = [layer.prefix(embedding, state, rotary, features) for layer in self.layers]
        cut = [
            {branch: (k[:, :, :columns], v[:, :, :columns]) for branch, (k, v) in layer.items()} for layer in entries
        ]
        return cut, state

    def step(self, tokens: Tensor, positions: Tensor, state: Tensor | None, views: list[View]) -> Tensor:
        """One draft step of every anchor.

        Parameters
        ----------
        tokens, positions : [B, M] x_{t+1+k} and its position t+1+k, per anchor t.
        state : [B, M, d] g_t at k = 0, the last step's :meth:`feedback` afterwards; ignored by `kv`.
        views : one per layer; the anchors' own entries are appended to their chains.

        Returns
        -------
        [B, M, d], the output before the final norm.
        """
        embedding = self.embed(tokens)
        rotary = self.rotary(embedding, positions)
        out = state if self.layers[0].reads_state else embedding
        for layer, view in zip(self.layers, views, strict=True):
            out = layer(embedding, out, rotary, view)
        return out

    def feedback(self, output: Tensor) -> Tensor:
        """State for the next draft step, from this step's output."""
        return self.norm(output) if self.config.feedback == "post_norm" else output

    def embed(self, tokens: Tensor) -> Tensor:
        """[…] ids -> […, d] the target's embeddings, in the drafter's dtype."""
        return nn.functional.embedding(tokens, self.embedding).to(self.norm.weight.dtype)

    def description(self) -> dict:
        """Config and target, as saved beside the weights."""
        return {"config": asdict(self.config), "spec": asdict(self.spec)}


def build_drafter(
    config: DrafterConfig, target: Target, spec: FeatureSpec, draft_ids: Tensor, *, seed: int = 0
) -> Drafter:
    """A fresh drafter in float32 on the target's device; equal seeds give equal weights on any device.

    Raises
    ------
    StudyError : the target scales its embeddings or caps its logits (Gemma), which the drafters don't imitate.
    """
    model, source = target.model, target.config
    if type(model.get_input_embeddings()) is not nn.Embedding or getattr(source, "final_logit_softcapping", None):
        raise StudyError(
            f"target {target.name} scales its embeddings or caps its logits: drafters don't; choose another target"
        )
    sizes = LlamaConfig(
        hidden_size=source.hidden_size, intermediate_size=source.intermediate_size, head_dim=spec.head_dim,
        num_attention_heads=source.num_attention_heads, num_key_value_heads=source.num_key_value_heads,
        rms_norm_eps=source.rms_norm_eps, rope_parameters=source.rope_parameters, hidden_act="silu",
        max_position_embeddings=source.max_position_embeddings,
    )  # fmt: skip
    draft_ids = draft_ids.to(target.device)
    frozen = model.get_input_embeddings().weight, model.get_output_embeddings().weight[draft_ids]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(config, spec, sizes, draft_ids.cpu(), *(tensor.cpu() for tensor in frozen))
        for module in drafter.modules():
            if isinstance(module, nn.Linear) and not (config.paradigm == "hybrid" and module is drafter.layers[0].gate):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    with torch.no_grad():
        drafter.norm.weight.copy_(model.get_decoder().norm.weight)
    return drafter.to(target.device)
