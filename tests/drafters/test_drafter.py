"""Drafters as built: sizes, starting weights, draft vocabulary, and configurations refused."""

import math
from dataclasses import fields
from typing import Literal, get_args, get_origin

import examples
import pytest
import torch
from examples import DRAFT_IDS, VARIANTS
from hypothesis import given
from hypothesis import strategies as st

from kvshot_lib.drafters.attention import prefix_mask
from kvshot_lib.drafters.context import drafter_spec
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.drafters.layers import View
from kvshot_lib.errors import StudyError
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import predict


def build(variant="hidden", name="tiny-llama", seed=0, **options):
    return build_drafter(
        VARIANTS[variant], examples.target(name), examples.live(name).spec, DRAFT_IDS, seed=seed, **options
    )


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_embedding_and_head_are_the_targets_and_frozen(variant, name):
    drafter, model = build(variant, name), examples.target(name).model
    assert torch.equal(drafter.embedding, model.get_input_embeddings().weight)
    assert torch.equal(drafter.head, model.get_output_embeddings().weight[DRAFT_IDS])
    assert not drafter.embedding.requires_grad and not drafter.head.requires_grad
    assert torch.equal(drafter.norm.weight, model.get_decoder().norm.weight)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in drafter.parameters())
    assert not any(name in drafter.state_dict() for name in ("embedding", "head", "draft_ids", "to_draft"))


def test_draft_vocabulary_maps_there_and_back():
    drafter = build()
    assert torch.equal(drafter.to_draft[drafter.draft_ids], torch.arange(len(DRAFT_IDS)))
    others = [token for token in range(512) if token not in set(DRAFT_IDS.tolist())]
    assert len(others) == 102 and (drafter.to_draft[others] == -1).all()


def test_parameters_by_hand():
    """Width d = 64, MLP 128, 4 query and 2 KV heads of 16, 3 reused layers (6 heads of 16 side by side)."""
    d, mlp, norms = 64, 3 * 64 * 128, 64
    wide = 2 * d * (64 + 32 + 32) + 64 * d  # attention that reads [embedding; state]
    narrow = d * (64 + 32 + 32) + 64 * d
    fusion = 2 * (3 * 32) * 32
    hidden = 3 * d * d + 3 * norms + wide + mlp + norms
    kv_layer = 2 * norms + fusion + narrow + mlp
    wanted = {
        "hidden": hidden, "hidden_post_norm": hidden, "kv_1": kv_layer + norms, "kv_2": 2 * kv_layer + norms,
        "hybrid": hidden + fusion + wide + 2 * d * d + d,
    }  # fmt: skip
    for variant, number in wanted.items():
        assert sum(p.numel() for p in build(variant).parameters()) == number, variant


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
def test_weights_are_a_function_of_the_seed(variant):
    torch.manual_seed(1)
    first = build(variant, seed=3).state_dict()
    torch.manual_seed(2)
    ambient = torch.random.get_rng_state()
    second, other = build(variant, seed=3).state_dict(), build(variant, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if first[name].dim() == 2 and "gate.weight" not in name]
    assert len(drawn) >= 8 and not any(torch.equal(first[name], other[name]) for name in drawn)
    assert torch.equal(torch.random.get_rng_state(), ambient)


@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_the_gate_starts_at_the_same_everywhere(bias):
    config = DrafterConfig("hybrid", gate_bias=bias)
    gate = build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS).layers[0].gate
    assert not gate.weight.any() and (gate.bias == bias).all()


