"""`hidden` in EAGLE-3's format: the same drafts after a round trip and from every writer's form; what isn't meant, refused."""

import importlib.util
import json
from dataclasses import replace

import examples
import pytest
import torch
from examples import DRAFT_IDS, STEPS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvshot_lib.drafters.config import DrafterConfig
from kvshot_lib.drafters.context import drafter_spec
from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.drafters.eagle3 import CONFIG, WEIGHTS, export_eagle3, import_eagle3
from kvshot_lib.drafters.eagle3_format import FIXED, HARMLESS, READ, fused_layers
from kvshot_lib.errors import StudyError
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import predict
from kvshot_lib.training.ttt import draft_steps

SPECULATORS = importlib.util.find_spec("speculators") is not None
NAMES = """d2t fc.weight lm_head.weight midlayer.hidden_norm.weight midlayer.input_layernorm.weight midlayer.mlp.down_proj.weight
midlayer.mlp.gate_proj.weight midlayer.mlp.up_proj.weight midlayer.post_attention_layernorm.weight midlayer.self_attn.k_proj.weight
midlayer.self_attn.o_proj.weight midlayer.self_attn.q_proj.weight midlayer.self_attn.v_proj.weight norm.weight t2d"""
KINDS = {
    "EAGLE-3": DrafterConfig("hidden"),
    "EAGLE-3.1": DrafterConfig("hidden", feedback="post_norm", hidden_norm=True),
    "fc_norm alone": DrafterConfig("hidden", hidden_norm=True),
    "norm_output alone, three layers": DrafterConfig("hidden", 3, feedback="post_norm"),
    "two layers, other states": DrafterConfig("hidden", 2, kv_layers=(0, 1, 3), state_layers="kv"),
}


def made(config, name="tiny-llama"):
    target = examples.target(name)
    drafter = build_drafter(config, target, drafter_spec(config, target), DRAFT_IDS, seed=1)
    return examples.roughened(drafter)


