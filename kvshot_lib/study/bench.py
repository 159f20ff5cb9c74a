"""Speed and memory of the study's two heavy loops on this machine: `make bench`.

Extraction is given as a ratio to the bare target forward, alternating in one run; training in tokens/s over batches of 4 × 512
tokens read from a feature store (K = 7, draft vocabulary 8,192); and training by two processes under Accelerate, one GPU or one CPU
thread each, against one. Nothing is asserted: machines differ.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import torch

from .. import parallel
from ..drafters.checkpoint import draft_vocabulary
from ..drafters.drafter import DrafterConfig, build_drafter
from ..errors import StudyError
from ..features.live import LiveFeatures
from ..features.spec import feature_spec
from ..features.store import StoredFeatures, write_store
from ..plots.cache_facts import extraction_speed
from ..provenance import device_name
from ..target.load import Target, load_target
from ..target.smollm2 import DEFAULT_TARGET
from ..text.corpus import answer_token_counts, load_corpus
from ..training.loop import TrainConfig, train
from ..training.ttt import ttt_loss

DRAFTERS = {
    "hidden": DrafterConfig("hidden"),
    "kv_2": DrafterConfig("kv", num_layers=2),
    "hybrid": DrafterConfig("hybrid"),
    "block_kv_2": DrafterConfig("block", num_layers=2),
}


def training_speed(
    target: Target,
    store: StoredFeatures,
    config: DrafterConfig,
    anchor_fraction: float,
    *,
    draft_ids: torch.Tensor,
    steps: int,
) -> float:
    """Tokens/s of forward, backward and optimiser over batches of four documents; the first step warms up."""
    drafter = build_drafter(config, target, store.spec, draft_ids)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=1e-4, fused=True)
    device, half = target.device.type, target.dtype != torch.float32
    tokens = 0
    for step in range(steps + 1):
        if step == 1:
            started, tokens = time.perf_counter(), 0
        indices = [(4 * step + i) % len(store) for i in range(4)]
        features = store.batch(indices, (*drafter.reads, "final_hidden", "target_argmax")).to(device, target.dtype)
        with torch.autocast(device, target.dtype, enabled=half):
            generator = torch.Generator().manual_seed(step)
            loss = ttt_loss(drafter, features, anchor_fraction=anchor_fraction, generator=generator).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        optimiser.step()
        optimiser.zero_grad()
        tokens += sum(store.lengths[i] for i in indices)
        if device == "cuda":
            torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def data_parallel_speed(target: Target, live: LiveFeatures, draft_ids: torch.Tensor, steps: int) -> float:
    """Tokens/s of `training.train` on batches of four documents, features made on the fly, over however many processes there are."""
    config = TrainConfig(
        batch_documents=4,
        epochs=steps + 1,
        max_steps=steps,
        anchor_fraction=0.2,
        validate_every=0,
        checkpoint_every_s=1e9,
    )
    for number in (1, steps):  # the first warms up
        drafter = build_drafter(DRAFTERS["kv_2"], target, live.spec, draft_ids)
        with tempfile.TemporaryDirectory() as folder:
            history = train(drafter, live, live, replace(config, max_steps=number), folder, dtype=target.dtype)
    return history["trained_tokens"].max() / history["seconds"].max()


def launched_speed(processes: int, words: list[str]) -> float:
    """What `data_parallel_speed` finds in so many processes, started by `accelerate launch`."""
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
        "-m",
    ]
    launch = launch if processes > 1 else ["-m"]
    command = [sys.executable, *launch, "kvshot_lib.study.bench", "--data-parallel", *words]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
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


def main(words: list[str] | None = None) -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--corpus", default="selfgen")
    parser.add_argument("--documents", type=int, default=8, help="the longest of the corpus")
    parser.add_argument("--steps", type=int, default=3, help="timed training steps")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="to train with, one after the other")
    parser.add_argument("--data-parallel", action="store_true", help="only this process's part of that measurement")
    given = parser.parse_args(words)
    if given.data_parallel:
        parallel.begin()
    target = load_target(given.target)
    dtype = str(target.dtype).removeprefix("torch.")
    if not given.data_parallel:
        print(f"{device_name(target.device)}, {dtype}, torch {torch.__version__}, target {target.name}")
    answers = load_corpus(given.corpus, "train").documents
    counts = torch.from_numpy(answer_token_counts(answers, target.vocab_size))
    draft_ids = draft_vocabulary(counts, min(given.vocabulary, target.vocab_size))
    documents = sorted(answers, key=lambda d: -len(d.tokens))[: given.documents]
    live = LiveFeatures(target, documents, feature_spec(target, 3))
    if given.data_parallel:
        found = data_parallel_speed(target, live, draft_ids, given.steps)
        if parallel.is_main():
            print(f"data-parallel {found:.2f}", flush=True)
        return
    speed = extraction_speed(live, list(range(min(4, len(live)))))
    print(
        f"extraction {speed['extraction_tokens_per_s']:,.0f} tokens/s, bare forward {speed['bare_tokens_per_s']:,.0f}: "
        f"ratio {speed['ratio']:.2f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_store(folder, live, batch_documents=4)
        store = StoredFeatures(folder)
        for name, config in DRAFTERS.items():
            for fraction in (1.0, 0.2):
                tokens_per_s = training_speed(target, store, config, fraction, draft_ids=draft_ids, steps=given.steps)
                print(f"train {name:10} anchor_fraction {fraction:.1f}: {tokens_per_s:>8,.0f} tokens/s", flush=True)
    own = [
        "--target",
        given.target,
        "--corpus",
        given.corpus,
        "--documents",
        str(given.documents),
        "--steps",
        str(given.steps),
    ]
    speeds = {n: launched_speed(n, [*own, "--vocabulary", str(given.vocabulary)]) for n in given.processes}
    for processes, tokens_per_s in speeds.items():
        ratio = tokens_per_s / next(iter(speeds.values()))
        print(
            f"train kv_2 from live features, {processes} process(es): {tokens_per_s:,.0f} tokens/s, {ratio:.2f} times the first"
        )
    print(f"peak memory {peak_memory_bytes(target.device) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
