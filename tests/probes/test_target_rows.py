"""The target's own rows: hand-made divergences, rows that give the target's outputs, refusals, a target left as it was."""

import math

import pytest
import torch
from examples import DOCUMENTS, target
from test_capture import left_behind

from kvshot_lib.errors import StudyError
from kvshot_lib.probes.shift import shift_document
from kvshot_lib.probes.target_rows import (
    check_rows,
    compute_state,
    jensen_shannon,
    row_error,
)
from kvshot_lib.target.load import load_target

LAYERS = (1, 2, 3)


def test_divergence_of_hand_made_rows():
    same, other = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.2, 0.8])
    assert jensen_shannon(same, same).item() == 0
    assert jensen_shannon(same, other).item() == pytest.approx(math.log(2))
    # [1, 0] and [1/2, 1/2]: mean [3/4, 1/4]
    by_hand = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert jensen_shannon(torch.tensor([1.0, 0]), torch.tensor([0.5, 0.5])).item() == pytest.approx(by_hand)
    assert jensen_shannon(torch.tensor([3.0, 0]), torch.tensor([2.0, 2])).item() == pytest.approx(
        by_hand
    )  # made to sum to 1
    assert jensen_shannon(torch.zeros(2), same[:2]).isnan()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_recomputed_rows_give_the_targets_attention_output(name):
    tokens = torch.from_numpy(DOCUMENTS[1].tokens).long()
    assert row_error(target(name), range(4), tokens) < 1e-4
    check_rows(target(name), range(4), tokens)


def test_rows_are_the_targets_own_attention():
    """Rows of the kept state, on the target's values, give what enters its output projection."""
    tokens, layers = torch.from_numpy(DOCUMENTS[1].tokens).long(), (1, 3)
    state = compute_state(target(), tokens, layers)
    assert state.queries.shape == (2, 4, len(tokens), 16) and state.keys.shape == (2, 2, len(tokens), 16)
    decoder, entering = target().model.get_decoder(), {}
    for layer in layers:
        module = decoder.layers[layer].self_attn.o_proj
        handle = module.register_forward_pre_hook(lambda _m, given, layer=layer: entering.update({layer: given[0]}))
        cache = target().model(tokens[None], use_cache=True).past_key_values
        handle.remove()
        rows = state.rows(layers.index(layer), torch.arange(len(tokens)))
        values = cache.layers[layer].values[0].repeat_interleave(2, 0)
        assert torch.allclose((rows @ values).transpose(0, 1).flatten(1), entering[layer][0], atol=1e-4)


def test_target_without_comparable_rows_is_refused_by_name():
    sliding = load_target("tiny-qwen3", device="cpu", dtype="float32")
    sliding.model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    tokens = torch.arange(3, 12)
    with pytest.raises(StudyError, match="layer 1 keeps only a sliding window"):
        check_rows(sliding, [1], tokens)
    with pytest.raises(StudyError, match="layer 1 keeps only a sliding window"):
        shift_document(sliding, tokens, torch.tensor([2]), [0], [1])
    odd = load_target("tiny-llama", device="cpu", dtype="float32")
    attention = odd.model.get_decoder().layers[2].self_attn
    attention.scaling *= 3  # another temperature is in the captured queries
    check_rows(odd, [2], tokens)
    attention.o_proj.register_forward_pre_hook(
        lambda _module, given: (given[0] * 1.5,)
    )  # as a target with gated outputs would
    with pytest.raises(StudyError, match=r"target tiny-llama: attention recomputed .* in layers \[2\]"):
        check_rows(odd, [2], tokens)


def test_target_is_left_as_it_was_also_after_an_error(monkeypatch):
    loaded = load_target("tiny-llama", device="cpu", dtype="float32")
    tokens = torch.arange(3, 20)
    before = left_behind(loaded.model), loaded.model(tokens[None]).logits, loaded.hash
    row_error(loaded, LAYERS, tokens)
    shift_document(loaded, tokens, torch.tensor([4]), [0], LAYERS)

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(type(loaded.model.get_decoder().layers[3]), "forward", broken)
        row_error(loaded, LAYERS, tokens)
    assert left_behind(loaded.model) == before[0]
    assert torch.equal(loaded.model(tokens[None]).logits, before[1])
    assert load_target("tiny-llama", device="cpu", dtype="float32").hash == before[2]