@pytest.fixture(params=["tiny-llama", "tiny-qwen3"])
def exported(request, tmp_path):
    drafter, target = examples.drafter("hidden", request.param), examples.target(request.param)
    return drafter, target, export_eagle3(drafter, target, tmp_path / "eagle")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One plain checkpoint that is read many times, as tensors and config."""
    drafter = examples.drafter("hidden")
    folder = export_eagle3(drafter, examples.target(), tmp_path_factory.mktemp("eagle"))
    config = json.loads((folder / CONFIG).read_text())
    return drafter, load_file(folder / WEIGHTS), {name: value for name, value in config.items() if name != "kvshot"}


def left(folder, tensors, config, weights=WEIGHTS):
    """A checkpoint of these."""
    folder.mkdir(exist_ok=True)
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def drafts(drafter, name="tiny-llama"):
    features = (
        examples.live_of(*examples.DOCUMENTS, name=name).with_layers(None, drafter.spec.hidden_layers).batch(range(5))
    )
    return predict(drafter, features, find_anchors(features.answer_mask, STEPS), STEPS)


def same_drafter(one, other):
    assert torch.equal(one.draft_ids, other.draft_ids) and torch.equal(one.head, other.head)
    assert torch.equal(one.embedding, other.embedding) and one.spec.hidden_layers == other.spec.hidden_layers
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert torch.equal(one.rotary.inv_freq, other.rotary.inv_freq)
    assert torch.equal(drafts(one, one.spec.target), drafts(other, one.spec.target))


def rewrite(folder, drop=(), config=(), **tensors):
    found = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if name not in drop}
    changed = {**json.loads((folder / CONFIG).read_text()), **dict(config)}
    left(folder, {**found, **tensors}, changed)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_draft_the_same_to_the_bit(tmp_path, kind, name):
    drafter, target = made(KINDS[kind], name), examples.target(name)
    again = import_eagle3(export_eagle3(drafter, target, tmp_path), target)
    same_drafter(drafter, again)
    named = {"state_layers": "eagle", "kv_layers": 3}  # the spec says which
    assert again.config == replace(drafter.config, **named)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_scaled_rope_goes_round_too_though_a_shorter_length_is_told(tmp_path, rope):
    drafter, target = made(KINDS["EAGLE-3"]), examples.target()
    sizes = {**drafter.sizes.to_dict(), "rope_parameters": {"rope_theta": 5000.0, **rope}}
    drafter = type(drafter)(
        drafter.config, drafter.spec, type(drafter.sizes)(**sizes), drafter.draft_ids, drafter.embedding, drafter.head
    )
    again = import_eagle3(export_eagle3(drafter, target, tmp_path, trained_tokens=32), target)
    same_drafter(drafter, again)
    assert (
        again.rotary.attention_scaling == drafter.rotary.attention_scaling and again.sizes.max_position_embeddings == 32
    )


def test_the_files_are_what_serving_engines_look_for(exported):
    drafter, target, folder = exported
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
    assert (config["fc_norm"], config["norm_output"], config["max_position_embeddings"]) == (False, False, 512)
    card = (folder / "README.md").read_text()
    assert (
        f"# EAGLE-3 drafter for {target.name}" in card and "texts of up to 512 tokens" in card and target.hash in card
    )


def test_eagle_31_is_the_fused_states_norm_three_times_and_a_switch(tmp_path):
    """As vLLM 0.32 was found to read it: `fc_norm.{0,1,2}.weight`, `fc_norm` and `norm_output` true; later layers by number."""
    drafter, target = made(replace(KINDS["EAGLE-3.1"], num_layers=2)), examples.target()
    folder = export_eagle3(drafter, target, tmp_path, trained_tokens=256)
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    for index in range(3):
        assert torch.equal(tensors[f"fc_norm.{index}.weight"], drafter.hidden_norm.weight)
    assert config["fc_norm"] is True and config["norm_output"] is True and config["num_hidden_layers"] == 2
    assert torch.equal(tensors["layers.1.input_layernorm.weight"], drafter.layers[1].attention_norm.weight)
    assert tensors["layers.1.self_attn.q_proj.weight"].shape == (64, 64) and config["max_position_embeddings"] == 256
    assert "# EAGLE-3.1 drafter for tiny-llama" in (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["EAGLE-3", "EAGLE-3.1", "norm_output alone, three layers"])
@torch.no_grad()
def test_the_tensors_mean_what_engines_take_them_for(tmp_path, kind):
    """vLLM's order of things, from the exported files alone: every layer after the first reads the stream, causally."""
    drafter, target = made(KINDS[kind]), examples.target()
    folder = export_eagle3(drafter, target, tmp_path)
    weights, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    features, rms = examples.features(documents=(4,)), torch.nn.functional.rms_norm
    tokens, n = features.tokens[0, 1:], features.tokens.shape[1] - 1

    def norm(name, x):
        return rms(x, x.shape[-1:], weights[f"{name}.weight"], config["rms_norm_eps"])

    def turned(x):  # [n, heads, 16], half by half
        angles = torch.arange(1, n + 1)[:, None, None] * config["rope_theta"] ** (-torch.arange(8) / 8)
        first, second = x.split(8, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    def layer(place, read, stream):
        q, k, v = (read @ weights[f"{place}.self_attn.{p}_proj.weight"].T for p in "qkv")
        q, k, v = turned(q.view(n, 4, 16)), turned(k.view(n, 2, 16)), v.view(n, 2, 16)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
        )[0]
        stream = stream + mixed.transpose(0, 1).flatten(1) @ weights[f"{place}.self_attn.o_proj.weight"].T
        inner = norm(f"{place}.post_attention_layernorm", stream)
        gate, up = (inner @ weights[f"{place}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        return stream + (torch.nn.functional.silu(gate) * up) @ weights[f"{place}.mlp.down_proj.weight"].T

    states = features.hidden_states[0, :-1].unbind(1)
    if config["fc_norm"]:
        states = [norm(f"fc_norm.{i}", state) for i, state in enumerate(states)]
    state = torch.cat(states, -1) @ weights["fc.weight"].T
    embedded = norm("midlayer.input_layernorm", target.model.get_input_embeddings().weight[tokens])
    out = layer("midlayer", torch.cat([embedded, norm("midlayer.hidden_norm", state)], -1), state)
    for index in range(1, config["num_hidden_layers"]):
        out = layer(f"layers.{index}", norm(f"layers.{index}.input_layernorm", out), out)
    logits = norm("norm", out) @ weights["lm_head.weight"].T
    ((valid, ours),) = our_logits(drafter, features, 1)
    assert valid.sum() > 5 and torch.allclose(ours[: int(valid.sum())], logits[: int(valid.sum())], atol=1e-4)


def test_norms_of_fused_states_that_differ_are_multiplied_into_fc(tmp_path):
    """norm_i(f) times its own gains, then W: what vLLM computes, state by state."""
    drafter, target = made(KINDS["EAGLE-3.1"]), examples.target()
    folder = export_eagle3(drafter, target, tmp_path)
    gains = [torch.rand(64, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(3)]
    rewrite(folder, **{f"fc_norm.{i}.weight": gain for i, gain in enumerate(gains)})
    again, states = import_eagle3(folder, target), 3 * torch.randn(5, 3, 64)
    wanted = 0
    for i, gain in enumerate(gains):
        normed = torch.nn.functional.rms_norm(states[:, i], (64,), gain, target.config.rms_norm_eps)
        wanted = wanted + normed @ drafter.fuse_hidden.weight[:, 64 * i : 64 * (i + 1)].T
    assert torch.allclose(again.fuse_hidden(again.hidden_norm(states).flatten(1)), wanted, atol=1e-5)


def test_an_embedding_that_is_not_the_targets_table_goes_along(tmp_path):
    """Gemma scales its embeddings inside the module: engines read the table as it is."""
    drafter, target = made(KINDS["EAGLE-3"]), examples.target()
    drafter.embedding = 8 * drafter.embedding
    folder = export_eagle3(drafter, target, tmp_path)
    assert torch.equal(load_file(folder / WEIGHTS)["embed_tokens.weight"], drafter.embedding)
    same_drafter(drafter, import_eagle3(folder, target))


def test_layers_by_hand():
    inputs, outputs = "eagle_aux_hidden_state_layer_ids", "eagle_config.eagle_aux_hidden_state_layer_ids"
    assert fused_layers({inputs: [2, 16, 29]}, 32) == (2, 16, 29)
    assert fused_layers({outputs: [1, 15, 28]}, 32) == (2, 16, 29)
    assert fused_layers({inputs: [2, 16, 29], outputs: [1, 15, 28]}, 32) == (2, 16, 29)
    assert fused_layers({outputs: []}, 32) == (2, 16, 29)
    with pytest.raises(StudyError, match=r"names inputs of layers \[2, 16, 29\] .* and of \[3, 17, 30\]"):
        fused_layers({inputs: [2, 16, 29], outputs: [2, 16, 29]}, 32)


# -- As others write them: config and tensors of the plain drafter in another form, and the very drafter must come out.


def eagle(tensors, config):
    """The authors' own: no RoPE base (10,000 then), no head size, half of the fields; weights pickled."""
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
    )
    own = {name: config[name] for name in (*kept, "draft_vocab_size", "num_hidden_layers")}
    own |= {"architectures": ["LlamaForCausalLM"], "initializer_range": 0.02, "use_cache": True, "hidden_act": "silu"}
    own |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 1, 2]}, "max_position_embeddings": 2048}
    return tensors, own, "pytorch_model.bin"


