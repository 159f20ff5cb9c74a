"""The feature store: what is written is read back, a kill is resumed, and a damaged or foreign store is refused."""

import errno
import json
import shutil
from types import SimpleNamespace

import examples
import pytest
import torch
from safetensors import SafetensorError

from kvshot_lib.errors import StudyError
from kvshot_lib.features import store as feature_store
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import STATE, feature_spec
from kvshot_lib.features.store import MANIFEST, StoredFeatures, write_store
from kvshot_lib.files import read_json
from kvshot_lib.target.load import load_target

FIELDS = ("tokens", "answer_mask", "documents", *STATE)
SMALL = {"batch_documents": 2, "shard_documents": 2, "dtype": torch.float32}  # 5 documents: 3 shards


@pytest.fixture
def live():
    return examples.live()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "train"


@pytest.fixture
def store(folder, live):
    write_store(folder, live, **SMALL)
    return folder


@pytest.fixture
def written(monkeypatch):
    """Names of the shards written, in order."""
    names, save = [], feature_store.save_file
    monkeypatch.setattr(
        feature_store, "save_file", lambda tensors, path: names.append(path.name.split(".")[1]) or save(tensors, path)
    )
    return names


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def assert_equal(found, wanted, atol=0.0):
    for name in FIELDS:
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.allclose(a.float(), b.float(), atol=atol, rtol=atol), name


def zero_padding(batch, lengths):
    """A live batch holds the target's state of padding too; a stored one holds zeros there."""
    for row, length in enumerate(lengths):
        for name in STATE:
            getattr(batch, name)[row, length:] = 0
    return batch


def test_a_store_gives_the_batches_of_the_live_target(store, live):
    stored = StoredFeatures(store)
    assert len(stored) == len(live) == 5 and stored.lengths == live.lengths and stored.spec == live.spec
    for indices in ([0], [3, 1], [4, 2, 0], list(range(5))):
        found, wanted = stored.batch(indices), live.batch(indices)
        assert_equal(found, zero_padding(wanted, [live.lengths[i] for i in indices]), atol=1e-5)


def test_documents_of_one_batch_are_stored_to_the_last_bit(folder, live):
    write_store(folder, live, batch_documents=1, shard_documents=3, dtype=torch.float32)
    for index in range(5):
        assert_equal(StoredFeatures(folder).batch([index]), live.batch([index]))


def test_only_the_fields_asked_for_are_read(store):
    batch = StoredFeatures(store).batch([1, 2], ("values",))
    assert batch.values.shape == (2, 19, 3, 2, 16)
    assert all(getattr(batch, name) is None for name in STATE if name != "values")


def test_bfloat16_is_the_rounded_state(folder, live):
    write_store(folder, live, batch_documents=1)
    found, wanted = StoredFeatures(folder).batch([1]), live.batch([1])
    assert found.keys.dtype == torch.bfloat16 and torch.equal(found.keys, wanted.keys.bfloat16())
    assert torch.equal(found.target_argmax, wanted.target_argmax)


def test_the_manifest_tells_what_is_in_the_store(store, live):
    manifest = json.loads((store / MANIFEST).read_text())
    assert manifest["complete"] and manifest["dtype"] == "float32"
    assert manifest["spec"]["target_hash"] == live.target.hash and manifest["spec"]["kv_layers"] == [0, 2, 3]
    assert [shard["documents"] for shard in manifest["shards"]] == [2, 2, 1]
    assert sorted(path.name for path in store.iterdir()) == [MANIFEST, *(s["file"] for s in manifest["shards"])]


def test_the_same_store_is_not_written_again(store, live, written):
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    write_store(store, live, **SMALL)
    assert written == [] and {path.name: path.read_bytes() for path in store.iterdir()} == before


# Kills and full disks


