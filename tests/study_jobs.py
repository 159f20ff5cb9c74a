"""The jobs of a tiny study that `torture` kills, and what of their results must not depend on being killed."""

from pathlib import Path

import pandas as pd

from kvshot_lib.features.extract import COUNTS, keep, prepare
from kvshot_lib.files import read_json, sha256
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.collect import collect as collect_runs
from kvshot_lib.study.profiles import Profile
from kvshot_lib.study.sweep import sweep
from kvshot_lib.text.corpus import SPLITS, load_corpus, save_corpus
from kvshot_lib.training.run import Run, prepare_run, train_run

VARYING = ["seconds", "train_s", "date", "profile"]  # the last is the name of the folder
DOCUMENTS = {"train": 24, "validation": 4, "evaluation": 8}
EXTRACT = {
    "target": "tiny", "corpus": "tiny", "kv_layers": 3, "max_length_tokens": 512, "device": "cpu", "dtype": "float32",
    "features": "stored", "batch_documents": 4, "shard_documents": 4,
    **{f"{name}_documents": n for name, n in DOCUMENTS.items()},
}  # fmt: skip
TRAIN = {
    "paradigm": "kv", "num_layers": 2, "draft_vocab_size": 384, "draft_length": 7, "device": "cpu", "dtype": "float32",
    "epochs": 1, "batch_documents": 2, "anchor_fraction": 0.5, "checkpoint_every_s": 0.0, "validate_every": 8,
}  # fmt: skip
PROFILE = Profile(
    "torture",
    {
        "extract": {"target": "tiny", "corpus": "tiny", **{f"{name}_documents": n for name, n in DOCUMENTS.items()}},
        "train": {"draft_vocab_size": 384, "epochs": 1, "batch_documents": 4, "checkpoint_every_s": 0.0},
    },
    drafters={"hidden": {}, "kv_1": {"paradigm": "kv"}, "hybrid_warm": {"paradigm": "hybrid", "init_from": "hidden"}},
)


def extract(folder: Path) -> None:
    """What notebook 01 leaves, in small shards."""
    keep(prepare(EXTRACT), EXTRACT, folder / "features")


def training(folder: Path) -> Run:
    """The drafter that `train_one` trains, before its first step."""
    return prepare_run("kv_2", TRAIN, folder)


def train_one(folder: Path) -> None:
    """What notebook 03 does, with a checkpoint after every optimiser step."""
    if not (folder / "features" / COUNTS).exists():  # the last of what it writes
        extract(folder)
    train_run("kv_2", TRAIN, folder)


def sweep_all(folder: Path) -> None:
    """What `python -m kvshot_lib.study.sweep` does, for three drafters of which one starts from another."""
    jobs = [(variant, 0) for variant in PROFILE.drafters]
    if left := sweep(PROFILE, folder, jobs, workers=2):
        raise RuntimeError(f"{left} runs are left")
    collect_runs(folder, [f"{variant}/seed{seed}" for variant, seed in jobs], samples=100)


def collect(folder: Path) -> None:
    """The tables of what `train_one` left."""
    collect_runs(folder, samples=100)


def corpus(folder: Path) -> None:
    """A corpus as the generator saves it."""
    splits = {split: load_corpus("tiny", split).documents for split in SPLITS}
    save_corpus(folder / "corpus", splits, {"target": "tiny", "seed": 0}, greedy=["evaluation"])


JOBS = {"extract": extract, "train": train_one, "sweep": sweep_all, "collect": collect, "corpus": corpus}


def leavings(folder: Path) -> dict[str, object]:
    """Every file that a study leaves, but for seconds and dates: name -> what must be equal."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name in ("log.txt", ".lock", "SHA256SUMS"):
            continue
        if path.suffix == ".json":
            value = read_json(path, "")
            found[name] = {key: part for key, part in value.items() if key not in (*VARYING, "files")}
        elif path.stem.split(".")[0] in ("history", "runs"):
            table = tables.read(path.parent, "history") if path.suffix == ".parquet" else pd.read_csv(path)
            found[name] = table.drop(columns=VARYING, errors="ignore").to_csv(index=False)
        else:
            found[name] = sha256(path)
    return found
