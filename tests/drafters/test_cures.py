"""The drafter's own cures for a starving cross branch: a gate floor, and key and value maps started from the target's."""

import examples
import pytest
import torch
from examples import DRAFT_IDS

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.training.loss import ttt_loss


def build(**options):
    config = DrafterConfig(**{"paradigm": "hybrid", **options})
    return examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))


def gradients(drafter, loss):
    drafter.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in drafter.named_parameters()}


BRANCH = ("layers.0.cross.", "layers.0.fusion.")


def test_a_gate_floor_of_zero_changes_nothing_and_one_of_a_half_halves_what_is_left():
    plain, floored, features = build(), build(gate_floor=0.5), examples.features()
    layer, generator = plain.layers[0], torch.Generator().manual_seed(0)
    inputs, own, cross = (torch.randn(1, 4, width, generator=generator) for width in (128, 64, 64))
    gate = torch.sigmoid(layer.gate(inputs))
    assert torch.equal(layer.mix(inputs, own, cross), own + gate * (cross - own))
    expected = own + (0.5 + 0.5 * gate) * (cross - own)
    assert torch.allclose(floored.layers[0].mix(inputs, own, cross), expected, atol=1e-6)
    with torch.no_grad():
        for drafter in (plain, floored):
            drafter.layers[0].gate.bias.fill_(-1e4)  # shut, as far as it goes
    assert torch.equal(plain.layers[0].mix(inputs, own, cross), own)
    assert torch.allclose(floored.layers[0].mix(inputs, own, cross), (own + cross) / 2, atol=1e-6)
    for drafter, starves in ((plain, True), (floored, False)):
        found = gradients(drafter, ttt_loss(drafter, features).loss)
        assert all(found[name].any() != starves for name in found if name.startswith(BRANCH))


@pytest.mark.parametrize("fusion", ["linear", "heads"])
def test_a_draft_entry_starts_as_what_the_fusion_makes_of_the_targets_own(fusion):
    """Layer 0 of the target reads the embedding, as the drafter does: there the entry of token x_s is that of the prefix at s."""
    target, rope = examples.target(), "unrotate" if fusion == "linear" else "raw"
    source = LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, [0]))
    config = DrafterConfig("kv", kv_layers=1, kv_fusion=fusion, kv_rope=rope, kv_init="target")
    drafter, features = build_drafter(config, target, source.spec, DRAFT_IDS), source.batch([0, 4])
    layer, last = drafter.layers[0], features.tokens.shape[1] - 1
    with torch.no_grad():
        prefix = drafter.prefix(features)[0][0]["cross"]
        embedded = drafter.embed(features.tokens[:, :last])
        rotary = drafter.rotary(embedded, torch.arange(last)[None])
        own = layer.attention.project(layer.attention_norm(embedded), rotary, "k", "v")
    for ours, theirs in zip(own, prefix, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("options", [{"paradigm": "kv", "num_layers": 2}, {}, {"paradigm": "block", "num_layers": 2}])
def test_nothing_else_starts_differently(options):
    spec = examples.live().spec
    random, started = (
        build_drafter(
            DrafterConfig(**{"paradigm": "hybrid", **options, "kv_init": init}), examples.target(), spec, DRAFT_IDS
        )
        for init in ("random", "target")
    )
    differ = {name for name, p in random.named_parameters() if not torch.equal(p, started.state_dict()[name])}
    part = "attention" if options else "cross"
    assert differ == {f"layers.{i}.{part}.{name}_proj.weight" for i in range(len(random.layers)) for name in "kv"}
    if not options:  # reads [embedding; state]: the state's half starts at zero, and learns
        own = started.layers[0].cross.k_proj.weight
        assert own[:, :64].any() and not own[:, 64:].any()
        assert gradients(started, ttt_loss(started, examples.features()).loss)["layers.0.cross.k_proj.weight"][
            :, 64:
        ].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_floor": 1.0}, "gate_floor=1.0 must be 0 or more and below 1"),
        ({"gate_floor": -0.1}, "gate_floor=-0.1 must be 0 or more"),
        ({"gate_floor": 0.1, "cross_only": True}, "cross_only=True contradicts gate_floor=0.1"),
        ({"gate_floor": 0.1, "paradigm": "kv"}, "gate_floor=0.1 means nothing to a kv drafter"),
        ({"kv_init": "targets"}, "kv_init='targets' must be one of 'random', 'target'"),
        ({"kv_init": "target", "paradigm": "hidden"}, "kv_init='target' means nothing to a hidden drafter"),
        ({"kv_init": "target", "kv_fusion": "mlp"}, "kv_init='target' contradicts kv_fusion='mlp'"),
        ({"kv_init": "target", "paradigm": "kv", "kv_control": "from_hidden"}, "contradicts kv_control='from_hidden'"),
        (
            {"kv_init": "target", "paradigm": "block", "block_context": "hidden"},
            "block_context='hidden' contradicts kv_init='target'",
        ),
    ],
)
def test_drafters_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(StudyError, match=message):
        DrafterConfig(**{"paradigm": "hybrid", **options})
