"""Where a fresh drafter starts: with ``norm_init="unit"`` near a uniform guess, however large the target's last norm."""

import math
from dataclasses import replace

import examples
import pytest
import torch

from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.load import load_target
from kvshot_lib.training.loss import ttt_loss

UNIFORM = math.log(len(examples.DRAFT_IDS))
STEPS = [0.8**step for step in range(examples.STEPS)]


@pytest.fixture(scope="module", params=["tiny", "tiny-gemma3"])
def loud(request):
    """A target whose last norm is large, and uneven from channel to channel; and what it leaves at the examples."""
    target = load_target(request.param, device="cpu", dtype="float32")
    norm = target.model.get_decoder().norm
    with torch.no_grad():
        gains = 50 * torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(0)).exp()
        norm.weight.copy_(gains if request.param == "tiny" else gains - 1)
    spec = feature_spec(target)
    live = LiveFeatures(target, [document for document in examples.DOCUMENTS if len(document.tokens) > 10], spec)
    return target, spec, live.batch(range(len(live)))


def start(loud, config, seed=0):
    """A fresh drafter and its loss a draft step."""
    target, spec, features = loud
    drafter = build_drafter(config, target, spec, examples.DRAFT_IDS, seed=seed)
    with torch.no_grad():
        loss = ttt_loss(drafter, features, ttt_steps=examples.STEPS, step_decay=0.8).loss
    return drafter, float(loss) / sum(STEPS)


@pytest.mark.parametrize(
    "name", ["hidden", "hidden_31_3", "kv_1", "kv_2_normed", "none_2", "states_2", "both_2", "hybrid"]
)
def test_the_start_is_near_a_uniform_guess_for_every_family(loud, name):
    config = examples.VARIANTS[name]
    assert abs(start(loud, replace(config, norm_init="unit"))[1] - UNIFORM) < 1
    assert start(loud, config)[1] > 2 * UNIFORM, "the target's own norm would have done: this test shows nothing"


@pytest.mark.parametrize("name", ["kv_1", "hidden_31_3"])
def test_logits_of_random_inputs_vary_by_one(loud, name):
    drafter, _ = start(loud, replace(examples.VARIANTS[name], norm_init="unit"))
    inputs = torch.randn(4000, drafter.sizes.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = (inputs * drafter.norm.weight) @ drafter.head.T
    assert float(logits.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["states_2", "both_2"])
def test_states_may_be_normed_as_the_target_norms_them(loud, name):
    """The map of a layer's normed state then starts with what that layer's own projections read."""
    target, _, features = loud
    for layer, loud_layer in enumerate(target.model.get_decoder().layers):
        torch.nn.init.uniform_(loud_layer.input_layernorm.weight, layer, layer + 9)
    drafter, _ = start(loud, replace(examples.VARIANTS[name], state_gains="target", state_layers="kv"))
    states = features.hidden_states
    with torch.no_grad():
        read = drafter.layers[1].fusion.norm(states)
        wanted = [
            target.model.get_decoder().layers[index].input_layernorm(states[:, :, place])
            for place, index in enumerate(drafter.spec.hidden_layers)
        ]
    assert torch.allclose(read, torch.stack(wanted, dim=2), rtol=1e-5, atol=1e-5)


def test_the_recorded_start_is_the_targets_norm(loud):
    drafter, _ = start(loud, examples.VARIANTS["kv_1"])
    norm = loud[0].model.get_decoder().norm
    with torch.no_grad():
        assert torch.allclose(norm(torch.ones_like(norm.weight)), drafter.norm.weight, rtol=1e-4)
