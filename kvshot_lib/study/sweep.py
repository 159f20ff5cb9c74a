"""Train a profile's runs side by side on one machine, with the features in memory: for a GPU.

python -m kvshot_lib.study.sweep PROFILE [VARIANT/seedN ...]    results/PROFILE, as `make study PROFILE=...` would make them

The pipeline keeps features on disk and each training reads them from there. Here the target writes them into the device's memory
once and all trainings share them. Runs that are done are skipped, runs that were begun go on from their last checkpoint, and a run
that starts from another waits for it.
"""

import argparse
import contextlib
import gc
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import parallel
from ..drafters.checkpoint import save_drafter
from ..drafters.drafter import DrafterConfig
from ..errors import one_line_errors
from ..features.live import LiveFeatures
from ..features.resident import ResidentFeatures
from ..features.spec import feature_spec
from ..files import write_csv
from ..metrics.collect import collect
from ..target.load import load_target
from ..text.corpus import answer_token_counts, load_corpus
from ..training.loop import TrainConfig, train
from ..training.run import SPLITS, finish_run, prepare_run, run_facts
from .notebooks import locked
from .profiles import NOTEBOOKS, Profile, check_drafters, check_profile, load_profile, named_runs, parameter_defaults

_shared: dict = {}  # of a worker process: features, profile, results_dir


def train_run(profile: Profile, results_dir: Path, variant: str, seed: int, features: dict | None = None) -> dict:
    """What notebook 02 does, for one run of a profile; returns the run's row of ``runs.csv``."""
    values = parameter_defaults(NOTEBOOKS["train"]) | profile.train | profile.drafters[variant] | {"seed": seed}
    configs = [
        config(**{f.name: values[f.name] for f in fields(config) if f.name in values})
        for config in (DrafterConfig, TrainConfig)
    ]
    names = ("draft_vocab_size", "init_from", "device", "dtype", "compile_steps")
    given = {name: values[name] for name in names}
    run = prepare_run(variant, *configs, results_dir, **given, features=features)
    history = train(
        run.drafter, run.features["train"], run.features["validation"], configs[1], run.folder, dtype=run.dtype
    )
    facts = run_facts(run, configs[1], history)
    if parallel.is_main():
        save_drafter(run.drafter, run.folder, variant=variant, seed=seed)
        finish_run(run, configs[1], history, facts, draft_length=values["draft_length"])
    return facts


def load_features(profile: Profile, results_dir: Path) -> dict[str, ResidentFeatures]:
    """Run the target over the profile's documents and keep its features on its device; also writes the answer-token counts."""
    values = parameter_defaults(NOTEBOOKS["extract"]) | profile.extract
    target = load_target(values["target"], device=values["device"], dtype=values["dtype"])
    spec = feature_spec(target, values["kv_layers"])
    counts = answer_token_counts(load_corpus(values["corpus"], "train").documents, target.vocab_size)
    used = np.flatnonzero(counts)
    write_csv(
        results_dir / "features" / "answer_token_counts.csv",
        pd.DataFrame({"token": used, "count": counts[used]}),
        listed=True,
    )
    features = {}
    for split in SPLITS:
        documents = load_corpus(values["corpus"], split).documents[: values[f"{split}_documents"]]
        live = LiveFeatures(target, documents, spec, values["max_length_tokens"])
        features[split] = ResidentFeatures(live, target.device, batch_documents=values["batch_documents"])
    return features


def sweep(profile: Profile, results_dir: Path, jobs: list[tuple[str, int]], workers: int, stop_after_s: float) -> int:
    """Train ``jobs`` in this order as far as their starts allow; returns how many are left undone.

    After ``stop_after_s`` seconds the trainings under way are stopped; the same call goes on from their checkpoints.
    """
    deadline = time.monotonic() + stop_after_s
    waiting = [job for job in jobs if not _done(results_dir, *job)]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", flush=True)
    if not waiting:
        return 0
    features = load_features(profile, results_dir)
    context = torch.multiprocessing.get_context("spawn")
    running: dict[Future, tuple[str, int]] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker, (features, profile, results_dir, os.getpid()))
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for job in [job for job in waiting if len(running) < workers and _ready(profile, results_dir, *job)]:
                if len(running) < workers:
                    waiting.remove(job)
                    running[pool.submit(_train_here, *job)] = job
            if not running:
                break  # what is left waits for a run that failed, or that isn't asked for
            finished, _ = wait(running, timeout=max(0, deadline - time.monotonic()), return_when=FIRST_COMPLETED)
            for future in finished:
                _tell(running.pop(future), future)
    finally:
        if running:  # stopped early: checkpoints are on disk, the rest can go
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(wait=not running, cancel_futures=True)
    return sum(not _done(results_dir, *job) for job in jobs)


def _done(results_dir: Path, variant: str, seed: int) -> bool:
    return (results_dir / "runs" / variant / f"seed{seed}" / "run.json").exists()


def _ready(profile: Profile, results_dir: Path, variant: str, seed: int) -> bool:
    """Whether the run that it starts from, if any, is done."""
    start = profile.drafters[variant].get("init_from")
    return not start or _done(results_dir, start, seed)


def _start_worker(features: dict, profile: Profile, results_dir: Path, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _shared.update(features=features, profile=profile, results_dir=results_dir)


def _end_with(parent: int) -> None:
    """End this worker when the sweep's own process is gone, killed say: nobody would collect what it trains."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _train_here(variant: str, seed: int) -> dict:
    """One run in a worker; what it prints goes to ``log.txt`` in the run's folder."""
    folder = _shared["results_dir"] / "runs" / variant / f"seed{seed}"
    with (
        locked(folder / ".lock", wait=True),  # a worker of a killed sweep may have a moment left
        open(folder / "log.txt", "a") as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        try:
            return train_run(_shared["profile"], _shared["results_dir"], variant, seed, _shared["features"])
        finally:  # what this training held is for the next one, in whichever worker
            gc.collect()
            torch.cuda.empty_cache()


def _tell(job: tuple[str, int], future: Future) -> None:
    name = f"{job[0]}/seed{job[1]}"
    if error := future.exception():
        print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
    else:
        facts = future.result()
        print(f"{name}: {facts['trained_tokens']:,} tokens in {facts['train_s']:.0f} s", flush=True)


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("runs", nargs="*", metavar="VARIANT/seedN", help="only these, in this order (default: all)")
    parser.add_argument("--results-dir", type=Path, help="default: results/PROFILE")
    parser.add_argument("--workers", type=int, default=4, help="trainings side by side")
    parser.add_argument("--stop-after-s", type=float, default=1e8, help="then leave the rest for the next call")
    given = parser.parse_intermixed_args(words)
    profile = load_profile(given.profile)
    check_profile(profile)
    check_drafters(profile)
    results_dir = given.results_dir or Path("results") / profile.name
    jobs = named_runs(profile, given.runs)
    left = sweep(profile, results_dir, jobs, given.workers, given.stop_after_s)
    if left < len(jobs):
        collect(
            results_dir,
            [f"{variant}/seed{seed}" for variant, seed in named_runs(profile) if _done(results_dir, variant, seed)],
        )
    print(f"{left} runs are left: the same command goes on with them" if left else "all runs are done")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