@torch.no_grad()
def test_a_layer_started_from_the_target_is_the_targets_layer():
    """Fed the true input of target layer 3 at t+1, with the target's own KV at s ≤ t, it returns that layer's output."""
    target, drafter, t = examples.target(), examples.target_layer_as_drafter(), 5
    features = examples.features(documents=(0,))
    plain = target.model(features.tokens, output_hidden_states=True)
    prefix, _ = drafter.prefix(features)
    mask = prefix_mask(torch.tensor([[t + 1]]), features.tokens.shape[1] - 1)
    state = plain.hidden_states[3][:, t + 1 : t + 2]
    rotary = drafter.rotary(state, torch.tensor([[t + 1]]))
    out, _ = drafter.layers[0](None, state, rotary, View(prefix[0], mask, {}, True))
    assert torch.allclose(drafter.norm(out), plain.hidden_states[4][:, t + 1 : t + 2], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paradigm": "medusa"}, "paradigm='medusa' must be one of 'hidden', 'kv', 'hybrid'"),
        ({"paradigm": "kv", "kv_fusion": "sum"}, "kv_fusion='sum' must be one of 'linear', 'heads', 'mlp'"),
        ({"feedback": "norm"}, "feedback='norm' must be one of 'pre_norm', 'post_norm'"),
        (
            {"paradigm": "kv", "kv_control": "random"},
            "kv_control='random' must be one of '', 'none', 'zero'",
        ),
        ({"paradigm": "kv", "num_layers": 0}, "num_layers=0 must be above 0"),
        ({"paradigm": "kv", "kv_grad_scale": 0}, "kv_grad_scale=0 must be above 0"),
        ({"paradigm": "hybrid", "num_layers": 2}, "num_layers=2 means nothing to a hybrid drafter"),
        ({"paradigm": "hidden", "kv_fusion": "mlp"}, "kv_fusion='mlp' means nothing to a hidden drafter"),
        ({"kv_layers": (3, 6, 9)}, r"kv_layers=\(3, 6, 9\) means nothing to a hidden drafter over EAGLE's layers"),
        (
            {"paradigm": "kv", "feedback": "post_norm"},
            "feedback='post_norm' means nothing to a kv drafter; it takes num_",
        ),
        ({"paradigm": "hybrid", "kv_control": "zero"}, "kv_control='zero' means nothing to a hybrid drafter"),
        (
            {"paradigm": "kv", "kv_fusion": "heads", "kv_rope": "unrotate"},
            "kv_fusion='heads' contradicts kv_rope='unro",
        ),
        (
            {"paradigm": "kv", "kv_control": "none", "kv_norm": True},
            "kv_control='none' contradicts kv_norm=True; with it",
        ),
        ({"paradigm": "kv", "kv_norm": True, "kv_fusion": "heads"}, "kv_fusion='heads' contradicts kv_norm=True"),
        ({"paradigm": "kv", "kv_norm": True, "kv_init": "target"}, "kv_init='target' contradicts kv_norm=True"),
        ({"paradigm": "kv", "state_gains": "target"}, "means nothing without entries from hidden states"),
        ({"paradigm": "hidden", "kv_norm": True}, "kv_norm=True means nothing to a hidden drafter"),
        ({"paradigm": "kv", "state_layers": "kv"}, "state_layers='kv' means nothing without hidden states to read"),
        ({"paradigm": "block", "state_layers": "kv"}, "state_layers='kv' means nothing without hidden states to read"),
        ({"paradigm": "kv", "qk_norm": True}, "cached keys have theirs: set kv_rope='unrotate'"),
        (
            {"paradigm": "kv", "qk_norm": True, "kv_rope": "unrotate", "kv_with_hidden": True},
            "contradicts qk_norm=True",
        ),
        ({"paradigm": "hybrid", "qk_norm": True}, "qk_norm=True means nothing to a hybrid drafter"),
        ({"paradigm": "kv", "kv_layers": []}, r"kv_layers=\(\) must be above 0"),
        (
            {"paradigm": "kv", "kv_control": "from_hidden", "kv_fusion": "mlp"},
            "contradicts kv_fusion='mlp'; .* be 'linear'",
        ),
        (
            {"paradigm": "kv", "kv_with_hidden": True, "kv_control": "from_hidden"},
            "kv_with_hidden=True contradicts kv_control='from_hidden'",
        ),
        (
            {"paradigm": "kv", "kv_with_hidden": True, "kv_fusion": "heads"},
            "kv_with_hidden=True contradicts kv_fusion=",
        ),
        ({"paradigm": "hybrid", "kv_with_hidden": True}, "kv_with_hidden=True means nothing to a hybrid drafter"),
        ({"paradigm": "kv", "kv_lag_tokens": 8}, "kv_control='' contradicts kv_lag_tokens=8"),
        (
            {"paradigm": "kv", "query_from": "constant", "kv_control": "none", "num_layers": 2},
            "query_from='constant' contradicts kv_control='none'",
        ),
        ({"paradigm": "hybrid", "cross_only": True, "gate_bias": 1.0}, "cross_only=True contradicts gate_bias=1.0"),
    ],
)
def test_bad_configurations_are_refused_with_the_choices(options, message):
    with pytest.raises(StudyError, match=message):
        DrafterConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_norm": "False"}, "hidden_norm='False' must be True or False"),
        ({"hidden_norm": 1}, "hidden_norm=1 must be True or False"),
        ({"num_layers": True}, "num_layers=True must be a whole number"),
        ({"num_layers": 2.0}, "num_layers=2.0 must be a whole number"),
        ({"num_layers": "2"}, "num_layers='2' must be a whole number"),
        ({"paradigm": "hybrid", "gate_bias": math.nan}, "gate_bias=nan must be a finite number"),
        ({"paradigm": "kv", "kv_grad_scale": math.inf}, "kv_grad_scale=inf must be a finite number"),
        ({"paradigm": ["kv"]}, r"paradigm=\['kv'\] must be one of 'hidden', 'kv'"),
        ({"paradigm": "kv", "kv_layers": [1, 1]}, r"kv_layers=\(1, 1\) must name each target layer once"),
        (
            {"paradigm": "kv", "kv_layers": [-1, 2]},
            r"kv_layers=\(-1, 2\) must name each target layer once, counted from 0",
        ),
        ({"paradigm": "kv", "kv_layers": [1, "2"]}, "kv_layers=.* must be a whole number or a list"),
        ({"paradigm": "kv", "kv_layers": "3"}, "kv_layers='3' must be a whole number or a list"),
        ({"paradigm": "kv", "kv_layers": None}, "kv_layers=None must be"),
    ],
)
def test_values_of_another_type_or_without_meaning_are_refused(options, message):
    with pytest.raises(StudyError, match=message):
        DrafterConfig(**options)


