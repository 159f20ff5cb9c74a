"""A recipe in place of a store: the same features, computed anew; and what can go wrong between the two."""

from dataclasses import replace

import examples
import pytest
import torch

from kvshot_lib.errors import StudyError
from kvshot_lib.features.kept import RECIPE, keep_features, open_features, read_spec, write_recipe
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.features.store import MANIFEST, StoredFeatures
from kvshot_lib.files import read_json, write_json
from kvshot_lib.text.corpus import load_corpus, save_corpus


def sources(number=6):
    target = examples.target()
    documents = {split: load_corpus("tiny", split).documents[:number] for split in ("train", "evaluation")}
    return {split: LiveFeatures(target, found, feature_spec(target), 40) for split, found in documents.items()}


def test_a_recipe_gives_the_features_of_its_documents(tmp_path):
    live = sources()
    table = keep_features(tmp_path, live, "tiny", "live")
    assert table["shards"].tolist() == [0, 1] and table["MB"].iloc[0] == 0 and table["documents"].tolist() == [6, 6]
    assert [path.name for path in (tmp_path / "train").iterdir()] == [RECIPE]
    assert read_spec(tmp_path / "train") == read_spec(tmp_path / "evaluation") == live["train"].spec
    again = open_features(tmp_path / "train", examples.target())
    assert isinstance(again, LiveFeatures) and again.lengths == live["train"].lengths and max(again.lengths) == 40
    assert again.documents_hash == live["train"].documents_hash
    for name, tensor in vars(again.batch([4, 1])).items():
        assert torch.equal(tensor, getattr(live["train"].batch([4, 1]), name)), name
    assert isinstance(open_features(tmp_path / "evaluation", examples.target()), StoredFeatures)
    fewer = again.with_layers([3])
    assert torch.equal(fewer.batch([2]).keys[:, :, 0], again.batch([2]).keys[:, :, 2]) and fewer.spec.kv_layers == (3,)
    with pytest.raises(StudyError, match="layer 4 is out of range"):
        again.with_layers([4])


@pytest.mark.parametrize(("first", "then", "found"), [("stored", "live", "store"), ("live", "stored", "recipe")])
def test_a_store_and_a_recipe_do_not_replace_one_another(tmp_path, first, then, found):
    keep_features(tmp_path, sources(), "tiny", first)
    before = sorted((tmp_path / "train").iterdir())
    with pytest.raises(StudyError, match=f"train holds a {found}, made with .*; delete it or choose another") as error:
        keep_features(tmp_path, sources(), "tiny", then)
    assert "\n" not in str(error.value) and sorted((tmp_path / "train").iterdir()) == before


def test_a_store_and_a_recipe_in_one_folder_are_refused(tmp_path):
    live = sources()
    keep_features(tmp_path, live, "tiny")
    write_recipe(tmp_path / "train", live["train"], "tiny", "train")
    with pytest.raises(StudyError, match=f"holds a store and a recipe; delete one of {MANIFEST} and {RECIPE}"):
        open_features(tmp_path / "train", examples.target())


def test_features_of_another_target_are_refused_on_opening(tmp_path):
    keep_features(tmp_path, sources(), "tiny", "live")
    other = replace(examples.target(), hash="0" * 64)
    for split in ("train", "evaluation"):  # a recipe, a store
        with pytest.raises(StudyError, match=f"{split} were recorded for target tiny-llama .*00000000.* anew"):
            open_features(tmp_path / split, other)


def test_a_corpus_rewritten_in_its_place_is_noticed(tmp_path):
    documents = {"train": load_corpus("tiny", "train").documents}
    corpus, target = save_corpus(tmp_path / "corpus", documents, {"target": "tiny"}, greedy=[]), examples.target()

    def live():
        return {"train": LiveFeatures(target, load_corpus(corpus, "train").documents[:6], feature_spec(target), 40)}

    keep_features(tmp_path / "recipe", live(), str(corpus), "live")
    keep_features(tmp_path / "store", live(), str(corpus))
    save_corpus(corpus, {"train": documents["train"][1:]}, {"target": "tiny"}, greedy=[])
    with pytest.raises(StudyError, match="corpus is not the one that .*live.json was made from"):
        open_features(tmp_path / "recipe" / "train", target)
    with pytest.raises(StudyError, match=r"another set-up \(differs in lengths, documents_hash\)"):
        keep_features(tmp_path / "store", live(), str(corpus))


def test_a_recipe_counts_the_documents_that_were_given(tmp_path):
    target, documents = examples.target(), load_corpus("tiny", "train").documents[:20]
    live = LiveFeatures(target, documents, feature_spec(target), 8)
    assert 0 < len(live) < live.given_documents == 20
    keep_features(tmp_path, {"train": live}, "tiny", "live")
    assert open_features(tmp_path / "train", target).documents_hash == live.documents_hash


def test_changed_corpora_are_refused(tmp_path):
    keep_features(tmp_path, sources(), "tiny", "live")
    path = tmp_path / "train" / RECIPE
    write_json(path, read_json(path, "") | {"documents": 5})
    with pytest.raises(StudyError, match="the corpus tiny is not the one that .*live.json was made from"):
        open_features(tmp_path / "train", examples.target())
    path.write_text("{")
    with pytest.raises(StudyError, match="live.json can't be read .*; run notebook 01_extract_kv_cache again"):
        read_spec(tmp_path / "train")
