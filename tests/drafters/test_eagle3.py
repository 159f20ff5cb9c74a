"""`hidden` in EAGLE-3's format: the same drafts after a round trip, the same logits in speculators, foreign ones refused."""

import importlib.util
import json

import examples
import pytest
import torch
from examples import STEPS
from safetensors.torch import load_file, save_file

from kvshot_lib.drafters.eagle3 import CONFIG, WEIGHTS, export_eagle3, fused_layers, import_eagle3
from kvshot_lib.errors import StudyError
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import predict
from kvshot_lib.training.ttt import draft_steps

SPECULATORS = importlib.util.find_spec("speculators") is not None
NAMES = """d2t fc.weight lm_head.weight midlayer.hidden_norm.weight midlayer.input_layernorm.weight midlayer.mlp.down_proj.weight
midlayer.mlp.gate_proj.weight midlayer.mlp.up_proj.weight midlayer.post_attention_layernorm.weight midlayer.self_attn.k_proj.weight
midlayer.self_attn.o_proj.weight midlayer.self_attn.q_proj.weight midlayer.self_attn.v_proj.weight norm.weight t2d"""


@pytest.fixture(params=["tiny-llama", "tiny-qwen3"])
def exported(request, tmp_path):
    drafter = examples.drafter("hidden", request.param)
    return drafter, examples.target(request.param), export_eagle3(drafter, tmp_path / "eagle")


def drafts(drafter, name):
    features = examples.features(name)
    return predict(drafter, features, find_anchors(features.answer_mask, STEPS), STEPS)


def rewrite(folder, drop=(), config=(), **tensors):
    found = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name not in drop}
    save_file({**found, **tensors}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **dict(config)}))


def test_export_and_import_draft_the_same_to_the_bit(exported):
    drafter, target, folder = exported
    again = import_eagle3(folder, target)
    assert torch.equal(drafts(again, target.name), drafts(drafter, target.name))
    assert torch.equal(again.draft_ids, drafter.draft_ids) and torch.equal(again.head, drafter.head)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in drafter.state_dict().items())
    assert again.spec.hidden_layers == drafter.spec.hidden_layers


def test_the_files_are_what_serving_engines_look_for(exported):
    drafter, _, folder = exported
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    assert sorted(tensors) == NAMES.split()
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (64, 128)  # reads [embedding; state]
    assert tensors["fc.weight"].shape == (64, 192) and tensors["lm_head.weight"].shape == (410, 64)
    assert (torch.arange(410) + tensors["d2t"]).tolist() == examples.DRAFT_IDS.tolist()
    assert tensors["t2d"].nonzero().flatten().tolist() == examples.DRAFT_IDS.tolist()
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 410
    assert config["eagle_aux_hidden_state_layer_ids"] == list(drafter.spec.hidden_layers) == [0, 2, 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [-1, 1, 2]
    assert (config["hidden_size"], config["vocab_size"], config["rope_theta"]) == (64, 512, 10000.0)


def test_layers_by_hand():
    ids = "eagle_aux_hidden_state_layer_ids"
    assert fused_layers({ids: [2, 16, 29]}, 32) == (2, 16, 29)
    assert fused_layers({"eagle_config": {ids: [1, 15, 28]}}, 32) == (2, 16, 29)
    assert fused_layers({"eagle_config": None}, 32) == (2, 16, 29)


def test_a_published_checkpoint_keeps_its_own_head_embedding_and_widths(exported):
    """As they come: names of speculators, another MLP width and RoPE base, an LM head and an embedding of its own, half precision."""
    _, target, folder = exported
    generator = torch.Generator().manual_seed(0)
    own = {
        "embed_tokens.weight": torch.randn(512, 64, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(410, 64),
    }
    for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
        own[f"midlayer.mlp.{name}_proj.weight"] = torch.randn(shape, generator=generator)
    rewrite(folder, config={"intermediate_size": 96, "rope_theta": 500.0}, **own)
    renamed = {name.replace("midlayer.", "layers.0."): t for name, t in load_file(folder / WEIGHTS).items()}
    save_file(renamed, folder / WEIGHTS)
    drafter = import_eagle3(folder, target)
    assert torch.equal(drafter.head, own["lm_head.weight"]) and drafter.layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert torch.equal(drafter.embedding, own["embed_tokens.weight"].float())
    assert drafter.sizes.rope_parameters["rope_theta"] == 500.0
    assert drafts(drafter, target.name).shape[-1] == STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"norm_before_residual": True}}, "norm_before_residual=True: the study's 'hidden' has False"),
        ({"config": {"num_hidden_layers": 2}}, "num_hidden_layers=2"),
        ({"drop": ["fc.weight"]}, "lacks fc.weight: that is no EAGLE-3 drafter"),
        ({"drop": ["lm_head.weight"]}, "lacks lm_head.weight"),
        ({"midlayer.self_attn.q_norm.weight": torch.ones(16)}, "has midlayer.self_attn.q_norm.weight"),
        ({"lm_head.weight": torch.ones(410, 32)}, "at width 32, target .* has 512 at width 64; load the target"),
        ({"d2t": torch.arange(410)}, "drafts 410 tokens up to 818"),
        ({"config": {"intermediate_size": 99}}, "config.json and model.safetensors don't fit"),
    ],
)
def test_what_is_no_drafter_of_this_target_is_refused(exported, change, message):
    _, target, folder = exported
    rewrite(folder, **change)
    with pytest.raises(StudyError, match=message) as error:
        import_eagle3(folder, target)
    assert "\n" not in str(error.value)


