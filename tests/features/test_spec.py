"""Features of a batch: what each field holds, padding, and bad choices refused."""

from dataclasses import replace

import examples
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import STATE, feature_spec, pad_documents
from kvshot_lib.text.corpus import Document


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
@torch.no_grad()
def test_a_batch_holds_what_a_plain_forward_of_each_document_gives(name):
    target, batch = examples.target(name), examples.features(name)
    spec = examples.live(name).spec
    assert spec.hidden_layers == (0, 2, 3) and spec.kv_layers == (0, 2, 3)
    for row, document in enumerate(examples.DOCUMENTS):
        n, ids = len(document.tokens), torch.from_numpy(document.tokens.astype("int64"))[None]
        plain = target.model(ids, output_hidden_states=True, use_cache=True)
        assert torch.equal(batch.tokens[row, :n], ids[0]) and not batch.tokens[row, n:].any()
        assert batch.answer_mask[row, :n].tolist() == document.answer_mask.tolist()
        assert not batch.answer_mask[row, n:].any()
        for place, layer in enumerate(spec.hidden_layers):
            assert torch.allclose(batch.hidden_states[row, :n, place], plain.hidden_states[layer][0], atol=1e-5)
        for place, layer in enumerate(spec.kv_layers):
            cached = plain.past_key_values.layers[layer]
            assert torch.allclose(batch.keys[row, :n, place], cached.keys[0].transpose(0, 1), atol=1e-4)
            assert torch.allclose(batch.values[row, :n, place], cached.values[0].transpose(0, 1), atol=1e-4)
        assert torch.allclose(batch.final_hidden[row, :n], plain.hidden_states[-1][0], atol=1e-4)
        assert torch.equal(batch.target_argmax[row, :n], plain.logits[0].argmax(-1))


def test_only_the_fields_asked_for_are_read():
    batch = examples.live().batch([0], ("keys", "target_argmax"))
    assert {name for name in STATE if getattr(batch, name) is not None} == {"keys", "target_argmax"}
    whole = examples.features(documents=(0,))
    assert torch.equal(batch.keys, whole.keys) and torch.equal(batch.target_argmax, whole.target_argmax)


def test_long_documents_are_cut():
    source = LiveFeatures(examples.target(), examples.DOCUMENTS, examples.live().spec, max_length_tokens=10)
    assert source.lengths == [10, 10, 10, 7, 10] and len(source) == 5
    assert source.batch([0, 1]).final_hidden.shape == (2, 10, 64)


def test_documents_whose_answer_is_cut_off_are_left_out_and_told(capsys):
    """Answers of the five documents begin at token 3, 2, 2, never and 1; twelve, thirteen, three, no and fourteen tokens."""
    spec = examples.live().spec
    whole = LiveFeatures(examples.target(), examples.DOCUMENTS, spec)
    assert len(whole) == 5 and capsys.readouterr().out == ""
    source = LiveFeatures(examples.target(), examples.DOCUMENTS, spec, max_length_tokens=2)
    assert source.lengths == [2, 2] and source.given_documents == 5  # the one without any answer stays as it was given
    lost = sum(int(d.answer_mask.sum()) for d in examples.DOCUMENTS) - 1
    told = "3 of 5 documents have no answer within max_length_tokens=2 and are left out; "
    assert capsys.readouterr().out == f"{told}{lost} of {lost + 1} answer tokens are cut\n"
    with pytest.raises(StudyError, match="no answer begins within max_length_tokens=1; set more"):
        LiveFeatures(examples.target(), examples.DOCUMENTS[:3], spec, max_length_tokens=1)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6), st.integers(1, 20))
def test_no_document_is_left_without_an_answer_that_it_had(shapes, most):
    documents = [examples.document("0" * prompt + "1" * answer) for prompt, answer in shapes if prompt + answer]
    has = [d for d in documents if d.answer_mask[:most].any() or not d.answer_mask.any()]
    if not has:
        with pytest.raises(StudyError, match=r"no answer begins within|hold nothing to read"):
            LiveFeatures(examples.target(), documents, examples.live().spec, most)
        return
    source = LiveFeatures(examples.target(), documents, examples.live().spec, most)
    assert [d.tokens.tolist() for d in source.documents] == [d.tokens[:most].tolist() for d in has]
    assert source.given_documents == len(documents)


@pytest.mark.parametrize("wrong", [0, -3, True, "9", 9.5, None])
def test_lengths_that_are_none_are_refused(wrong):
    with pytest.raises(StudyError, match="max_length_tokens=.* must be a whole number|hold nothing to read"):
        LiveFeatures(examples.target(), examples.DOCUMENTS, examples.live().spec, wrong)


def test_layers_of_another_target_are_refused():
    with pytest.raises(StudyError, match=r"for target tiny-llama .*, not for tiny-qwen3 .*anew"):
        LiveFeatures(examples.target("tiny-qwen3"), examples.DOCUMENTS, examples.live().spec)


def test_padding_by_hand():
    documents = [
        Document(np.array([5, 6, 7]), np.array([False, True, True])),
        Document(np.array([8]), np.array([True])),
    ]
    batch = pad_documents(documents, [1, 0])
    assert batch.tokens.tolist() == [[8, 0, 0], [5, 6, 7]]
    assert batch.answer_mask.tolist() == [[True, False, False], [False, True, True]]
    assert batch.documents.tolist() == [1, 0] and batch.keys is None


def test_argmax_in_chunks_is_the_argmax():
    hidden = examples.features().final_hidden
    head = examples.target().model.get_output_embeddings()
    assert torch.equal(examples.live().argmax(hidden, rows=7), head(hidden).argmax(-1))


def test_moving_changes_floating_point_fields_alone():
    moved = examples.features().to("cpu", torch.bfloat16)
    assert {name for name in STATE if getattr(moved, name).dtype == torch.bfloat16} == set(STATE) - {"target_argmax"}
    assert moved.tokens.dtype == moved.target_argmax.dtype == torch.int64 and moved.answer_mask.dtype == torch.bool
    assert replace(moved, keys=None).to("cpu").keys is None


def test_bytes_of_a_token_by_hand():
    """Two bytes a number: 3 hidden states of 64; keys, and values, of 3 layers × 2 heads × 16; one final state."""
    wanted = {"hidden_states": 384, "keys": 192, "values": 192, "final_hidden": 128, "target_argmax": 4}
    assert examples.live().spec.bytes_per_token == wanted


def test_layer_choices():
    target = examples.target()
    assert feature_spec(target, 1).kv_layers == (3,) and feature_spec(target, [1, 2]).kv_layers == (1, 2)
    assert feature_spec(target, fused_layers=[0, 1]).hidden_layers == (0, 1)
    with pytest.raises(StudyError, match="give a number from 1 to 4"):
        feature_spec(target, 5)


@pytest.mark.parametrize("options", [{"kv_layers": [1, 4]}, {"kv_layers": [-1]}, {"fused_layers": [0, 7]}])
def test_layers_out_of_range_are_refused_before_anything_runs(options):
    with pytest.raises(StudyError, match="out of range; this target has layers 0 to 3"):
        feature_spec(examples.target(), **options)


def test_tokens_of_a_larger_vocabulary_are_refused():
    foreign = Document(np.array([3, 700]), np.array([False, True]))
    with pytest.raises(
        StudyError, match="token id 700, target tiny-llama only 512; use a corpus made with this target"
    ):
        examples.live_of(foreign)


def test_reusing_no_layer_is_refused():
    with pytest.raises(StudyError, match="reuses nothing"):
        feature_spec(examples.target(), [])
