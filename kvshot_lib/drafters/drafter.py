"""The drafters: `hidden` (EAGLE-3), `kv` (KV reuse), `hybrid` (both, behind a gate), `block` (all steps at once).

All share the target's sizes, embedding and LM head (frozen, over a draft vocabulary) and one way of
running: `prefix` turns target state into keys and values once, `step` advances any set of anchors by one
draft step. Training, evaluation and decoding call these two; draft step k at anchor t reads token
x_{t+1+k} at RoPE position t+1+k:

    t = 4:   x0 x1 x2 x3 x4 | x5 x6 x7      prefix entries made from target state at s = 0 … 4
    step 0   input x5, predicts x6          step 1   input x6, predicts x7

`kv` reads target keys at their own positions s. `hidden` makes its prefix entry s from (f_s, x_{s+1}), at
position s+1; its own step-0 entry is therefore entry s = t of the prefix, and its chain starts at step 1.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from ..features.spec import Features, FeatureSpec
from ..target.load import Target
from ..target.shared import capped, rope_parameters, shared_parts
from .attention import Entries, prefix_mask
from .config import DrafterConfig
from .context import PrefixSource, start_from_target, start_gains
from .layers import COMPILED, View, compiled, make_layers


class Drafter(nn.Module):
    """A drafter bound to one target (by its sizes and hash) and one draft vocabulary.

    Parameters
    ----------
    draft_ids : [V_draft] int64, sorted target token ids that it can draft.
    embedding : [V, d] the target's token embedding, its scale included, and ``head`` [V_draft, d] its
        LM-head rows; frozen, not saved with the drafter.
    logit_cap : of the target's logits, and so of the drafter's (`Target.logit_cap`).
    """

    def __init__(
        self, config: DrafterConfig, spec: FeatureSpec, sizes: LlamaConfig, draft_ids: Tensor, embedding: Tensor,
        head: Tensor, logit_cap: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.config, self.spec, self.sizes, self.logit_cap = config, spec, sizes, logit_cap
        for name, frozen in (("draft_ids", draft_ids), ("embedding", embedding), ("head", head)):
            self.register_buffer(name, frozen.detach(), persistent=False)
        to_draft = torch.full((len(embedding),), -1)
        to_draft[draft_ids] = torch.arange(len(draft_ids))
        self.register_buffer("to_draft", to_draft, persistent=False)  # [V] place in the draft vocabulary, -1 outside
        self.rotary = LlamaRotaryEmbedding(sizes)
        if config.fuses_hidden:
            norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
            self.hidden_norm = norm if config.hidden_norm else nn.Identity()
            self.fuse_hidden = nn.Linear(len(spec.hidden_layers) * sizes.hidden_size, sizes.hidden_size, bias=False)
        self.layers = make_layers(sizes, spec, config)
        self.norm = LlamaRMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        if config.paradigm == "block":
            self.mask_embedding = nn.Parameter(embedding.float().std() * torch.randn(sizes.hidden_size))
        self.compiled = False

    def compile_steps(self) -> "Drafter":
        """Fuse `layers.COMPILED` and the loss with torch.compile: a minute once, then faster on a GPU."""
        for module in self.layers.modules():
            for name in COMPILED:
                if hasattr(module, name):
                    setattr(module, name, compiled(getattr(module, name)))
        self.compiled = True  # and so will the loss be
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of `Features` that its prefix is made from."""
        return self.config.reads

    def prefix(
        self, features: Features, first: int | Tensor = 0, past: Sequence[dict[str, Entries]] = ()
    ) -> tuple[list[dict[str, Entries]], Tensor | None]:
        """Turn target state into what every anchor's attention shares.

        Decoding extends its entries: features of x_first … x_{first+n-1} give those of s = first … first+n-2.
        ``past`` are then the entries of s < first, for layers whose entries are made from the layer below; or, where
        ``first`` is [] int64, rooms for more than those, into which theirs are written.

        Returns
        -------
        Per layer, branch -> entries [B, G, n-1, D] of s = 0 … n-2 (the last token has no successor to
        draft from); and g [B, n-1, d], the fused hidden states (None for a drafter that reads none).
        """
        columns = features.tokens.shape[1] - 1
        cut = {name: getattr(features, name)[:, :columns] for name in self.reads}
        embedding = self.embed(features.tokens)
        positions = first + torch.arange(columns + 1, device=embedding.device)[None]
        cos, sin = self.rotary(embedding, positions)
        here, fused = slice(columns), None
        if self.config.fuses_hidden:
            fused = self.fuse_hidden(self.hidden_norm(cut["hidden_states"]).flatten(2))
        read = slice(1, columns + 1) if self.layers[0].reads_state else here
        source = PrefixSource(
            features=replace(features, **cut), rotary=(cos[:, here], sin[:, here]), fused=fused,
            token=embedding[:, read], token_rotary=(cos[:, read], sin[:, read]),
            stream=fused if self.layers[0].reads_state else embedding[:, here],
        )  # fmt: skip
        entries: list[dict[str, Entries]] = []
        for index, layer in enumerate(self.layers):
            entries.append(layer.prefix(source))
            if layer.own_prefix and index + 1 < len(self.layers):
                whole = joined(past[index], entries[-1], first) if past else entries[-1]
                source = replace(source, stream=layer.columns(source, whole, first, self.config.window_tokens))
        return entries, fused

    def visible(self, anchors: Tensor) -> Tensor:
        """How many prefix entries each anchor [B, M] sees: s ≤ t, or s ≤ t - lag, but one at least."""
        lag = self.config.kv_lag_tokens if self.config.kv_control == "lagged" else 0
        return (anchors + 1 - lag).clamp(min=1)

    def mask(self, anchors: Tensor, length: int, lag: Tensor | None = None) -> Tensor:
        """Additive mask [B, 1, M, length] of what anchors [B, M] see; ``lag`` [B] hides the newest entries but one."""
        visible = self.visible(anchors)
        visible = visible if lag is None else (visible - lag[:, None]).clamp(min=1)
        return prefix_mask(visible, length, self.config.window_tokens)

    def step(self, tokens: Tensor, positions: Tensor, state: Tensor | None, views: list[View]) -> Tensor:
        """One draft step of every anchor.

        Parameters
        ----------
        tokens, positions : [B, M] x_{t+1+k} and its position t+1+k, per anchor t.
        state : [B, M, d] g_t at k = 0, the last step's :meth:`feedback` afterwards; ignored by `kv`.
        views : one per layer; their chains grow by the anchors' own entries.

        Returns
        -------
        [B, M, d], the output before the final norm.
        """
        embedding = self.embed(tokens)
        rotary = self.rotary(embedding, positions)
        out = state if self.layers[0].reads_state else embedding
        for layer, view in zip(self.layers, views, strict=True):
            out, view.chains = layer(embedding, out, rotary, view)
        return out

    def asked(self, features: Features, places: Tensor, anchors: Tensor) -> Tensor | None:
        """What queries at ``places`` [B, M] are made from where it isn't the layer's own input: [B, M, width].

        With ``query_from="target"`` the target's inputs of the read layers at t+1+k, each normed without gains: its
        true query of layer l is a linear map of the l-th, so what `q_proj` can make of them holds every true query.
        With ``query_from="anchor"`` those at the ``anchors`` t [B, M], behind the token's embedding.
        """
        if self.config.query_from == "own":
            return None
        if self.config.query_from == "constant":
            return self.norm.weight.new_ones(*places.shape, 1)
        anchored = self.config.query_from == "anchor"
        documents = torch.arange(len(places), device=places.device)[:, None]
        states = features.hidden_states[documents, anchors if anchored else places]  # [B, M, S, d]
        if anchored:
            token = self.embed(features.tokens.gather(1, places)).to(states.dtype)
            states = torch.cat([token[:, :, None], states], 2)
        return nn.functional.rms_norm(states, states.shape[-1:]).flatten(2)

    def feedback(self, output: Tensor) -> Tensor:
        """State for the next draft step, from this step's output."""
        return self.norm(output) if self.config.feedback == "post_norm" else output

    def embed(self, tokens: Tensor) -> Tensor:
        """[…] ids -> […, d] the target's embeddings, in the drafter's dtype."""
        return nn.functional.embedding(tokens, self.embedding).to(self.norm.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, d] after the final norm -> […, V_draft], formed as the target forms its own."""
        return capped(hidden.to(self.head.dtype) @ self.head.T, self.logit_cap)

    def description(self) -> dict:
        """Config and target, as saved beside the weights."""
        return {"config": asdict(self.config), "spec": asdict(self.spec)}


def joined(past: dict[str, Entries], new: dict[str, Entries], first: int | Tensor) -> dict[str, Entries]:
    """Earlier entries and new ones of one layer, by branch; in the earlier ones' room if ``first`` is a tensor."""
    if isinstance(first, Tensor):
        for name, pair in new.items():
            for room, own in zip(past[name], pair, strict=True):
                room.index_copy_(2, first + torch.arange(own.shape[2], device=own.device), own)
        return past
    return {name: tuple(torch.cat(pair, 2) for pair in zip(past[name], new[name], strict=True)) for name in new}


