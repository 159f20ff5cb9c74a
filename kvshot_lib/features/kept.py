"""What notebook 01 leaves in ``results_dir/features/<split>``: a store or, for training, a recipe to compute it anew.

At the paper's scale a store takes terabytes. ``features="live"`` keeps only a recipe of the training split
(`live.json`: corpus, documents, layers); each training then runs the target over every batch once more.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from .. import parallel
from ..errors import StudyError
from ..files import read_json, write_json
from ..target.load import Target
from ..text.corpus import CORPORA, load_corpus
from .live import LiveFeatures
from .spec import FeatureSpec, check_origin
from .store import MANIFEST, StoredFeatures, finished_manifest, write_store

RECIPE = "live.json"
AGAIN = "run notebook 01_extract_kv_cache again"


def keep_features(
    folder: str | Path, sources: Mapping[str, LiveFeatures], corpus: str, mode: str = "stored", **sizes: int
) -> pd.DataFrame:  # fmt: skip
    """Write every split's store (the training split's recipe, if ``mode`` is ``live``); ``sizes`` as in `write_store`.

    Returns
    -------
    One row a split: documents, tokens, answer tokens, shards, megabytes.

    Raises
    ------
    StudyError : features of another set-up are there; too little space on the disk.
    """
    folder, rows = Path(folder), []
    for split, source in sources.items():
        answer_tokens = sum(int(document.answer_mask.sum()) for document in source.documents)
        shards, live = [], mode == "live" and split == "train"
        if (folder / split / (MANIFEST if live else RECIPE)).exists():
            other = f"{folder / split} holds a {'store' if live else 'recipe'}, made with another value of features"
            raise StudyError(f"{other}; delete it or choose another results_dir")
        if live:
            if parallel.is_main():
                write_recipe(folder / split, source, corpus, split)
        else:
            shards = write_store(folder / split, source, **sizes)["shards"]
        megabytes = sum(shard["bytes"] for shard in shards) / 1e6
        rows.append((split, len(source), sum(source.lengths), answer_tokens, len(shards), round(megabytes, 1)))
    return pd.DataFrame(rows, columns=["split", "documents", "tokens", "answer tokens", "shards", "MB"])


def write_recipe(folder: Path, live: LiveFeatures, corpus: str, split: str) -> None:
    """Say in ``folder`` which documents, layers and target these features come from."""
    known = corpus in CORPORA or corpus == "tiny"
    recipe = {
        "corpus": corpus if known else str(Path(corpus).resolve()), "split": split, "documents": live.given_documents,
        "max_length_tokens": live.max_length_tokens, "documents_hash": live.documents_hash, "spec": asdict(live.spec),
    }  # fmt: skip
    write_json(folder / RECIPE, recipe)


def read_spec(folder: Path) -> FeatureSpec:
    """The spec of what was kept in ``folder``; no target is needed for it."""
    if (folder / RECIPE).exists():
        return FeatureSpec.from_json(_recipe(folder)["spec"])
    return FeatureSpec.from_json(finished_manifest(folder)["spec"])


def open_features(folder: Path, target: Target) -> StoredFeatures | LiveFeatures:
    """The features kept in ``folder``, from its store, or by its recipe from ``target``.

    Raises
    ------
    StudyError : nothing there; a damaged store or recipe; another target than theirs; a corpus that has changed.
    """
    check_origin(read_spec(folder), target, f"the features in {folder} were recorded")
    if not (folder / RECIPE).exists():
        return StoredFeatures(folder)
    recipe = _recipe(folder)
    documents = load_corpus(recipe["corpus"], recipe["split"]).documents[: recipe["documents"]]
    live = LiveFeatures(target, documents, FeatureSpec.from_json(recipe["spec"]), recipe["max_length_tokens"])
    if live.documents_hash != recipe["documents_hash"]:
        raise StudyError(f"the corpus {recipe['corpus']} is not the one that {folder / RECIPE} was made from; {AGAIN}")
    return live


def _recipe(folder: Path) -> dict:
    if (folder / MANIFEST).exists():
        raise StudyError(f"{folder} holds a store and a recipe; delete one of {MANIFEST} and {RECIPE}")
    return read_json(folder / RECIPE, AGAIN)
