import numpy as np
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.features import extract
from kvshot_lib.features.kept import open_features
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.files import read_json
from kvshot_lib.text.corpus import SPLITS, load_corpus, save_corpus

VALUES = {
    "target": "tiny", "corpus": "tiny", "device": "cpu", "dtype": "float32", "kv_layers": 2, "max_length_tokens": 40,
    "train_documents": 6, "validation_documents": 2, "evaluation_documents": 3,
    "batch_documents": 4, "shard_documents": 4, "features": "stored", "figures_dir": "not looked at",
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


def test_a_corpus_that_another_tokenizer_wrote_is_refused_by_name(extraction, tmp_path, capsys):
    target = extraction.target
    own = own_corpus(tmp_path / "own", tokenizer_hash=target.tokenizer_hash)
    assert len(extract.prepare(VALUES | {"corpus": own}).documents["train"]) == 6
    assert capsys.readouterr().out == ""
    other = own_corpus(tmp_path / "other", tokenizer_hash="0" * 64)
    message = "other was written with the tokenizer of mistress, not with that of tiny .00000000…, not .*; set corpus"
    with pytest.raises(StudyError, match=message):
        extract.prepare(VALUES | {"corpus": other})
    with pytest.raises(StudyError, match=message):  # documents carry it, whatever way they take
        LiveFeatures(target, load_corpus(other, "train").documents[:2], extraction.spec)
    unnamed = own_corpus(tmp_path / "unnamed")
    extract.prepare(VALUES | {"corpus": unnamed, "evaluation_corpus": "tiny"})
    told = f"the corpus {unnamed} doesn't say what tokenizer wrote it; read as tiny's\n"
    assert capsys.readouterr().out == told * 2  # of its two splits


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"train_documents": True}, "train_documents=True must be a whole number"),
        ({"evaluation_documents": "4"}, "evaluation_documents='4' must be a whole number"),
        ({"validation_documents": 2.5}, "validation_documents=2.5 must be a whole number"),
        ({"train_documents": 0}, "train_documents=0 must be 1 or more"),
        ({"max_length_tokens": -1}, "max_length_tokens=-1 must be 1 or more"),
        ({"batch_documents": None}, "batch_documents=None must be a whole number"),
        ({"shard_documents": 0}, "shard_documents=0 must be 1 or more"),
        ({"features": "disk"}, "features='disk' must be one of 'stored', 'live'"),
        ({"state_layers": "all"}, "state_layers='all' must be one of 'eagle', 'kv'"),
        ({"kv_layers": True}, "kv_layers=True must be a whole number or a list"),
        ({"kv_layers": "3"}, "kv_layers='3' must be a whole number or a list"),
        ({"kv_layers": [1, "3"]}, "must be a whole number or a list"),
        ({"kv_layers": [False]}, "must be a whole number or a list"),
        ({"kv_layers": [1, 1]}, r"kv_layers=\[1, 1\] reuses a layer twice"),
        ({"kv_layers": []}, r"kv_layers=\[\] reuses nothing"),
    ],
)
def test_values_of_another_type_or_range_are_refused_by_name(bad, message):
    with pytest.raises(StudyError, match=message) as error:
        extract.prepare(VALUES | bad)
    assert "\n" not in str(error.value)


def test_counts_that_are_missing_or_altered_are_refused(extraction, tmp_path):
    with pytest.raises(StudyError, match="notebook 01_extract_kv_cache"):
        extract.read_counts(tmp_path, 512)
    path = extract.write_counts(tmp_path, extraction.answer_token_counts)
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(StudyError, match="damaged"):
        extract.read_counts(tmp_path, 512)
