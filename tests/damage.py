"""One flipped byte in a random file of a study, and what reading it then does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import study_jobs
import torch

from kvshot_lib.drafters.checkpoint import load_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features import extract
from kvshot_lib.features.store import StoredFeatures
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.collect import OF_RUN, _read_run
from kvshot_lib.target.load import load_target
from kvshot_lib.text.corpus import SPLITS, load_corpus
from kvshot_lib.training.loop import Training, train


def read_features(study: Path) -> list:
    stores = [StoredFeatures(study / "features" / split) for split in SPLITS]
    return [[store.spec, store.lengths, vars(store.batch(range(len(store))))] for store in stores]


def read_counts(study: Path) -> torch.Tensor:
    return extract.read_counts(study / "features", 512)


def read_checkpoint(study: Path) -> list:
    run = study_jobs.training(study)
    splits = run.features["train"], run.features["validation"]
    training = Training(run.drafter, *splits, run.training, study / "checkpoint", torch.float32)
    return [run.drafter.state_dict(), training.optimiser.state_dict(), vars(training.progress)]


def make_checkpoint(study: Path) -> None:
    """A checkpoint of the training's end; a finished run keeps none."""
    run = study_jobs.training(study)
    train(run.drafter, run.features["train"], run.features["validation"], run.training, study / "checkpoint")


def read_drafter(study: Path) -> list:
    drafter = load_drafter(study / "runs/kv_2/seed0", load_target("tiny", device="cpu", dtype="float32"))
    return [drafter.state_dict(), drafter.draft_ids, drafter.config, drafter.spec]


def read_run(study: Path) -> dict:
    return _read_run(study / "runs/kv_2/seed0")


def read_tables(study: Path) -> list:
    return [tables.read(study / "tables", name) for name in ("runs", "acceptance", *OF_RUN)]


def read_corpus(study: Path) -> list:
    splits = [load_corpus(study / "corpus", split) for split in SPLITS]
    return [[[d.tokens, d.answer_mask] for d in split.documents] + [split.provenance] for split in splits]


# Kind -> the files, as patterns inside the study, and how the study reads them.
READERS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "feature shards": (("features/*/shard-*",), read_features),
    "feature manifests": (("features/*/manifest.json",), read_features),
    "token counts": (("features/answer_token_counts.csv", "features/SHA256SUMS"), read_counts),
    "checkpoints": (("checkpoint/checkpoint.pt",), read_checkpoint),
    "drafters": (("runs/kv_2/seed0/drafter.*",), read_drafter),
    "tables of a run": (("runs/kv_2/seed0/*.csv", "runs/kv_2/seed0/run.json"), read_run),
    "collected tables": (("tables/*",), read_tables),
    "corpus files": (("corpus/*",), read_corpus),
}


def flip_bytes(study: Path, flips: int, random: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """Flip one byte at a time, read, and put it back: kind of file, ``detected``, ``harmless`` or worse, and where it was."""
    make_checkpoint(study)
    good = {reader: reader(study) for _, reader in READERS.values()}
    for number in range(flips):
        kind = list(READERS)[number % len(READERS)]
        patterns, reader = READERS[kind]
        path = random.choice(sorted(path for pattern in patterns for path in study.glob(pattern)))
        before = path.read_bytes()
        place, flip = int(random.integers(len(before))), int(random.integers(1, 256))
        path.write_bytes(before[:place] + bytes([before[place] ^ flip]) + before[place + 1 :])
        where = f"{path.relative_to(study)}, byte {place} ^ {flip}"
        try:
            yield kind, "harmless" if equal(reader(study), good[reader]) else "READ AS GOOD", where
        except StudyError as error:
            one_line = "\n" not in str(error)
            yield kind, "detected" if one_line else "CRASHED", f"{where}: {error}"
        except Exception as error:  # noqa: BLE001 (any other error is a finding)
            yield kind, "CRASHED", f"{where}: {type(error).__name__}: {error}"
        finally:
            path.write_bytes(before)


def equal(a, b) -> bool:
    """Whether two things that were read are the same, down to the last element."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, pd.DataFrame | pd.Series):
        return a.equals(b)
    return a == b or (isinstance(a, float) and np.isnan([a, b]).all())