def test_what_the_format_has_no_place_for_is_refused(tmp_path):
    for variant in ("hidden_post_norm", "hidden_normed", "kv_1", "hybrid"):
        with pytest.raises(StudyError, match="EAGLE-3 has no place for .*; export the study's 'hidden'"):
            export_eagle3(examples.drafter(variant), tmp_path)
    with pytest.raises(StudyError, match="config.json can't be read .*; give the folder of an EAGLE-3 checkpoint"):
        import_eagle3(tmp_path, examples.target())


@torch.no_grad()
def our_logits(drafter, features, steps):
    """Logits [K, n-1, V_draft] of one document at every anchor, valid or not."""
    everywhere = torch.ones_like(features.answer_mask)
    anchors = find_anchors(everywhere, steps)
    return [
        (anchors.valid[0, :, k], drafter.norm(output)[0] @ drafter.head.T)
        for k, _, output in draft_steps(drafter, features, anchors, steps)
    ]


@pytest.mark.skipif(
    not SPECULATORS, reason="speculators isn't installed (an extra of its own): pip install '.[interchange]'"
)
@pytest.mark.filterwarnings("ignore")  # of packages that only speculators imports
def test_speculators_compute_the_same_logits(exported, tmp_path):
    """Through its converter, in its own model, by its own TTT loop: step by step to 1e-4; and not if two norms are swapped."""
    drafter, target, folder = exported
    difference = speculators_difference(drafter, target, folder, tmp_path, steps=STEPS)
    assert len(difference) == STEPS and max(difference) < 1e-4
    first, second = (f"midlayer.{name}.weight" for name in ("hidden_norm", "input_layernorm"))
    norms = load_file(folder / WEIGHTS)
    rewrite(folder, **{first: norms[second], second: norms[first]})
    assert min(speculators_difference(drafter, target, folder, tmp_path / "swapped", steps=2)) > 1e-2


@torch.no_grad()
def speculators_difference(drafter, target, folder, work, steps, features=None) -> list[float]:
    """Largest absolute difference of logits at each draft step, over the valid pairs of one document."""
    from speculators.convert.eagle.eagle3_converter import Eagle3Converter
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    (work / "target").mkdir(parents=True)
    target.model.save_pretrained(work / "target")
    layers = list(drafter.spec.hidden_layers)
    Eagle3Converter().convert(
        folder, work / "converted", str(work / "target"), validate=False, eagle_aux_hidden_state_layer_ids=layers
    )
    config = Eagle3SpeculatorConfig.from_pretrained(work / "converted")
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = Eagle3DraftModel(config)
    missing, unexpected = theirs.load_state_dict(load_file(work / "converted" / WEIGHTS), strict=False)
    assert not unexpected and set(missing) <= {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    theirs.embed_tokens.weight.copy_(drafter.embedding)
    features = features or examples.features(target.name, (4,))
    ours, said = our_logits(drafter, features, steps), []
    theirs.lm_head.register_forward_hook(lambda _module, _inputs, output: said.append(output[0]))
    tokens = features.tokens
    theirs.eval()(
        features.hidden_states[:, :-1].flatten(2), tokens[:, 1:], torch.zeros_like(tokens[:, 1:]), ttt_steps=steps
    )
    return [
        float((mine[: int(valid.sum())] - other[: int(valid.sum())]).abs().max())
        for (valid, mine), other in zip(ours, said, strict=True)
    ]
