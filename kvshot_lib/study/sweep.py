"""A profile's trainings without the pipeline: side by side on one GPU, or each of them over several processes.

The pipeline keeps features on disk and each training reads them from there. In a sweep the target writes them into the
device's memory once and all trainings share them; a run that starts from another waits for it. Where there are more
than fit (``features: live``), trainings go by turns in one process, and one stream of the target feeds them. Sweeps of
one folder at the same time, one for each GPU, share its runs. Either way runs that are done are skipped, and runs that
were begun go on from their last checkpoint.
"""

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from .. import parallel
from ..drafters.context import drafter_spec, layers_read
from ..errors import StudyError
from ..features.extract import hold, keep, prepare
from ..metrics.collect import collect
from ..training.config import configurations
from ..training.run import train_run, train_runs
from . import profiles
from .notebooks import Taken, locked
from .profiles import Profile, named_runs, train_values

_shared: dict = {}  # of a worker process: features, profile, results_dir


def sweep_profile(profile: str, runs: Sequence[str] = (), *, results_dir: str = "", workers: int = 4) -> int:
    """Train a profile's runs (all, or ``VARIANT/seedN`` in this order), so many at once; returns how many are left."""
    loaded = profiles.checked_profile(profile)
    folder = Path(results_dir or loaded.results)
    jobs = named_runs(loaded, runs)
    left = sweep(loaded, folder, jobs, workers)
    if left < len(jobs):
        done = [job for job in named_runs(loaded) if _done(folder, *job)]
        collect(folder, [f"{variant}/seed{seed}" for variant, seed in done])
    return left


def several_processes(profile: str, what: str, runs: Sequence[str] = (), *, results_dir: str = "") -> None:
    """``what`` is extract or train: over several processes, one GPU each, it writes what `make study` would write.

    A batch is shared out, so that results are those of one process. From a notebook:
    ``accelerate.notebook_launcher(several_processes, ("qwen3-8b", "extract"), num_processes=8)``.
    """
    parallel.begin()
    say = print if parallel.is_main() else lambda *_, **__: None
    say(f"{parallel.count()} process{'es' * (parallel.count() > 1)}", flush=True)
    loaded = profiles.checked_profile(profile)
    folder, jobs = Path(results_dir or loaded.results), named_runs(loaded, runs)
    if what not in ("extract", "train"):
        raise StudyError(f"{what!r} is neither extract nor train")
    if what == "extract":
        values = checked_values(loaded, folder)
        say(keep(prepare(values), values, folder / "features").to_string(index=False), flush=True)
        return
    for variant, seed in jobs:
        if not _done(folder, variant, seed):
            say(_told(variant, seed, train_run(variant, train_values(loaded, variant, seed), folder)), flush=True)
        parallel.wait()
    if parallel.is_main():
        collect(folder)


def sweep(profile: Profile, results_dir: Path, jobs: list[tuple[str, int]], workers: int) -> int:
    """Train ``jobs`` in this order as far as their starts allow; returns how many are left undone.

    One that another sweep of this folder has in hand is tried again later, and taken over if that one is gone.
    """
    waiting = [job for job in jobs if not _done(results_dir, *job)]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", flush=True)
    if not waiting:
        return 0
    features = load_features(profile, results_dir, dict.fromkeys(variant for variant, _ in waiting))
    if profile.extract.get("features") == "live":
        return _stream(profile, results_dir, jobs, features)
    context = torch.multiprocessing.get_context("spawn")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    running: dict[Future, tuple[str, int]] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker, (features, profile, results_dir, os.getpid()))
    try:
        while waiting or running:
            waiting = [job for job in waiting if not _done(results_dir, *job)]
            for job in [job for job in waiting if _ready(profile, results_dir, *job)][: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(_train_here, *job)] = job
            if not running:
                break  # what is left waits for a run that failed, or that isn't asked for
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if future.exception() is None and future.result() is None:
                    waiting.append(job)
                else:
                    _tell(job, future)
    finally:
        if running:  # stopped early: checkpoints are on disk, the rest can go
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(wait=not running, cancel_futures=True)
    return sum(not _done(results_dir, *job) for job in jobs)