KINDS = {field.name: field.type for field in fields(DrafterConfig)}
CHOICES = [choice for kind in KINDS.values() if get_origin(kind) is Literal for choice in get_args(kind)]
ANYTHING = st.one_of(
    st.sampled_from(CHOICES), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=3), st.none(),
    st.lists(st.one_of(st.integers(-1, 4), st.booleans()), max_size=3),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([*KINDS]), ANYTHING, max_size=4))
def test_whatever_is_given_is_one_line_or_what_the_annotations_say(values):
    try:
        config = DrafterConfig(**values)
    except StudyError as refused:
        assert "\n" not in str(refused) and any(name in str(refused) for name in KINDS)
        return
    assert type(config.hidden_norm) is bool and type(config.num_layers) is int and math.isfinite(config.gate_bias)
    assert config.paradigm in get_args(KINDS["paradigm"])
    named = config.kv_layers if isinstance(config.kv_layers, tuple) else ()
    assert all(type(layer) is int and layer >= 0 for layer in named) and len({*named}) == len(named)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_any_number_of_reused_layers_fits_any_number_of_drafter_layers(layers):
    spec = feature_spec(examples.target(), layers)
    for number in (1, 2, 5):
        config = DrafterConfig("kv", number)
        drafter = build_drafter(config, examples.target(), spec, DRAFT_IDS)
        assert len(drafter.layers) == number


def test_states_of_the_layers_whose_cache_is_read():
    """Two layers of four, 1 and 3; EAGLE's would be 0, 2 and 3. Layers may also be named."""
    own = {"paradigm": "kv", "kv_control": "from_hidden", "kv_layers": 2}
    assert drafter_spec(DrafterConfig(**own), examples.target()).hidden_layers == (0, 2, 3)
    same = DrafterConfig(**own, state_layers="kv")
    spec = drafter_spec(same, examples.target())
    assert spec.hidden_layers == spec.kv_layers == (1, 3)
    named = drafter_spec(DrafterConfig(**{**own, "kv_layers": [0, 1, 3]}, state_layers="kv"), examples.target())
    assert named.hidden_layers == named.kv_layers == (0, 1, 3)
    built = build_drafter(same, examples.target(), spec, DRAFT_IDS)
    assert built.layers[0].fusion.keys.in_features == 2 * 64


@torch.no_grad()
def test_a_drafter_without_target_state_that_is_the_target_is_perfect():
    """All of the target's layers as a causal model of the drafter's own: every draft is the target's, at every step."""
    target, everything = examples.target(), torch.arange(512)
    config = DrafterConfig("kv", target.num_layers, kv_control="none")
    built = build_drafter(config, target, examples.live().spec, everything)
    for layer, source in zip(built.layers, target.model.get_decoder().layers, strict=True):
        examples.copy_layer(layer, source)
    features = examples.features(documents=(0, 1, 4))
    anchors = find_anchors(features.answer_mask, 7)
    drafted = predict(built, features, anchors, 7)
    compared = 0
    for document, row, step in anchors.valid.nonzero().tolist():
        place = int(anchors.index[document, row]) + 1 + step
        assert drafted[document, row, step] == features.target_argmax[document, place]
        compared += 1
    assert compared > 80
