"""The jobs of a tiny study that `torture` kills, and what of their results must not depend on being killed."""

from pathlib import Path

import numpy as np
import pandas as pd

from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.drafters.drafter import DrafterConfig
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.features.store import write_store
from kvshot_lib.files import read_json, sha256, write_csv
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.collect import collect as collect_runs
from kvshot_lib.study.profiles import Profile
from kvshot_lib.study.sweep import sweep
from kvshot_lib.target.load import load_target
from kvshot_lib.text.corpus import answer_token_counts, load_corpus, save_corpus
from kvshot_lib.training.loop import TrainConfig, train
from kvshot_lib.training.run import SPLITS, finish_run, prepare_run, run_facts

VARYING = ["seconds", "train_s", "date", "profile"]  # the last is the name of the folder
DOCUMENTS = {"train": 48, "validation": 4, "evaluation": 8}
CONFIG = TrainConfig(epochs=1, batch_documents=2, anchor_fraction=0.5, checkpoint_every_s=0.0, validate_every=8)
PROFILE = Profile(
    "torture",
    extract={"target": "tiny", "corpus": "tiny", **{f"{name}_documents": n for name, n in DOCUMENTS.items()}},
    train={"draft_vocab_size": 384, "epochs": 1, "batch_documents": 4, "checkpoint_every_s": 0.0},
    drafters={"hidden": {}, "kv_1": {"paradigm": "kv"}, "hybrid_warm": {"paradigm": "hybrid", "init_from": "hidden"}},
)


def extract(folder: Path) -> None:
    """What notebook 01 leaves, in small shards."""
    target = load_target("tiny", device="cpu", dtype="float32")
    spec = feature_spec(target, 3)
    for split in SPLITS:
        live = LiveFeatures(target, load_corpus("tiny", split).documents[: DOCUMENTS[split]], spec)
        write_store(folder / "features" / split, live, batch_documents=4, shard_documents=4)
    counts = answer_token_counts(load_corpus("tiny", "train").documents, 512)
    table = pd.DataFrame({"token": np.flatnonzero(counts), "count": counts[counts > 0]})
    write_csv(folder / "features/answer_token_counts.csv", table, listed=True)


def training(folder: Path):
    """The drafter that `train_one` trains, before its first step."""
    given = {"draft_vocab_size": 384, "device": "cpu", "dtype": "float32"}
    return prepare_run("kv_2", DrafterConfig("kv", 2), CONFIG, folder, **given)


def train_one(folder: Path) -> None:
    """What notebook 02 does, with a checkpoint after every optimiser step."""
    if not (folder / "features/answer_token_counts.csv").exists():  # the last of what it writes
        extract(folder)
    run = training(folder)
    history = train(run.drafter, run.features["train"], run.features["validation"], CONFIG, run.folder)
    save_drafter(run.drafter, run.folder, variant="kv_2", seed=0)
    finish_run(run, CONFIG, history, run_facts(run, CONFIG, history))


def sweep_all(folder: Path) -> None:
    """What `python -m kvshot_lib.study.sweep` does, for three drafters of which one starts from another."""
    jobs = [(variant, 0) for variant in PROFILE.drafters]
    if left := sweep(PROFILE, folder, jobs, workers=2, stop_after_s=600):
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
