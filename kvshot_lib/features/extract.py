"""From the parameters of notebook 01 to what trainings read: target, layers, documents by split, and features kept.

``values`` are that notebook's parameters; what else they hold is left alone. Where a study writes its own dialogues,
``corpus`` is their folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import parallel
from ..errors import StudyError
from ..files import check_listed, write_csv
from ..settings import check_value
from ..target.load import Target, load_target
from ..text.corpus import SPLITS, answer_token_counts, load_corpus
from .kept import keep_features
from .live import LiveFeatures
from .resident import ResidentFeatures, StreamedFeatures
from .spec import STATE, FeatureSpec, feature_spec

COUNTS = "answer_token_counts.csv"
SIZES = ("max_length_tokens", "batch_documents", "shard_documents")
COUNTED = tuple(f"{split}_documents" for split in SPLITS)  # None: all
KINDS = {
    **dict.fromkeys(SIZES, int), **dict.fromkeys(COUNTED, int | None),
    "state_layers": Literal["eagle", "kv"], "features": Literal["stored", "live"],
}  # fmt: skip


@dataclass(frozen=True)
class Extraction:
    """What a study's features are made of.

    documents : by split, each behind the interface of features; nothing is computed before it is asked for.
    answer_token_counts : int [vocab_size], over the answers of the *whole* training split.
    """

    target: Target
    spec: FeatureSpec
    documents: dict[str, LiveFeatures]
    answer_token_counts: np.ndarray


def prepare(values: Mapping) -> Extraction:
    """Load the target and the documents that ``values`` name.

    Raises
    ------
    StudyError : an unknown target, corpus or layer; a corpus that another tokenizer wrote; values of another type.
    """
    for name in KINDS.keys() & values.keys():
        value = check_value(name, values[name], KINDS[name])
        if name in SIZES + COUNTED and value is not None and value < 1:
            raise StudyError(f"{name}={value} must be 1 or more")
    target = load_target(values["target"], device=values["device"], dtype=values["dtype"])
    spec = extracted(target, values)
    names = dict.fromkeys(SPLITS, values["corpus"])
    names["evaluation"] = values.get("evaluation_corpus") or values["corpus"]
    corpora = {split: load_corpus(name, split) for split, name in names.items()}
    documents = {}
    for split, corpus in corpora.items():
        chosen = corpus.documents[: values[f"{split}_documents"]]
        documents[split] = LiveFeatures(target, chosen, spec, values["max_length_tokens"])
    counts = answer_token_counts(corpora["train"].documents, target.vocab_size)
    return Extraction(target, spec, documents, counts)


def extracted(target: Target, values: Mapping) -> FeatureSpec:
    """The layers that are recorded: with state_layers="kv" also the inputs of those whose cache is."""
    spec = feature_spec(target, values["kv_layers"])
    if values.get("state_layers", "eagle") == "kv":
        spec = spec.of_layers(None, sorted({*spec.hidden_layers, *spec.kv_layers}))
    return spec


def keep(extraction: Extraction, values: Mapping, folder: str | Path) -> pd.DataFrame:
    """Leave features and answer-token counts in ``folder``, as notebook 01 does; one row a split (see `keep_features`).

    Several processes share the work; each of them gets the table.
    """
    sizes = {name: values[name] for name in ("batch_documents", "shard_documents")}
    table = keep_features(folder, extraction.documents, str(values["corpus"]), values["features"], **sizes)
    if parallel.is_main():
        write_counts(folder, extraction.answer_token_counts)
    parallel.wait()
    return table


def hold(
    extraction: Extraction, values: Mapping, folder: str | Path, state: Sequence[str] = STATE
) -> dict[str, ResidentFeatures | StreamedFeatures]:
    """Features by split in the memory of the target's device; only the answer-token counts go to ``folder``.

    With ``features="live"`` only the newest batches are there.
    """
    write_counts(folder, extraction.answer_token_counts)
    if values.get("features") == "live":
        return {split: StreamedFeatures(live, state) for split, live in extraction.documents.items()}
    device, batch = extraction.target.device, values["batch_documents"]
    return {split: ResidentFeatures(live, device, state, batch) for split, live in extraction.documents.items()}


def write_counts(folder: str | Path, counts: np.ndarray) -> Path:
    """Keep how often each token occurs in the training answers: the draft vocabulary is chosen by it."""
    used = np.flatnonzero(counts)
    return write_csv(Path(folder) / COUNTS, pd.DataFrame({"token": used, "count": counts[used]}), listed=True)


def read_counts(folder: str | Path, vocab_size: int) -> Tensor:
    """Undo `write_counts`: int64 [vocab_size]."""
    path = Path(folder) / COUNTS
    if not path.exists():
        raise StudyError(f"{path} is missing; run notebook 01_extract_kv_cache with the same results_dir")
    check_listed(path, "run notebook 01_extract_kv_cache again")
    table, counts = pd.read_csv(path), torch.zeros(vocab_size, dtype=torch.int64)
    counts[torch.tensor(table["token"].tolist())] = torch.tensor(table["count"].tolist())
    return counts