def drafter_sizes(source: PretrainedConfig, spec: FeatureSpec) -> LlamaConfig:
    """Width, heads, MLP and RoPE of a drafter's layers: those of the target's config ``source``."""
    return LlamaConfig(
        hidden_size=source.hidden_size, intermediate_size=source.intermediate_size, head_dim=spec.head_dim,
        num_attention_heads=source.num_attention_heads, num_key_value_heads=source.num_key_value_heads,
        rms_norm_eps=source.rms_norm_eps, rope_parameters=rope_parameters(source), hidden_act="silu",
        max_position_embeddings=source.max_position_embeddings,
    )  # fmt: skip


def build_drafter(
    config: DrafterConfig, target: Target, spec: FeatureSpec, draft_ids: Tensor, *, seed: int = 0
) -> Drafter:
    """A fresh drafter in float32 on the target's device; equal seeds give equal weights on any device.

    Raises
    ------
    StudyError : a target whose embedding, logits, last norm or RoPE the drafters don't imitate
        (`shared`).
    """
    draft_ids = draft_ids.to(target.device)
    shared, sizes = shared_parts(target, draft_ids), drafter_sizes(target.config, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drafter = Drafter(
            config, spec, sizes, draft_ids.cpu(), shared.embedding.cpu(), shared.head.cpu(), shared.logit_cap
        )
        for module in drafter.modules():
            if isinstance(module, nn.Linear) and module is not getattr(drafter.layers[0], "gate", None):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    with torch.no_grad():
        gains = shared.norm
        if config.norm_init == "unit":
            gains = torch.ones_like(gains) if config.feedback == "post_norm" else gains
            gains = gains / (shared.head.float() * gains).square().sum(-1).mean().sqrt()
        drafter.norm.weight.copy_(gains)
        if config.kv_init == "target":
            start_from_target(drafter, target)
        if config.state_gains == "target":
            start_gains(drafter, target)
    return drafter.to(target.device)


def in_dtype(drafter: Drafter, dtype: torch.dtype) -> Drafter:
    """The drafter's weights in ``dtype``; RoPE's frequencies stay exact."""
    exact = {name: buffer.clone() for name, buffer in drafter.rotary.named_buffers()}
    drafter.to(dtype)
    for name, buffer in exact.items():
        setattr(drafter.rotary, name, buffer)
    return drafter
