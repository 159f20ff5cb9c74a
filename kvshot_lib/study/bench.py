"""Speed and memory of the study's two heavy loops on this machine: `make bench`."""

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from .. import parallel
from ..drafters.checkpoint import draft_vocabulary
from ..drafters.config import DrafterConfig
from ..drafters.drafter import build_drafter
from ..drafters.variants import parameters_of
from ..errors import StudyError
from ..features.extract import prepare
from ..features.live import LiveFeatures, extraction_speed
from ..features.store import StoredFeatures, write_store
from ..provenance import device_name
from ..target.load import Target
from ..target.smollm2 import DEFAULT_TARGET
from ..training.config import TrainConfig, configurations
from ..training.loop import train
from .notebooks import parameter_defaults
from .profiles import NOTEBOOKS

BENCHED = ("hidden", "kv_2", "hybrid", "block_kv_2")
TIMED = {"batch_documents": 4, "validate_every": 0, "checkpoint_every_s": 1e9}


def bench(
    *, target: str = DEFAULT_TARGET, corpus: str = "selfgen", documents: int = 8, steps: int = 3, vocabulary: int = 8192,
    processes: Sequence[int] = (1, 2), share: bool = False,
) -> None:  # fmt: skip
    """Speed of extraction and training on this machine.

    Extraction is given as a ratio to the bare target forward, alternating; training in tokens/s over batches of four
    documents. Nothing is asserted: machines differ.

    Parameters
    ----------
    documents : the longest of the corpus. steps : timed training steps. vocabulary : draft_vocab_size.
    processes : numbers of processes to train with, one after the other. share : only this process's part of that.
    """
    if share:
        parallel.begin()
    values = parameter_defaults(NOTEBOOKS["extract"]) | {"target": target, "corpus": corpus, "dtype": "auto"}
    made = prepare(values | {"train_documents": None})
    draft_ids = draft_vocabulary(torch.from_numpy(made.answer_token_counts), min(vocabulary, made.target.vocab_size))
    longest = sorted(made.documents["train"].documents, key=lambda d: -len(d.tokens))[:documents]
    live = LiveFeatures(made.target, longest, made.spec)
    kv_2 = configurations(parameters_of("kv_2"))[0]
    if share:
        found = training_speed(made.target, live, kv_2, draft_ids, steps)
        if parallel.is_main():
            print(f"data-parallel {found:.2f}", flush=True)
        return
    dtype = str(made.target.dtype).removeprefix("torch.")
    print(f"{device_name(made.target.device)}, {dtype}, torch {torch.__version__}, target {made.target.name}")
    extraction, bare = extraction_speed(live, range(min(4, len(live))))
    print(f"extraction {extraction:,.0f} tokens/s, bare forward {bare:,.0f}: ratio {extraction / bare:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        write_store(folder, live, batch_documents=4)
        for name in BENCHED:
            for fraction in (1.0, 0.2):
                config = configurations(parameters_of(name))[0]
                found = training_speed(made.target, StoredFeatures(folder), config, draft_ids, steps, fraction)
                print(f"train {name:10} anchor_fraction {fraction:.1f}: {found:>8,.0f} tokens/s", flush=True)
    own = {"target": target, "corpus": corpus, "documents": documents, "steps": steps, "vocabulary": vocabulary}
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    speeds = [launched_speed(number, words) for number in processes]
    for number, found in zip(processes, speeds, strict=True):
        told = f"train kv_2 from live features, {number} process(es): {found:,.0f} tokens/s"
        print(f"{told}, {found / speeds[0]:.2f} times the first")
    print(f"peak memory {peak_memory_bytes(made.target.device) / 1e9:.1f} GB")


def training_speed(
    target: Target, source, config: DrafterConfig, draft_ids: torch.Tensor, steps: int, anchor_fraction: float = 0.2
) -> float:
    """Tokens/s of a training on batches of four documents, over however many processes there are."""
    for number in (1, steps):  # the first warms up
        drafter = build_drafter(config, target, source.spec, draft_ids)
        training = TrainConfig(epochs=number + 1, max_steps=number, anchor_fraction=anchor_fraction, **TIMED)
        with tempfile.TemporaryDirectory() as folder:
            history = train(drafter, source, source, training, folder, dtype=target.dtype)
    return history["trained_tokens"].max() / history["seconds"].max()


def launched_speed(processes: int, words: list[str]) -> float:
    """What `training_speed` finds in so many processes, started by `accelerate launch`."""
    several = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0", "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else []), "kvshot_lib", "bench", "--share", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.findall(r"^data-parallel ([\d.]+)$", ended.stdout, re.MULTILINE)
    if ended.returncode or len(found) != 1:
        why = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise StudyError(f"training with {processes} processes failed: {why}")
    return float(found[0])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
