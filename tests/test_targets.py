"""Other families than the default target's: what a drafter shares with each is what the target itself uses."""

from functools import cache

import examples
import pytest
import torch
from examples import DRAFT_IDS, STEPS, VARIANTS
from test_decode import adversary, alone, prompt
from test_propose import FORK, PROMPT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.drafters.attention import prefix_mask
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.drafters.layers import View
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.probes import gradients as gradient_flow
from kvshot_lib.probes.shift import entropy, shift_document
from kvshot_lib.probes.target_rows import check_rows
from kvshot_lib.target.capture import capture
from kvshot_lib.target.load import Target, full_attention_layers, load_target
from kvshot_lib.target.shared import capped, check_length, norm_gain, rope_limit, rope_parameters
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.config import TrainConfig
from kvshot_lib.training.loop import train
from kvshot_lib.training.loss import score_rows

FAMILIES = ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-olmo2", "tiny-gemma3"]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@cache
def uneven(name: str) -> Target:
    """The tiny target with norm weights that are neither 0 nor 1, so that a norm read in the wrong way shows."""
    target, chance = load_target(name, device="cpu", dtype="float32"), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in target.model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=chance)
    return target


def made(family: str, **options) -> Target:
    """A small random target of any family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    return Target(family, model, None, "made", "none")


def live(target: Target, **options) -> LiveFeatures:
    return LiveFeatures(target, examples.DOCUMENTS, feature_spec(target), **options)


def test_gemma_slides_and_sees_everything_by_turns():
    assert full_attention_layers(uneven("tiny-gemma3").model) == [1, 3, 5]
    assert feature_spec(uneven("tiny-gemma3"), 2).kv_layers == (3, 5)
    with pytest.raises(StudyError, match=r"layer 2 keeps only a sliding window.*reused: \[1, 3, 5\]"):
        feature_spec(uneven("tiny-gemma3"), [2])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_embedding_logits_and_norm_are_the_targets_own(name):
    target = uneven(name)
    ids, model = torch.tensor([PROMPT]), target.model
    built = build_drafter(VARIANTS["hidden"], target, feature_spec(target), DRAFT_IDS)
    with capture(model, hidden=[0]) as taken:
        logits = model(ids, use_cache=False).logits
    final = taken.final["hidden"]
    assert torch.equal(built.embed(ids), taken.hidden_states[0])
    assert torch.equal(target.logits(final), logits)
    torch.testing.assert_close(built.logits(final), logits[..., DRAFT_IDS])
    torch.testing.assert_close(built.norm(final), model.get_decoder().norm(final))
    p = logits.float().softmax(-1)[0]
    torch.testing.assert_close(entropy(target, final[0]), -(p * p.log()).sum(-1))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_rope_is_that_of_the_reused_layers_and_unrotate_takes_it_off(name):
    """Keys taken apart and put together again by `unrotate` with the identity as its map are the cached ones."""
    assert_rope_fits(uneven(name))


def assert_rope_fits(target: Target) -> None:
    decoder = target.model.get_decoder()
    config = DrafterConfig("kv", 1, kv_layers=1, kv_rope="unrotate")
    source = LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, 1))
    built, features = build_drafter(config, target, source.spec, DRAFT_IDS % target.vocab_size), source.batch([0, 1])
    places = torch.arange(features.tokens.shape[1])[None]
    x = built.embed(features.tokens)
    several = {"layer_type": "full_attention"} if isinstance(decoder.rotary_emb.rope_type, dict) else {}
    for ours, theirs in zip(built.rotary(x, places), decoder.rotary_emb(x, places, **several), strict=True):
        torch.testing.assert_close(ours, theirs)
    fusion = built.layers[0].fusion
    fusion.keys.weight.copy_(torch.eye(len(fusion.keys.weight)))
    entries = built.prefix(features)[0][0]["cross"][0]
    torch.testing.assert_close(entries, features.keys[:, :-1, 0].transpose(1, 2), atol=1e-5, rtol=1e-4)
    plain = {}
    layer = decoder.layers[source.spec.kv_layers[0]].self_attn
    read = lambda _module, _given, out: plain.update(keys=out)
    handle = (layer.k_norm if hasattr(layer, "k_norm") else layer.k_proj).register_forward_hook(read)
    decoder(input_ids=features.tokens, use_cache=False)
    handle.remove()
    keys = plain["keys"]
    if keys.shape[1] == places.shape[1]:  # not yet [B, G, n, D]
        keys = keys.reshape(*places.expand(2, -1).shape, -1, built.spec.head_dim).transpose(1, 2)
    turned = apply_rotary_pos_emb(keys, keys, *built.rotary(x, places))[0]  # from the target's keys before RoPE
    torch.testing.assert_close(turned.transpose(1, 2), features.keys[:, :, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral"])
@torch.no_grad()
def test_a_kv_layer_with_the_targets_weights_is_the_targets_layer(name):
    """As in test_drafters; of the other families, layers have biases, norms or activations that a drafter's haven't."""
    target, built, t = examples.target(name), examples.target_layer_as_drafter(name), 5
    features = examples.features(name, documents=(0,))
    plain = target.model(features.tokens, output_hidden_states=True)
    prefix, _ = built.prefix(features)
    mask = prefix_mask(torch.tensor([[t + 1]]), features.tokens.shape[1] - 1)
    state = plain.hidden_states[3][:, t + 1 : t + 2]
    out, _ = built.layers[0](None, state, built.rotary(state, torch.tensor([[t + 1]])), View(prefix[0], mask, {}, True))
    torch.testing.assert_close(built.norm(out), plain.hidden_states[4][:, t + 1 : t + 2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_captured_is_what_the_cache_holds(name):
    target = uneven(name)
    full = full_attention_layers(target.model)
    plain = target.model(torch.tensor([PROMPT]), use_cache=True)
    with capture(target.model, kv=full) as taken:
        again = target.model(torch.tensor([PROMPT]), use_cache=False)
    assert torch.equal(plain.logits, again.logits)
    for layer in full:
        assert torch.equal(taken.keys[layer], plain.past_key_values.layers[layer].keys)
        assert torch.equal(taken.values[layer], plain.past_key_values.layers[layer].values)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_drafter_trains_decodes_and_is_diagnosed(name, tmp_path):
    """A dozen steps on five documents: losses fall; decoding is lossless in chain and tree; diagnostics run too."""
    target, source = uneven(name), live(uneven(name))
    built = build_drafter(VARIANTS["hybrid"], target, source.spec, DRAFT_IDS)
    config = TrainConfig(epochs=5, batch_documents=2, validate_every=3, anchor_fraction=1.0, learning_rate=3e-3)
    history = train(built, source, source, config, tmp_path)
    losses = history[(history["split"] == "train") & (history["draft_step"] == 0)]["loss"]
    assert losses.iloc[-1] < losses.iloc[0] - 0.3
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    alone = target.model.generate(ids, **options)[0, len(PROMPT) :].tolist()
    for plan in (Chain(4), Tree(3, 4, 16)):
        assert decode(target, built, PROMPT, plan, max_new_tokens=24, eos_token_ids=()).tokens == alone
    layers = full_attention_layers(target.model)
    check_rows(target, layers, ids[0])
    assert shift_document(target, ids[0], torch.tensor([3, 5]), [0, 2], layers).isfinite().all()
    features = source.batch([0, 4])
    rows = gradient_flow.measure(built, features, find_anchors(features.answer_mask, STEPS), STEPS)
    assert rows and all(torch.tensor(row["value"]).isfinite() for row in rows)


@torch.no_grad()
def test_every_branch_of_a_tree_is_verified_with_the_windows_of_its_own_place():
    """A prompt longer than the window, branches whose windows end at different places, a rollback past them."""
    target, prompt = uneven("tiny-gemma3"), [*PROMPT, 9, 30, 31, 32, 33]
    assert len(prompt) > target.config.sliding_window
    with capture(target.model) as taken:
        run = TargetRun(target, taken)
        run.prefill(prompt)
        logits = run.verify(FORK)
        for node, branch in enumerate([[40], [40, 41], [40, 42], [40, 41, 43], [40, 42, 44]]):
            alone = target.model(torch.tensor([prompt + branch])).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, atol=2e-5, rtol=1e-4)
        run.keep([0, 2, 4])
        logits = run.verify(FORK)
        wanted = target.model(torch.tensor([[*prompt, 40, 42, 44, 40, 41, 43]])).logits[0, -1]
        torch.testing.assert_close(logits[3], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", [Chain(5), Tree(3, 4, 14)], ids=str)
@pytest.mark.parametrize("kind", ["often_right", "second_best_is_right"])
def test_rolling_back_is_lossless_where_layers_slide(kind, plan):
    told = decode(
        examples.target("tiny-gemma3"),
        adversary(kind, "tiny-gemma3", 1),
        prompt(1),
        plan,
        max_new_tokens=24,
        eos_token_ids=(),
    )
    assert told.tokens == alone("tiny-gemma3", 1)[:24]
    assert len(set(told.tokens)) > 12 and (sum(told.accepted) >= 4) == (kind == "often_right" or isinstance(plan, Tree))


def test_the_gradient_of_capped_logits_is_autograds():
    chance = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(5, 7, generator=chance)).requires_grad_()
    p, weight = torch.rand(5, 7, generator=chance).softmax(-1), torch.rand(5, generator=chance)
    loss = -(weight[:, None] * p * capped(logits, 20.0).log_softmax(-1)).sum()
    (wanted,) = torch.autograd.grad(loss, logits)
    total, best, gradient = score_rows(logits.detach().clone(), p, torch.arange(5), weight, 20.0)
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(gradient, wanted)
    assert torch.equal(best, logits.argmax(-1))
    assert capped(torch.tensor(20.0), 20.0).item() == pytest.approx(20 * 0.76159416) and capped(logits, 0.0) is logits


# Long context: types of RoPE

SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def scaled(kind: str, family: str = "llama") -> Target:
    return made(family, vocab_size=512, rope_parameters={"rope_type": kind, "rope_theta": 1000.0, **SCALED[kind]})


@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_scaled_rope_goes_to_the_drafter_and_comes_off_its_keys(kind):
    target = scaled(kind)
    assert_rope_fits(target)
    scaling = target.model.get_decoder().rotary_emb.attention_scaling
    assert (scaling > 1.01) == (kind in ("yarn", "longrope"))  # what `unrotate` has to divide by
    plain = made("llama", vocab_size=512, rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    same = torch.equal(live(target).batch([0]).keys, live(plain).batch([0]).keys)
    assert same == (kind == "dynamic")  # which changes nothing below its limit


def test_lengths_at_which_rope_changes_its_angles_are_refused():
    assert [rope_limit(scaled(kind).config) for kind in SCALED] == [None, 64, None, None, 32]
    for kind, limit in (("dynamic", 64), ("longrope", 32)):
        target = scaled(kind)
        check_length(target, limit, "")
        long = examples.document("0" + "1" * limit)
        message = f"{limit + 1} tokens: the {kind} RoPE of target llama .* beyond {limit} tokens; set a smaller max"
        with pytest.raises(StudyError, match=message) as error:
            LiveFeatures(target, [long], feature_spec(target))
        assert "\n" not in str(error.value)
        assert len(LiveFeatures(target, [long], feature_spec(target), max_length_tokens=limit)) == 1
    with pytest.raises(StudyError, match="41 tokens: .*give a shorter prompt or fewer max_new_tokens"):
        decode(scaled("longrope"), None, [5] * 31, max_new_tokens=10)


def test_other_kinds_of_rope_are_refused():
    part = made("llama").config
    part.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(StudyError, match="this target rotates 50% of each head, drafters all of it"):
        rope_parameters(part)
    part.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    with pytest.raises(
        StudyError, match="RoPE of type 'proportional' is not known .* longrope, llama3; choose another"
    ):
        rope_parameters(part)
    part.no_rope_layers = [1, 0, 1]
    with pytest.raises(StudyError, match="a llama target leaves RoPE out in some layers, drafters in none"):
        rope_parameters(part)
    part.rope_parameters = None
    with pytest.raises(StudyError, match="a llama target has no RoPE in its full-attention layers"):
        rope_parameters(part)


# Families with a twist that drafters don't imitate


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("granite", {"embedding_multiplier": 12.0}, r"granite \(GraniteForCausalLM\) changes its embeddings before"),
        ("granite", {"logits_scaling": 8.0}, r"target granite \(GraniteForCausalLM\) forms its logits in a way"),
        ("cohere", {"logit_scale": 1.0}, "target cohere has CohereLayerNorm as its last norm"),
        ("gemma2", {}, "target Gemma2ForCausalLM caps its attention scores"),
    ],
)  # fmt: skip
def test_what_drafters_do_not_imitate_is_refused_by_name(family, options, message):
    target = made(family, **options)
    with pytest.raises(StudyError, match=message) as error:
        build_drafter(VARIANTS["kv_1"], target, feature_spec(target), torch.arange(32))
    assert "\n" not in str(error.value) and str(error.value).endswith("choose another target")


def test_a_norms_gain_is_read_off_its_output():
    gemma, llama = (uneven(name).model.get_decoder().norm for name in ("tiny-gemma3", "tiny-llama"))
    assert torch.equal(norm_gain(gemma, ""), 1 + gemma.weight) and torch.equal(norm_gain(llama, ""), llama.weight)


def test_kv_init_counts_in_the_gain_of_gemmas_norms():
    target = uneven("tiny-gemma3")
    spec = feature_spec(target, 1)
    built = build_drafter(DrafterConfig("kv", kv_layers=1, kv_init="target"), target, spec, DRAFT_IDS)
    layer, fusion = target.model.get_decoder().layers[spec.kv_layers[0]], built.layers[0].fusion
    wanted = fusion.keys.weight @ (layer.self_attn.k_proj.weight * (1 + layer.input_layernorm.weight))
    torch.testing.assert_close(built.layers[0].attention.k_proj.weight.detach(), wanted.detach())