def specforge(tensors, config):
    """A target's window, which the draft model doesn't use; layers one less, in eagle_config."""
    own = config | {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 36}
    own |= {"target_model_type": "gemma3_text", "attention_dropout": 0.0, "head_dim": 16}
    del own["eagle_aux_hidden_state_layer_ids"]
    return tensors, own, WEIGHTS


def angelslim(tensors, config):
    own = config | {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "modal_type": "LLM",
        "sliding_window": None,
        "dtype": "bfloat16",
    }
    return (
        {f"model.{name}" if "lm_head" not in name and "2" not in name else name: t for name, t in tensors.items()},
        own,
        WEIGHTS,
    )


def model_optimizer(tensors, config):
    """Null for what isn't set, the layer by number, no head and no t2d."""
    switches = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}
    switches |= {"next_layer_regular": True, "parallel_draft_step": 1, "parallel_draft_heads_num_layers": 1}
    own = config | {"bos_token_id": None, "rope_scaling": None, "mlp_bias": None, "initializer_range": 0.01}
    own["eagle_config"] = config["eagle_config"] | switches
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if name not in ("lm_head.weight", "t2d")}, own, WEIGHTS


def speculators(tensors, config):
    """The layer nested, norms and head of the verifier beside its own, the embedding too; rope_parameters."""
    inner = (
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    layer = {name: config[name] for name in (*inner, "vocab_size", "num_hidden_layers", "hidden_act")}
    layer |= {"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    layer |= {"layer_types": ["full_attention"], "max_position_embeddings": 8192}
    own = {name: config[name] for name in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")}
    own |= {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
    }
    own |= {
        "norm_before_residual": False,
        "norm_before_fc": False,
        "embed_requires_grad": False,
        "target_hidden_size": None,
    }
    verifier = {"name_or_path": "a/b", "architectures": ["LlamaForCausalLM"]}
    own["speculators_config"] = {"algorithm": "eagle3", "proposal_methods": [], "verifier": verifier}
    found = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    found |= {"verifier_norm.weight": torch.ones(64), "verifier_lm_head.weight": torch.ones(410, 64)}
    table = examples.target().model.get_input_embeddings().weight.detach()
    return found | {"embed_tokens.weight": table}, own, WEIGHTS


@pytest.mark.parametrize("form", [eagle, specforge, angelslim, model_optimizer, speculators])
def test_a_checkpoint_is_read_as_others_write_it(tmp_path, plain, form):
    drafter, tensors, config = plain
    same_drafter(drafter, import_eagle3(left(tmp_path / "it", *form(tensors, config)), examples.target()))


@pytest.mark.parametrize("dropped", ["t2d", "d2t", "lm_head.weight"])
def test_a_map_or_head_that_is_left_out_is_made_again(tmp_path, plain, dropped):
    drafter, tensors, config = plain
    kept = {name: tensor for name, tensor in tensors.items() if name != dropped}
    same_drafter(drafter, import_eagle3(left(tmp_path / "it", kept, config), examples.target()))


def test_a_drafter_of_the_whole_vocabulary_needs_no_map(tmp_path, plain):
    _, tensors, config = plain
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d", "lm_head.weight")}
    whole = {name: value for name, value in config.items() if name != "draft_vocab_size"}
    target = examples.target()
    drafter = import_eagle3(left(tmp_path / "it", kept, whole), target)
    assert torch.equal(drafter.draft_ids, torch.arange(512))
    assert torch.equal(drafter.head, target.model.get_output_embeddings().weight)
    own = torch.randn(512, 64)
    tied = left(tmp_path / "tied", kept | {"embed_tokens.weight": own}, whole | {"tie_word_embeddings": True})
    assert torch.equal(import_eagle3(tied, target).head, own)


def test_weights_in_several_files_are_joined(tmp_path, plain):
    drafter, tensors, config = plain
    half = sorted(tensors)[:7]
    left(tmp_path, {name: tensors[name] for name in half}, config, "model-00001-of-00002.safetensors")
    left(
        tmp_path,
        {name: t for name, t in tensors.items() if name not in half},
        config,
        "model-00002-of-00002.safetensors",
    )
    same_drafter(drafter, import_eagle3(tmp_path, examples.target()))


def test_a_published_checkpoint_keeps_its_own_head_embedding_and_widths(exported):
    """Another MLP width and RoPE base, an LM head and an embedding of its own, half precision, heads normed (Qwen3's layer)."""
    _, target, folder = exported
    generator = torch.Generator().manual_seed(0)
    own = {
        "embed_tokens.weight": torch.randn(512, 64, generator=generator).bfloat16(),
        "lm_head.weight": torch.randn(410, 64),
    }
    for name, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
        own[f"midlayer.mlp.{name}_proj.weight"] = torch.randn(shape, generator=generator)
    own |= {f"midlayer.self_attn.{name}_norm.weight": torch.rand(16) + 0.5 for name in "qk"}
    rewrite(folder, config={"intermediate_size": 96, "rope_theta": 500.0}, **own)
    drafter = import_eagle3(folder, target)
    assert torch.equal(drafter.head, own["lm_head.weight"]) and drafter.layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert torch.equal(drafter.embedding, own["embed_tokens.weight"].float()) and drafter.config.qk_norm
    assert torch.equal(drafter.layers[0].attention.q_norm.weight, own["midlayer.self_attn.q_norm.weight"])
    assert drafter.sizes.rope_parameters["rope_theta"] == 500.0
    assert drafts(drafter, target.name).shape[-1] == STEPS
    with pytest.raises(StudyError, match="no place for a drafter with qk_norm=True"):
        export_eagle3(drafter, target, folder)


def test_fields_can_be_overridden(tmp_path, plain):
    """The base that it was trained with, layers counted otherwise, feedback; in whatever place the config has it."""
    _, tensors, config = plain
    rope = {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    folder, target = left(tmp_path / "it", tensors, config | rope | {"norm_output": True}), examples.target()
    assert import_eagle3(folder, target).sizes.rope_parameters["rope_theta"] == 1e6
    changed = import_eagle3(
        folder, target, rope_theta=10_000, norm_output=False, eagle_aux_hidden_state_layer_ids=(1, 2, 3)
    )
    assert changed.sizes.rope_parameters["rope_theta"] == 10_000 and changed.config.feedback == "pre_norm"
    assert changed.spec.hidden_layers == (1, 2, 3)
    for wrong, told in (
        ({"rope_thta": 1}, "rope_thta: no field that is read"),
        ({"rope_theta": "1e4"}, "must be a finite number"),
    ):
        with pytest.raises(StudyError, match=told):
            import_eagle3(folder, target, **wrong)
    left(folder, tensors, config | {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5, "type": "default"}})
    with pytest.raises(StudyError, match="names two RoPE bases, 10000.0 and 500000.0; say which with rope_theta="):
        import_eagle3(folder, target)


def test_angles_that_a_checkpoint_carries_are_compared_with_its_config(tmp_path, plain):
    drafter, tensors, config = plain
    angles = {"midlayer.self_attn.rotary_emb.inv_freq": 10_000.0 ** (-torch.arange(0, 16, 2) / 16)}
    folder, target = left(tmp_path / "it", tensors | angles, config), examples.target()
    same_drafter(drafter, import_eagle3(folder, target))
    left(folder, tensors | angles, config | {"rope_theta": 1e6})
    with pytest.raises(StudyError, match=r"says rope_theta=1e\+06 but was trained at about 1e\+04; give rope_theta="):
        import_eagle3(folder, target)
    same_drafter(drafter, import_eagle3(folder, target, rope_theta=10_000))


def offsets(ids):
    return torch.tensor(ids) - torch.arange(len(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"norm_before_residual": True}}, "norm_before_residual=True: the study's 'hidden' has False"),
        ({"config": {"sliding_window": 4, "layer_types": ["sliding_attention"]}}, "has sliding_window=4, which"),
        ({"config": {"layer_types": ["full_attention", "sliding_attention"]}}, "has layer_types=.*'sliding_attention'"),
        ({"config": {"sliding_window": 4, "use_sliding_window": True}}, "has .*sliding_window="),
        ({"config": {"attn_logit_softcapping": 50.0}}, "has attn_logit_softcapping=50.0, which is not read here"),
        ({"config": {"final_logit_softcapping": 30.0}}, "has final_logit_softcapping=30.0, which is not read here"),
        ({"config": {"quantization_config": {"quant_method": "fp8"}}}, "has quantization_config="),
        (
            {"config": {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}},
            "rope_scaling.mrope_section=",
        ),
        (
            {"config": {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
            "has RoPE of type 'dynamic'; .* does default",
        ),
        ({"config": {"rope_scaling": {"type": "llama3", "factor": 2.0}}}, "config.json describes no layer"),
        ({"config": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor=0.5: the study's 'hidden' has 1"),
        ({"config": {"eagle_config": {"parallel_draft_step": 4}}}, "has eagle_config.parallel_draft_step=4: .* has 1"),
        ({"config": {"eagle_config": {"use_aux_hidden_state": False}}}, "has eagle_config.use_aux_hidden_state=False"),
        ({"config": {"speculators_model_type": "dflash"}}, "has speculators_model_type='dflash': .* has 'eagle3'"),
        ({"config": {"attention_bias": True}}, "has attention_bias=True: the study's 'hidden' has False"),
        ({"config": {"fc_norm": "false"}}, "fc_norm='false' must be True or False"),
        ({"config": {"hidden_size": "64"}}, "hidden_size='64' must be a whole number"),
        ({"config": {"hidden_size": None}}, "config.json has no hidden_size"),
        ({"config": {"num_attention_heads": 0}}, "has num_attention_heads=0"),
        ({"config": {"vocab_size": 500}}, "has vocab_size=500, target .* 512; load the target that it was trained for"),
        ({"config": {"target_hidden_size": 32}}, "has target_hidden_size=32, target .* 64"),
        ({"config": {"num_hidden_layers": 2}}, "lacks layers.1.input_layernorm.weight, .* as its config.json says"),
        ({"config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 7], "eagle_config": None}}, "7"),
        ({"config": {"fc_norm": True}}, "lacks fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
        ({"config": {"intermediate_size": 99}}, "config.json and model.safetensors don't fit"),
        ({"config": {"draft_vocab_size": 400}}, "maps 410 draft tokens, says 400"),
        ({"drop": ["fc.weight"]}, "lacks fc.weight: that is no EAGLE-3 drafter"),
        ({"drop": ["d2t", "t2d"]}, r"drafts 410 of 512 tokens and has no map to them \(d2t or t2d\)"),
        ({"d2t": torch.zeros(410, dtype=torch.long)}, "d2t and t2d name different tokens"),
        (
            {"d2t": torch.zeros(410, dtype=torch.long), "drop": ["t2d"]},
            "d2t is all zero, so no vocabulary map was written",
        ),
        ({"d2t": torch.arange(410)}, "d2t and t2d name different tokens"),
        ({"d2t": torch.arange(410), "drop": ["t2d"]}, "d2t names tokens twice or outside 0 … 511"),
        ({"d2t": offsets([5, *range(1, 410)]), "drop": ["t2d"]}, "d2t names tokens twice or outside"),
        (
            {"d2t": offsets(DRAFT_IDS.tolist()).bfloat16()},
            "has a d2t of torch.bfloat16, 1-dimensional; offsets are whole",
        ),
        ({"midlayer.self_attn.q_norm.weight": torch.ones(16)}, "lacks midlayer.self_attn.k_norm.weight"),
        ({"input_norm.weight": torch.ones(192)}, "has input_norm.weight, which the study's 'hidden' doesn't have"),
        ({"midlayer.self_attn.q_proj.bias": torch.ones(64)}, "has midlayer.self_attn.q_proj.bias, which"),
        ({"model.norm.weight": torch.ones(64)}, "has norm.weight twice"),
        (
            {"norm.weight": torch.ones(64).to(torch.float8_e4m3fn)},
            "has norm.weight in torch.float8_e4m3fn; export weights alone",
        ),
        ({"fc.weight": torch.full((64, 192), torch.nan)}, "has fc.weight with values that are not finite"),
        ({"lm_head.weight": torch.full((410, 64), torch.inf)}, "has lm_head.weight with values that are not finite"),
        ({"config": {"kvshot": "mine"}}, "has kvshot='mine', which is not read here"),
        ({"lm_head.weight": torch.ones(410, 32)}, r"has lm_head.weight \(410, 32\), .* that doesn't fit"),
        ({"embed_tokens.weight": torch.ones(500, 64)}, r"embed_tokens.weight \(500, 64\); that doesn't fit"),
    ],
)
def test_what_is_no_drafter_of_this_target_is_refused(exported, change, message):
    _, target, folder = exported
    rewrite(folder, **change)
    with pytest.raises(StudyError, match=message) as error:
        import_eagle3(folder, target)
    assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoint_are_told(exported, tmp_path):
    _, target, folder = exported
    other = examples.target("tiny-qwen3" if target.name == "tiny-llama" else "tiny-llama")
    with pytest.raises(StudyError, match=f"was trained for target {target.name} .*, not for {other.name} "):
        import_eagle3(folder, other)
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(StudyError, match="model.safetensors can't be read .*; fetch it again"):
        import_eagle3(folder, target)
    (folder / WEIGHTS).unlink()
    with pytest.raises(StudyError, match="no model.safetensors or pytorch_model.bin in"):
        import_eagle3(folder, target)
    (folder / "pytorch_model.bin").write_bytes(b"no tensors")
    with pytest.raises(StudyError, match="pytorch_model.bin can't be read"):
        import_eagle3(folder, target)
    for content, told in (
        ([1], "can't be read"),
        ({"state_dict": {}}, "has state_dict in <class 'dict'>; export weights"),
    ):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(StudyError, match=told):
            import_eagle3(folder, target)
    for text in ("[]", "{", "{}"):
        (folder / CONFIG).write_text(text)
        with pytest.raises(StudyError, match="give the folder of an EAGLE-3 checkpoint"):
            import_eagle3(folder, target)
    with pytest.raises(StudyError, match="config.json can't be read .*; give the folder of an EAGLE-3 checkpoint"):
        import_eagle3(tmp_path / "nowhere", target)


@given(
    config=st.sets(st.sampled_from(sorted([*FIXED, *HARMLESS]))),
    unknown=st.dictionaries(st.text("abcdefgh_", min_size=12, max_size=14), st.sampled_from([None, 0, 1.5, True, "x", [1]]), max_size=2),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fields_that_change_nothing_are_taken_and_unknown_ones_told(plain, tmp_path, config, unknown):
    drafter, tensors, written = plain
    nested: dict = {"eagle_config": dict(written["eagle_config"]), "speculators_config": {}}
    for name in config:
        place, _, inner = name.rpartition(".")
        (nested[place] if place else nested)[inner] = FIXED.get(name, "anything")
    target, folder = examples.target(), left(tmp_path / "it", tensors, written | nested | unknown)
    if told := [name for name, value in unknown.items() if value is not None]:
        with pytest.raises(StudyError, match=f"has {told[0]}=.* which is not read here"):
            import_eagle3(folder, target)
    else:
        again = import_eagle3(folder, target)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in drafter.state_dict().items())


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(), st.text(max_size=3), st.lists(st.integers(-1, 5), max_size=4),
    st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta"]), st.sampled_from(["yarn", "linear", 2.0, 0, "x"])),
)  # fmt: skip


@given(st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_of_a_field_is_read_or_refused_in_one_line(plain, tmp_path, data):
    _, tensors, written = plain
    for name in data.draw(st.lists(st.sampled_from([*written, *READ, "rope_parameters"]), min_size=1, max_size=3)):
        written = {**written, name: data.draw(JSON)}
    try:
        import_eagle3(left(tmp_path / "it", tensors, written), examples.target())
    except StudyError as refused:
        assert "\n" not in str(refused)


@given(dropped=st.sets(st.sampled_from(NAMES.split())))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_keys_left_out_are_made_again_or_told(plain, tmp_path, dropped):
    """Of the maps one is enough, the head may be the target's; every other tensor is needed."""
    drafter, tensors, config = plain
    folder = left(tmp_path / "it", {name: t for name, t in tensors.items() if name not in dropped}, config)
    needed = dropped - {"d2t", "t2d", "lm_head.weight"}
    if needed or {"d2t", "t2d"} <= dropped:
        with pytest.raises(StudyError, match=min(needed) if needed and not {"d2t", "t2d"} <= dropped else "no map"):
            import_eagle3(folder, examples.target())
    else:
        again = import_eagle3(folder, examples.target())
        assert torch.equal(again.draft_ids, drafter.draft_ids) and torch.equal(again.head, drafter.head)


def test_what_the_format_has_no_place_for_is_refused(tmp_path):
    for variant in ("kv_1", "hybrid", "hidden_2_qk_norm"):
        with pytest.raises(
            StudyError, match="EAGLE-3 has no place for a drafter with .*; export one of the study's 'hidden'"
        ):
            export_eagle3(examples.drafter(variant), examples.target(), tmp_path / "it")
    with pytest.raises(StudyError, match="was trained for target tiny-qwen3"):
        export_eagle3(examples.drafter("hidden", "tiny-qwen3"), examples.target(), tmp_path / "it")
    capped = examples.drafter("hidden")
    capped.logit_cap = 30.0
    with pytest.raises(StudyError, match=r"no place for a drafter with capped logits \(30\)"):
        export_eagle3(capped, examples.target(), tmp_path / "it")
    long = examples.drafter("hidden")
    long.sizes.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(StudyError, match="no place for a drafter with dynamic RoPE"):
        export_eagle3(long, examples.target(), tmp_path / "it")
    assert not (tmp_path / "it").exists()


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
