"""Small things that several tests use: tiny targets, documents with awkward answer spans, and every kind of drafter."""

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.load import load_target
from kvshot_lib.text.corpus import Document
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.ttt import draft_steps

STEPS = 7
DRAFT_IDS = torch.arange(512)[torch.arange(512) % 5 != 3]  # a fifth of the target's tokens can't be drafted

VARIANTS = {
    "hidden": DrafterConfig("hidden"),
    "hidden_post_norm": DrafterConfig("hidden", feedback="post_norm"),
    "kv_1": DrafterConfig("kv", 1),
    "kv_2": DrafterConfig("kv", 2),
    "hidden_normed": DrafterConfig("hidden", hidden_norm=True),
    "hybrid": DrafterConfig("hybrid"),
    "hybrid_post_norm": DrafterConfig("hybrid", feedback="post_norm", gate_bias=-0.5),
    "cross_only": DrafterConfig("hybrid", cross_only=True),
    "kv_2_mlp": DrafterConfig("kv", 2, kv_fusion="mlp"),
    "kv_1_unrotate": DrafterConfig("kv", kv_rope="unrotate"),
    "none_1": DrafterConfig("kv", kv_control="none"),
    "kv_1_zero": DrafterConfig("kv", kv_control="zero"),
    "kv_2_windowed": DrafterConfig("kv", 2, window_tokens=4),
    "kv_2_lagged": DrafterConfig("kv", 2, kv_control="lagged", kv_lag_tokens=2),
    "states_2": DrafterConfig("kv", 2, kv_control="from_hidden"),
    "both_2": DrafterConfig("kv", 2, kv_with_hidden=True),
    "kv_1_with_hidden_unrotate": DrafterConfig("kv", kv_rope="unrotate", kv_with_hidden=True),
    "kv_1_grad50": DrafterConfig("kv", kv_grad_scale=50.0),
    "none_2": DrafterConfig("kv", 2, kv_control="none"),
    "hidden_31_3": DrafterConfig("hidden", 3, feedback="post_norm", hidden_norm=True),
    "hidden_2_qk_norm": DrafterConfig("hidden", 2, qk_norm=True),
    "kv_2_normed": DrafterConfig("kv", 2, kv_rope="unrotate", kv_norm=True, qk_norm=True),
    "states_1_qk_norm": DrafterConfig("kv", kv_control="from_hidden", qk_norm=True),
    "both_1_normed": DrafterConfig("kv", kv_rope="unrotate", kv_norm=True, kv_with_hidden=True),
}


@cache
def target(name: str = "tiny-llama"):
    return load_target(name, device="cpu", dtype="float32")


@cache
def default_target():
    """SmolLM2 itself, loaded once a process; no test changes it."""
    return load_target(device="cpu", dtype="float32")


def document(mask: str, seed: int = 0) -> Document:
    """Random tokens with an answer mask written as digits, ``0001111``."""
    tokens = np.random.default_rng([seed, len(mask)]).integers(3, 512, len(mask)).astype(np.int32)
    return Document(tokens, np.array([digit == "1" for digit in mask]))


DOCUMENTS = [
    document("000111111111"),  # to the last token
    document("0011100111111111100"),  # two spans, and a tail
    document("00100000110"),  # a span too short to count, one anchor with one step
    document("0000000"),  # no answer at all
    document("011111111111111"),
]


def live_of(*documents: Document, name: str = "tiny-llama") -> LiveFeatures:
    return LiveFeatures(target(name), documents, feature_spec(target(name)))


@cache
def live(name: str = "tiny-llama") -> LiveFeatures:
    return live_of(*DOCUMENTS, name=name)


@cache
def features(name: str = "tiny-llama", documents: tuple[int, ...] = tuple(range(len(DOCUMENTS))), length: int = 99):
    """Some of the documents in one batch, at most ``length`` tokens of each."""
    batch = live(name).batch(documents)
    return replace(batch, **{n: t[:, :length] for n, t in vars(batch).items() if n != "documents"})


def drafter(variant: str, name: str = "tiny-llama", draft_ids=DRAFT_IDS):
    """A drafter whose norms, gate and biases are random too, so that a mistake in any of them shows."""
    return roughened(build_drafter(VARIANTS[variant], target(name), live(name).spec, draft_ids, seed=1))


def roughened(built):
    """Random norms, gate and biases instead of the ones that drafters start from."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if built.config.paradigm == "hybrid" and not built.config.cross_only:
            built.layers[0].gate.weight.normal_(0, 0.1, generator=generator)
    return built


@torch.no_grad()
def target_layer_as_drafter(name: str = "tiny-llama"):
    """A one-layer `kv` drafter that is the target's last layer: same weights, and its own layer's KV picked as the prefix."""
    built = build_drafter(DrafterConfig("kv", 1), target(name), live(name).spec, DRAFT_IDS)
    (layer,), source = built.layers, target(name).model.get_decoder().layers[-1]
    for linear in (layer.fusion.keys, layer.fusion.values):
        linear.weight.zero_()
        linear.weight[:, -linear.out_features :] = torch.eye(linear.out_features)
    copy_layer(layer, source)
    return built


@torch.no_grad()
def copy_layer(layer, source) -> None:
    """Weights of one of the target's layers into a plain layer of a drafter's."""
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer.attention, part).weight.copy_(getattr(source.self_attn, part).weight)
    layer.mlp.load_state_dict(source.mlp.state_dict())
    layer.attention_norm.load_state_dict(source.input_layernorm.state_dict())
    layer.mlp_norm.load_state_dict(source.post_attention_layernorm.state_dict())


def logits_by_pair(built, features, steps=STEPS, anchors=None):
    """{(document, anchor, step): logits} of every valid pair, from the code that trains."""
    anchors = anchors or find_anchors(features.answer_mask, steps)
    found = {}
    for k, current, output in draft_steps(built, features, anchors, steps):
        logits = built.norm(output) @ built.head.T
        for document, row in current.valid[..., k].nonzero().tolist():
            found[document, int(current.index[document, row]), k] = logits[document, row]
    return found