def fail_at(monkeypatch, shard: int, error: BaseException, partial: bool = False):
    """Let writing shard number ``shard`` fail, maybe after half a file."""
    save, calls = feature_store.save_file, iter(range(99))

    def failing(tensors, path):
        if next(calls) == shard:
            if partial:
                path.write_bytes(b"half a shard")
            raise error
        save(tensors, path)

    monkeypatch.setattr(feature_store, "save_file", failing)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_killed_extraction_goes_on_after_the_last_whole_shard(folder, live, tmp_path, monkeypatch, shard):
    with monkeypatch.context() as patched:
        fail_at(patched, shard, KeyboardInterrupt(), partial=True)
        with pytest.raises(KeyboardInterrupt):
            write_store(folder, live, **SMALL)
    if shard:
        with pytest.raises(StudyError, match="not finished; run notebook 01_extract_kv_cache again, it resumes"):
            StoredFeatures(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == shard
    write_store(folder, live, **SMALL)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}.items()
    whole = write_store(tmp_path / "undisturbed", live, **SMALL)
    assert read_json(folder / MANIFEST, "") == whole


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_costs_no_finished_shard(folder, live, monkeypatch, written, error):
    with monkeypatch.context() as patched:
        fail_at(patched, 1, error, partial=True)
        with pytest.raises(StudyError, match="no space left on device; free some space.*then run again") as caught:
            write_store(folder, live, **SMALL)
        one_line(caught)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "shard-00000.json", "shard-00000.safetensors"]
    written.clear()
    write_store(folder, live, **SMALL)
    assert written == ["shard-00001", "shard-00002"] and len(StoredFeatures(folder)) == 5


def test_too_little_space_is_told_before_anything_runs(folder, live, monkeypatch, written):
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(StudyError, match="features need .* GB, .* GB free; free some space or use fewer") as error:
        write_store(folder, live, **SMALL)
    one_line(error)
    assert written == [] and not folder.exists()


# Damaged and foreign stores


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_byte, "was altered"), (truncate, "bytes, its manifest says"), (lambda path: path.unlink(), "is missing")],
)
def test_a_damaged_shard_is_refused_and_made_anew(store, live, written, damage, message):
    damage(store / "shard-00001.safetensors")
    with pytest.raises(
        StudyError, match=f"shard-00001.safetensors.*{message}.*run notebook 01_extract_kv_cache again"
    ) as error:
        StoredFeatures(store)
    one_line(error)
    write_store(store, live, **SMALL)
    assert written == ["shard-00001"]
    assert_equal(StoredFeatures(store).batch([2]), live.batch([2]), atol=1e-5)


def test_a_missing_or_damaged_store_is_refused(store, tmp_path):
    with pytest.raises(StudyError, match="no feature store at .*; run notebook 01_extract_kv_cache"):
        StoredFeatures(tmp_path / "nothing")
    for text in ("{", "[]", "{}"):
        (store / MANIFEST).write_text(text)
        with pytest.raises(
            StudyError, match=r"manifest.json (is damaged|can't be read).*; delete that folder"
        ) as error:
            StoredFeatures(store)
        one_line(error)


def other_sources():
    target = examples.target()
    return {
        "kv_layers": LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, [1])),
        "hidden_layers": LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, fused_layers=[0, 1, 2])),
        "target, target_hash": examples.live("tiny-qwen3"),
        "lengths, documents_hash": examples.live_of(*examples.DOCUMENTS[:4]),
        "documents_hash": examples.live_of(*examples.DOCUMENTS[:4], examples.document("011111111111111", seed=8)),
        "target_dtype": LiveFeatures(
            load_target("tiny-llama", device="cpu", dtype="bfloat16"), examples.DOCUMENTS, examples.live().spec
        ),
    }


@pytest.mark.parametrize("differs", other_sources())
def test_a_store_of_something_else_is_refused_by_name_and_kept(store, written, differs):
    source = other_sources()[differs]
    with pytest.raises(StudyError, match=rf"another set-up \(differs in {differs}\); delete it or choose another"):
        write_store(store, source, **SMALL)
    assert written == [] and len(StoredFeatures(store)) == 5


def test_a_moved_store_still_reads(store, live, tmp_path):
    moved = shutil.move(store, tmp_path / "elsewhere")
    assert_equal(StoredFeatures(moved).batch([1]), live.batch([1]), atol=1e-5)
