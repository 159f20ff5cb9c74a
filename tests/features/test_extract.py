import numpy as np
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.features import extract
from kvshot_lib.features.kept import open_features
from kvshot_lib.files import read_json
from kvshot_lib.text.corpus import SPLITS, load_corpus, save_corpus

VALUES = {
    "target": "tiny", "corpus": "tiny", "device": "cpu", "dtype": "float32", "kv_layers": 2, "max_length_tokens": 40,
    "train_documents": 6, "validation_documents": 2, "evaluation_documents": 3,
    "batch_documents": 4, "shard_documents": 4, "features": "stored", "replace_store": False, "figures_dir": "not looked at",
}  # fmt: skip


@pytest.fixture(scope="module")
def extraction():
    return extract.prepare(VALUES)


def own_corpus(folder, **facts):
    splits = {split: load_corpus("tiny", split).documents for split in SPLITS}
    return save_corpus(folder, splits, {"target": "mistress", **facts}, greedy=())


def test_parameters_choose_target_layers_and_documents(extraction):
    assert extraction.target.name == "tiny" and extraction.spec.kv_layers == (1, 3)
    assert {split: len(live) for split, live in extraction.documents.items()} == {
        "train": 6,
        "validation": 2,
        "evaluation": 3,
    }
    assert max(length for live in extraction.documents.values() for length in live.lengths) == 40
    answers = np.concatenate([document.answer for document in load_corpus("tiny", "train").documents])
    assert extraction.answer_token_counts.sum() == len(answers)  # of all 64 documents, uncut


def test_kept_and_held_features_are_those_of_the_documents(extraction, tmp_path):
    table = extract.keep(extraction, VALUES, tmp_path / "kept")
    held = extract.hold(extraction, VALUES, tmp_path / "held")
    assert list(table["split"]) == list(SPLITS) and list(table["shards"]) == [2, 1, 1]
    for split, live in extraction.documents.items():
        kept = open_features(tmp_path / "kept" / split, extraction.target)
        assert kept.documents_hash == held[split].documents_hash == live.documents_hash
        assert held[split].batch([1]).keys.equal(live.batch([1]).keys)
        assert kept.batch([1]).target_argmax.equal(live.batch([1]).target_argmax)
    for folder in ("kept", "held"):
        counts = extract.read_counts(tmp_path / folder, extraction.target.vocab_size)
        assert counts.tolist() == extraction.answer_token_counts.tolist()


def test_live_features_of_a_folder_keep_a_recipe(extraction, tmp_path):
    corpus = own_corpus(tmp_path / "corpus")
    values = VALUES | {"corpus": corpus, "features": "live"}
    extract.keep(extract.prepare(values), values, tmp_path / "features")
    assert read_json(tmp_path / "features/train/live.json", "")["corpus"] == str(corpus)


def test_a_corpus_that_another_tokenizer_wrote_is_refused_by_name(extraction, tmp_path):
    own = own_corpus(tmp_path / "own", tokenizer_hash=extraction.target.tokenizer_hash)
    assert len(extract.prepare(VALUES | {"corpus": own}).documents["train"]) == 6
    other = own_corpus(tmp_path / "other", tokenizer_hash="0" * 64)
    with pytest.raises(StudyError, match="other was written with the tokenizer of mistress, not with that of tiny"):
        extract.prepare(VALUES | {"corpus": other})


def test_counts_that_are_missing_or_altered_are_refused(extraction, tmp_path):
    with pytest.raises(StudyError, match="notebook 01_extract_kv_cache"):
        extract.read_counts(tmp_path, 512)
    path = extract.write_counts(tmp_path, extraction.answer_token_counts)
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(StudyError, match="damaged"):
        extract.read_counts(tmp_path, 512)
