"""Extraction and training of a profile over several processes, one GPU each (or CPU cores), under Hugging Face Accelerate.

accelerate launch --multi_gpu --num_processes 8 -m kvshot_lib.study.processes qwen3-8b extract
accelerate launch --multi_gpu --num_processes 8 -m kvshot_lib.study.processes qwen3-8b train hidden/seed0 kv_1/seed0

(``--multi_gpu`` without a GPU gives that many CPU processes; ``--cpu`` would give one.)

From a notebook: ``accelerate.notebook_launcher(data_parallel.main, (["qwen3-8b", "extract"],), num_processes=8)``. It writes what
`make study` would write, in results/PROFILE; a batch is shared out, so that results are those of one process (`parallel`). Done runs are
skipped and killed ones go on, whatever the number of processes. Without accelerate, as ``python -m …``, it is one process.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .. import parallel
from ..errors import one_line_errors
from ..features.kept import keep_features
from ..features.live import LiveFeatures
from ..features.spec import feature_spec
from ..files import write_csv
from ..metrics.collect import collect
from ..target.load import load_target
from ..text.corpus import answer_token_counts, load_corpus
from ..training.run import SPLITS
from .profiles import NOTEBOOKS, Profile, check_drafters, check_profile, load_profile, named_runs, parameter_defaults
from .sweep import train_run


def extract(profile: Profile, results_dir: Path) -> None:
    """What notebook 01 writes: features of every split, and the answer tokens' counts."""
    values = parameter_defaults(NOTEBOOKS["extract"]) | profile.extract
    corpus = str(results_dir / "corpus") if profile.dialogues is not None else values["corpus"]
    target = load_target(values["target"], device=values["device"], dtype=values["dtype"])
    spec, folder = feature_spec(target, values["kv_layers"]), results_dir / "features"
    documents = {split: load_corpus(corpus, split).documents for split in SPLITS}
    live = {
        split: LiveFeatures(target, found[: values[f"{split}_documents"]], spec, values["max_length_tokens"])
        for split, found in documents.items()
    }
    sizes = {name: values[name] for name in ("batch_documents", "shard_documents")}
    table = keep_features(folder, live, corpus, values["features"], replace=values["replace_store"], **sizes)
    if parallel.is_main():
        counts = answer_token_counts(documents["train"], target.vocab_size)
        used = np.flatnonzero(counts)
        write_csv(folder / "answer_token_counts.csv", pd.DataFrame({"token": used, "count": counts[used]}))
        print(table.to_string(index=False), flush=True)
    parallel.wait()


def train_all(profile: Profile, results_dir: Path, jobs: list[tuple[str, int]]) -> None:
    """Train these runs one after the other, each over all processes."""
    for variant, seed in jobs:
        if not (results_dir / f"runs/{variant}/seed{seed}/run.json").exists():
            facts = train_run(profile, results_dir, variant, seed)
            if parallel.is_main():
                print(
                    f"{variant}/seed{seed}: {facts['trained_tokens']:,} tokens in {facts['train_s']:.0f} s", flush=True
                )
        parallel.wait()
    if parallel.is_main():
        collect(results_dir)


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.processes", description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("what", choices=("extract", "train"))
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="trainings, in this order (default: all)")
    parser.add_argument("--results-dir", type=Path, help="default: results/PROFILE")
    given = parser.parse_intermixed_args(words)
    parallel.begin()
    if parallel.is_main():
        print(f"{parallel.count()} process{'es' * (parallel.count() > 1)}", flush=True)
    profile = load_profile(given.profile)
    check_profile(profile)
    check_drafters(profile)
    results_dir = given.results_dir or Path("results") / profile.name
    runs = named_runs(profile, given.runs)
    if given.what == "extract":
        extract(profile, results_dir)
    else:
        train_all(profile, results_dir, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