def _stream(profile: Profile, results_dir: Path, jobs: list[tuple[str, int]], features: dict) -> int:
    """Train ``jobs`` in this process, those of a seed by turns: they ask for the same batches; see :func:`sweep`."""
    left = lambda: [job for job in jobs if not _done(results_dir, *job)]
    while ready := [job for job in left() if _ready(profile, results_dir, *job)]:
        own = sorted((variant, seed) for variant, seed in ready if seed == ready[0][1])
        with contextlib.ExitStack() as held:
            for job in own:
                held.enter_context(locked(_folder(results_dir, *job) / ".lock", wait=True))
            own = [job for job in own if not _done(results_dir, *job)]  # another sweep may have trained it meanwhile
            values = [(variant, train_values(profile, variant, seed)) for variant, seed in own]
            for job, facts in zip(own, train_runs(values, results_dir, features)):
                print(_told(*job, facts), flush=True)
    return len(left())


def load_features(profile: Profile, results_dir: Path, variants: Iterable[str]) -> dict:
    """Features by split in the memory of the target's device, as far as any of these drafters reads them."""
    values = checked_values(profile, results_dir)
    made, configs = prepare(values), [configurations(train_values(profile, v, 0))[0] for v in variants]
    read = zip(*(layers_read(config, drafter_spec(config, made.target)) for config in configs))
    layers = [sorted({*chain.from_iterable(each)}) or None for each in read]
    documents = {split: live.with_layers(*layers) for split, live in made.documents.items()}
    state = {field for config in configs for field in config.reads} | {"final_hidden", "target_argmax"}
    return hold(replace(made, documents=documents), values, results_dir / "features", sorted(state))


def checked_values(profile: Profile, results_dir: Path) -> dict:
    """Every parameter of the extraction.

    Raises
    ------
    StudyError : the profile has the target write its dialogues, and they aren't there.
    """
    corpus = results_dir / "corpus"
    if profile.dialogues is not None and not (corpus / "provenance.json").exists():
        words = " ".join(profiles.option_words(profiles.dialogue_options(profile)))
        raise StudyError(f"no dialogues in {corpus}; write them first: python -m kvshot_lib generate {corpus} {words}")
    return profiles.extract_values(profile, results_dir)


def _folder(results_dir: Path, variant: str, seed: int) -> Path:
    return results_dir / "runs" / variant / f"seed{seed}"


def _done(results_dir: Path, variant: str, seed: int) -> bool:
    return (_folder(results_dir, variant, seed) / "run.json").exists()


def _ready(profile: Profile, results_dir: Path, variant: str, seed: int) -> bool:
    """Whether the run that it starts from, if any, is done."""
    start = train_values(profile, variant, seed).get("init_from")
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


def _train_here(variant: str, seed: int) -> dict | None:
    """One run in a worker; what it prints goes to ``log.txt`` in the run's folder. None if another sweep has it."""
    results_dir = _shared["results_dir"]
    folder = _folder(results_dir, variant, seed)
    try:
        with (
            locked(folder / ".lock", patience_s=2),  # a worker of a killed sweep may have a moment left
            open(folder / "log.txt", "a") as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
        ):
            log.isatty = lambda: True  # a progress bar hides from files
            if _done(results_dir, variant, seed):
                return None
            return train_run(variant, train_values(_shared["profile"], variant, seed), results_dir, _shared["features"])
    except Taken:
        return None
    finally:  # what this training held is for the next one, in whichever worker
        gc.collect()
        torch.cuda.empty_cache()


def _tell(job: tuple[str, int], future: Future) -> None:
    error = future.exception()
    failed = f"{job[0]}/seed{job[1]} failed: {type(error).__name__}: {error}"
    print(failed if error else _told(*job, future.result()), flush=True)


def _told(variant: str, seed: int, facts: dict) -> str:
    return f"{variant}/seed{seed}: {facts['trained_tokens']:,} tokens in {facts['train_s']:.0f} s"
