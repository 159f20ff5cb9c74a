"""What prefix entries are made from: the cache as it is, un-rotated or normed, and hidden states of chosen layers."""

from dataclasses import replace

import examples
import pytest
import sequential
import torch
from examples import DRAFT_IDS, STEPS

from kvshot_lib.drafters.config import DrafterConfig
from kvshot_lib.drafters.context import drafter_spec, read_by, unrotated
from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.ttt import draft_steps


def built(config, name="tiny-llama", documents=(0, 4)):
    """A drafter with random norms, and just the features that it reads."""
    target = examples.target(name)
    source = read_by(config, drafter_spec(config, target), examples.live(name))
    drafter = examples.roughened(build_drafter(config, target, source.spec, DRAFT_IDS, seed=1))
    return drafter, source.batch(documents)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize(
    "config",
    [
        DrafterConfig("kv", 2, kv_layers=1, kv_fusion="heads"),
        DrafterConfig("kv", 2, kv_layers=2, kv_control="from_hidden", state_layers="kv"),
        DrafterConfig("kv", kv_layers=2, kv_with_hidden=True, kv_rope="unrotate", kv_norm=True, state_layers="kv"),
        DrafterConfig("hidden", 2, feedback="post_norm", hidden_norm=True, state_layers="kv", qk_norm=True),
        DrafterConfig("kv", kv_layers=(0, 1), kv_rope="unrotate", kv_norm=True),
    ],
    ids=[
        "the target's own cache",
        "states of the same layers",
        "both of the same layers",
        "hidden of them",
        "named layers",
    ],
)
@torch.no_grad()
def test_drafts_equal_those_of_one_anchor_and_one_token_at_a_time(config, name):
    drafter, features = built(config, name)
    anchors, compared = find_anchors(features.answer_mask, STEPS), 0
    outputs = [drafter.norm(output) @ drafter.head.T for *_, output in draft_steps(drafter, features, anchors, STEPS)]
    for document, row in anchors.valid[..., 0].nonzero().tolist():
        anchor = int(anchors.index[document, row])
        for step, logits in enumerate(sequential.draft(drafter, features, document, anchor, STEPS)):
            if anchors.valid[document, row, step]:
                assert torch.allclose(outputs[step][document, row], logits, atol=1e-4 * float(logits.abs().max()))
                compared += 1
    assert compared > 60


def test_the_layers_that_are_read():
    """Two of four layers, 1 and 3, whose inputs EAGLE's 0, 2 and 3 would not be."""
    drafter, features = built(DrafterConfig("kv", kv_layers=2, kv_control="from_hidden", state_layers="kv"))
    model = examples.target().model
    plain = model(features.tokens, output_hidden_states=True).hidden_states
    assert drafter.spec.hidden_layers == (1, 3) and features.hidden_states.shape[2] == 2
    for place, layer in enumerate((1, 3)):
        assert torch.allclose(features.hidden_states[:, :, place], plain[layer], atol=1e-5)


def test_keys_of_the_last_layer_are_read_as_they_are():
    drafter, features = built(DrafterConfig("kv", kv_layers=1, kv_fusion="heads"))
    keys, values = drafter.prefix(features)[0][0]["cross"]
    assert torch.equal(keys, features.keys[:, :-1, 0].transpose(1, 2))
    assert torch.equal(values, features.values[:, :-1, 0].transpose(1, 2))
    assert not [name for name, _ in drafter.named_parameters() if "fusion" in name]


def test_unrotated_keys_are_those_before_rope():
    """Rotated again they are the cached ones; at position 0 nothing turns."""
    drafter, features = built(DrafterConfig("kv", kv_layers=1, kv_fusion="heads"))
    cos, sin = drafter.rotary(features.keys, torch.arange(features.tokens.shape[1])[None])
    plain = unrotated(features.keys, (cos, sin))
    assert torch.allclose(plain[:, 0], features.keys[:, 0], atol=1e-6)
    assert torch.allclose(unrotated(plain, (cos, -sin)), features.keys, atol=1e-5)
    layer, inputs = examples.target().model.get_decoder().layers[3], []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, out: inputs.append(out))
    examples.target().model(features.tokens)
    hook.remove()
    assert torch.allclose(plain[:, :, 0].flatten(2), inputs[0], atol=1e-5)


def test_a_norm_of_reused_entries_forgets_their_scale():
    drafter, features = built(DrafterConfig("kv", kv_rope="unrotate", kv_norm=True))
    louder = replace(features, keys=features.keys * 100, values=features.values * 100)
    for one, other in zip(drafter.prefix(features)[0][0]["cross"], drafter.prefix(louder)[0][0]["cross"], strict=True):
        assert torch.allclose(one, other, atol=1e-3)
