"""Features in memory are those of their source, document by document."""

import examples
import pytest
import torch

from kvshot_lib.errors import StudyError
from kvshot_lib.features.resident import ResidentFeatures
from kvshot_lib.features.spec import STATE
from kvshot_lib.features.store import StoredFeatures, write_store


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path, examples.live(), dtype=torch.float32)
    return StoredFeatures(tmp_path)


def assert_same(one, other):
    for name, tensor in vars(one).items():
        found = getattr(other, name)
        assert (tensor is None and found is None) or torch.equal(tensor, found), name


@pytest.mark.parametrize("batch_documents", [1, 2, 64])
def test_every_batch_is_the_stores(store, batch_documents):
    resident = ResidentFeatures(store, "cpu", batch_documents=batch_documents)
    assert len(resident) == 5 and resident.lengths == store.lengths and resident.documents_hash == store.documents_hash
    for documents in ((0,), (3, 1), (4, 2, 0, 1, 3), (2, 2)):
        assert_same(resident.batch(documents), store.batch(documents))
    assert_same(resident.batch((1, 3), ("keys", "target_argmax")), store.batch((1, 3), ("keys", "target_argmax")))


def test_some_target_layers_of_what_is_there(store):
    layers = store.spec.kv_layers
    for chosen in ((layers[2],), (layers[0], layers[2])):
        fewer, resident = store.with_layers(chosen), ResidentFeatures(store, "cpu").with_layers(chosen)
        places = [layers.index(layer) for layer in chosen]
        assert fewer.spec.kv_layers == resident.spec.kv_layers == chosen
        assert torch.equal(fewer.batch((0, 1)).keys, store.batch((0, 1)).keys[:, :, places])
        assert_same(fewer.batch((0, 1)), resident.batch((0, 1)))
    assert store.batch((0,)).keys.shape[2] == 3


def test_layers_that_were_not_extracted_are_refused_with_the_way_to_get_them(store):
    told = r"target layers \[1\] were recorded, only of \[0, 2, 3\]; run notebook 01.*kv_layers=\[0, 1, 2, 3\]"
    for source in (store, ResidentFeatures(store, "cpu")):
        with pytest.raises(StudyError, match=told):
            source.with_layers((0, 1))


def test_padding_is_zero(store):
    batch = ResidentFeatures(store, "cpu").batch((3, 1))  # 7 and 19 tokens
    assert not any(getattr(batch, name)[0, 7:].any() for name in ("tokens", "answer_mask", *STATE))


def test_hidden_states_of_some_layers_and_views_of_views(store):
    held, layers = ResidentFeatures(store, "cpu"), store.spec.hidden_layers
    for source in (store, held):
        fewer = source.with_layers(hidden=layers[1:])
        assert fewer.spec.hidden_layers == layers[1:] and fewer.spec.kv_layers == store.spec.kv_layers
        assert torch.equal(fewer.batch((0, 1)).hidden_states, store.batch((0, 1)).hidden_states[:, :, 1:])
        last = fewer.with_layers(kv=store.spec.kv_layers[:1]).with_layers(hidden=layers[2:])
        assert torch.equal(last.batch((0,)).hidden_states, store.batch((0,)).hidden_states[:, :, 2:])
        assert torch.equal(last.batch((0,)).keys, store.batch((0,)).keys[:, :, :1])
        with pytest.raises(StudyError, match=r"no inputs of target layers \[1\] .*state_layers='kv'"):
            source.with_layers(hidden=(1,))
