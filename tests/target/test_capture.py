"""Captured state equals what a plain forward returns, and nothing of the capture stays behind."""

import pytest
import torch

from kvshot_lib.errors import StudyError
from kvshot_lib.target.capture import attention_rows, capture, check_layers, hidden_layers, uniform_layers
from kvshot_lib.target.load import load_target

TARGETS = ["tiny-llama", "tiny-qwen2", "tiny-qwen3"]
EVERY_LAYER = range(4)


@pytest.fixture(params=TARGETS, scope="module")
def model(request):
    return load_target(request.param, device="cpu", dtype="float32").model


def tokens(rows=2, length=23, seed=0):
    return torch.randint(3, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_behind(model):
    """Hooks and recorders on any module, and the attention implementation; transformers has hooks of its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    recorders = [name for name, m in model.named_modules() if "_kvshot_record" in vars(m)]
    return hooks, recorders, {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


@torch.no_grad()
def test_captured_state_equals_a_plain_forward_exactly(model):
    ids = tokens()
    plain = model(ids, output_hidden_states=True, use_cache=True)
    with capture(model, hidden=EVERY_LAYER, kv=EVERY_LAYER) as taken:
        captured = model(ids, use_cache=False)
    assert torch.equal(captured.logits, plain.logits)
    for layer in EVERY_LAYER:
        assert torch.equal(taken.hidden_states[layer], plain.hidden_states[layer])  # the input of layer l
        assert torch.equal(taken.keys[layer], plain.past_key_values.layers[layer].keys)
        assert torch.equal(taken.values[layer], plain.past_key_values.layers[layer].values)
    assert torch.equal(taken.final["hidden"], plain.hidden_states[-1])
    assert torch.equal(model.get_output_embeddings()(taken.final["hidden"]), plain.logits)
    assert not taken.queries


@torch.no_grad()
def test_only_chosen_layers_are_kept_and_each_forward_replaces_the_last(model):
    with capture(model, hidden=[1], kv=[3]) as taken:
        model(tokens(seed=0), use_cache=False)
        first = taken.keys[3]
        model(tokens(seed=1, length=9), use_cache=False)
    assert list(taken.hidden_states) == [1] and list(taken.keys) == list(taken.values) == [3]
    assert first.shape[2] == 23 and taken.keys[3].shape[2] == 9
    with capture(model, hidden=[3, 0, 1]) as taken:
        model(tokens(seed=0), use_cache=False)
    assert list(taken.hidden_states) == [3, 0, 1]  # as asked for: a drafter's maps are in that order


@torch.no_grad()
def test_capture_while_decoding_sees_the_whole_cache(model):
    """A forward of 3 tokens on a cache of 20: keys and values of all 23, hidden states and queries of the new 3."""
    ids = tokens()
    with capture(model, hidden=[2], kv=[2], queries=True) as whole:
        model(ids, use_cache=False)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with capture(model, hidden=[2], kv=[2], queries=True) as taken:
        model(ids[:, 20:], past_key_values=cache)
    assert taken.keys[2].shape[2] == 23 and taken.queries[2].shape[2] == taken.hidden_states[2].shape[1] == 3
    assert torch.allclose(taken.keys[2], whole.keys[2], atol=1e-4)
    assert torch.allclose(taken.queries[2], whole.queries[2][:, :, 20:], atol=1e-4)
    rows = attention_rows(whole.queries[2], whole.keys[2], torch.arange(20, 23))
    assert torch.allclose(attention_rows(taken.queries[2], taken.keys[2], torch.arange(3)), rows, atol=1e-5)


@torch.no_grad()
def test_attention_from_captured_queries_and_cache_is_the_targets_own(model):
    outputs = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out, number=number: outputs.update({number: out[0]}))
        for number, layer in enumerate(model.get_decoder().layers)
    ]
    with capture(model, kv=EVERY_LAYER, queries=True) as taken:
        model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(model.get_decoder().layers):
        weights = attention_rows(taken.queries[number], taken.keys[number], torch.arange(23))
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        assert not weights.triu(1).any()
        values = taken.values[number].repeat_interleave(2, dim=1)
        again = layer.self_attn.o_proj((weights @ values).transpose(1, 2).flatten(2))
        assert (again - outputs[number]).abs().max() < 1e-4
        chosen = attention_rows(taken.queries[number], taken.keys[number], torch.tensor([7, 3]))
        assert torch.allclose(chosen, weights[:, :, [7, 3]], atol=1e-6)


def test_nothing_stays_after_the_block(model):
    before = left_behind(model)
    assert before[1:] == ([], {"sdpa"})
    with capture(model, hidden=EVERY_LAYER, kv=EVERY_LAYER, queries=True):
        inside = left_behind(model)
        assert len(inside[0]) == len(before[0]) + 5 and len(inside[1]) == 4 and inside[2] != {"sdpa"}
        model(tokens(), use_cache=False)
    assert left_behind(model) == before


def test_nothing_stays_after_an_exception(model):
    before = left_behind(model)
    with pytest.raises(ZeroDivisionError), capture(model, hidden=EVERY_LAYER, kv=EVERY_LAYER):
        model(tokens(), use_cache=False)
        raise ZeroDivisionError
    assert left_behind(model) == before
    with pytest.raises(IndexError), capture(model, hidden=EVERY_LAYER, kv=EVERY_LAYER):
        model(tokens() + 512, use_cache=False)  # the target itself fails
    assert left_behind(model) == before


def test_nothing_stays_after_a_refusal(model):
    before = left_behind(model)
    with pytest.raises(StudyError), capture(model, hidden=[0], kv=[4]):
        pass
    assert left_behind(model) == before


def test_generation_is_the_same_during_and_after(model):
    def generated():
        options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones(2, 23, dtype=torch.int64)}
        return model.generate(tokens(), **options).tolist()

    before = generated()
    with capture(model, hidden=EVERY_LAYER, kv=EVERY_LAYER, queries=True):
        during = generated()
    assert before == during == generated()


def test_layers_out_of_range_are_refused(model):
    for layers in ({"hidden": [4]}, {"kv": [4]}, {"hidden": [-1]}, {"kv": [0, 9]}):
        refused = pytest.raises(StudyError, match="out of range; this target has layers 0 to 3")
        with refused, capture(model, **layers):
            pass


def test_sliding_layers_are_refused_by_name_of_those_that_can_be_reused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen2", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    mixed = AutoModelForCausalLM.from_config(config)
    check_layers(mixed, hidden=[0, 1, 2], kv=[0])
    with pytest.raises(StudyError, match=r"layer 2 keeps only a sliding window.*reused: \[0\]"):
        check_layers(mixed, hidden=[], kv=[0, 2])


def test_layer_choices_by_hand():
    assert hidden_layers(30) == (2, 15, 27) and hidden_layers(36) == (2, 18, 33)  # EAGLE: 2, L/2, L-3
    assert hidden_layers(4) == (0, 2, 3)
    for number in range(3, 40):
        low, middle, high = hidden_layers(number)
        assert 0 <= low < middle < high < number
    assert uniform_layers(range(30), 3) == (9, 19, 29)
    assert uniform_layers(range(30), 1) == (29,)
    assert uniform_layers([5, 11, 17], 3) == (5, 11, 17)
    for count in (0, 31):
        with pytest.raises(StudyError, match="give a number from 1 to 30"):
            uniform_layers(range(30), count)
