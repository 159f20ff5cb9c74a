"""How fast the study's heavy loops run on this machine, beside the floor that its arithmetic and memory set.

The floor of a speed is what would be left if nothing but the counted operations (or bytes) took time, at the rate of a
large matrix product (or copy) timed here.
"""

import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from torch.utils.benchmark import Timer

from .. import parallel
from ..decoding.decode import decode
from ..decoding.propose import ALONE, Chain
from ..decoding.turns import take_turns
from ..drafters.checkpoint import draft_vocabulary, load_drafter
from ..drafters.config import DrafterConfig
from ..drafters.drafter import Drafter, build_drafter, in_dtype
from ..drafters.variants import parameters_of
from ..errors import StudyError
from ..features.extract import prepare
from ..features.live import LiveFeatures, extraction_speed
from ..features.resident import ResidentFeatures, StreamedFeatures
from ..files import write_csv
from ..metrics.tables import TABLES, read_one, rounded
from ..provenance import provenance
from ..target.load import Target
from ..target.wheels import DEFAULT_TARGET
from ..text.generate import GeneratorSettings, generate_batch
from ..text.rows import rows_at_once
from ..training.config import TrainConfig, batches, configurations
from ..training.cost import BYTES, chain_cost, run_work, target_cost, training_flops
from ..training.judging import match_documents
from ..training.loop import Training
from .notebooks import parameter_defaults
from .profiles import NOTEBOOKS

BENCHED = ("hidden_31", "kv_4", "hybrid", "block_kv_2")
CHAIN = Chain(2)
WARM_UP = 3  # steps: the first compiles, the second records graphs


def bench(
    *, target: str = DEFAULT_TARGET, corpus: str = "selfgen", drafter: str = "data/checkpoints/hidden_31_continued",
    documents: int = 0, steps: int = 0, texts: int = 0, vocabulary: int = 8192, processes: Sequence[int] = (1, 2),
    out: str = "results/bench.csv", share: bool = False,
) -> None:  # fmt: skip
    """Capture, training, judging, generation and decoding, as users run them: rows of ``out`` beside other machines'.

    ``documents`` are the longest of the corpus, a training step takes half of them; ``texts`` are written at once. By
    default (0) 64 and 4,096 on a GPU, 8 and 16 elsewhere; ``steps`` 20 there, 3 here. ``drafter`` is a folder, decoded
    with in a chain of 2 ("": none). Training is timed in several ``processes``, each of which does ``share``.
    """
    if share:
        parallel.begin()
    values = parameter_defaults(NOTEBOOKS["extract"]) | {"target": target, "corpus": corpus, "dtype": "auto"}
    made = prepare(values | {"train_documents": None})
    model, card = made.target, made.target.device.type == "cuda"
    documents, texts = documents or (64 if card else 8), texts or (4096 if card else 16)
    steps = steps or (20 if card else 3)
    training = TrainConfig(batch_documents=max(1, documents // 2))
    longest = sorted(made.documents["train"].documents, key=lambda d: -len(d.tokens))[:documents]
    live = LiveFeatures(model, longest, made.spec)
    draft_ids = draft_vocabulary(torch.from_numpy(made.answer_token_counts), min(vocabulary, model.vocab_size))
    if share:
        found = training_speed(model, live, configs_of("kv_2"), training, draft_ids, steps, card)
        if parallel.is_main():
            print(f"data-parallel {found:.2f}", flush=True)
        return
    drafting = in_dtype(load_drafter(drafter, model), model.dtype) if drafter else None
    bench = Bench(model, out)
    extraction, bare = extraction_speed(live, range(training.batch_documents))
    bench.add("capture", extraction, "tokens/s", bare)
    resident = ResidentFeatures(live, model.device)
    for name, config in zip(BENCHED, configs_of(*BENCHED)):
        built = build_drafter(config, model, live.spec, draft_ids)
        work = run_work(longest, replace(training, epochs=1), config.paradigm != "block")
        floor = bench.flops * work.tokens / training_flops(built, work)
        found = training_speed(model, resident, [config], training, draft_ids, steps, card)
        bench.add(f"train {name}", found, "tokens/s", floor)
        judged = partial(match_documents, resident, built, training.ttt_steps, device=model.device, dtype=model.dtype)
        bench.add(f"judge {name}", len(resident) / seconds(judged, 1), "documents/s")
    for whence, source in (("memory", resident), ("one stream", StreamedFeatures(live))):
        found = training_speed(model, source, configs_of(*BENCHED), training, draft_ids, steps, card)
        bench.add(f"train these by turns from {whence}", found, "tokens/s")
    own = {"target": target, "corpus": corpus, "documents": documents, "steps": steps, "vocabulary": vocabulary}
    for number in processes:
        bench.add(f"train kv_2 from live features, {number} processes", launched_speed(number, own), "tokens/s")
    bench.generation(texts)
    prompts = [document.prompt for document in made.documents["evaluation"].documents[:8]]
    bench.decoding(prompts, None, ALONE)
    if drafting:
        bench.decoding(prompts, drafting, CHAIN)
    bench.add("peak memory", peak_memory_gb(model.device), "GB")


class Bench:
    """Rows of a table of speeds, printed and written as they come; those of other machines stay.

    flops, moved : operations and bytes a second of a large matrix product and a large copy, in the target's dtype.
    """

    def __init__(self, target: Target, out: str | Path):
        self.target, self.path, device = target, Path(out), target.device
        self.bytes = target.dtype.itemsize / BYTES  # of what `cost` counts in bfloat16
        size = 8192 if device.type == "cuda" else 1024
        square = torch.randn(size, size, device=device).to(target.dtype)
        other = torch.empty_like(square)
        self.flops = 2 * size**3 / seconds(lambda: torch.mm(square, square, out=other))
        self.moved = 2 * square.nbytes / seconds(lambda: other.copy_(square))
        told = provenance(device)
        self.facts = {"card": told["device"], "date": told["date"], "revision": told["git_revision"]}
        print(f"{told['device']}, torch {told['torch']}, target {target.name}, {target.dtype}")
        print(f"a matrix product has {self.flops:.3g} FLOP/s, a copy moves {self.moved:.3g} bytes/s")

    def add(self, what: str, value: float, unit: str, floor: float = math.nan) -> None:
        """One speed, and the most that could be (nothing, where it isn't counted)."""
        told = "" if math.isnan(floor) else f", {value / floor:.1%} of {floor:,.0f}"
        print(f"{what:42} {value:>12,.1f} {unit}{told}", flush=True)
        row = {"what": f"{what}, {self.target.name}", "value": value, "unit": unit, "floor": floor} | self.facts
        known, new = read_one(self.path, "bench"), pd.DataFrame([row])
        table = new if known.empty else pd.concat([known, new]).drop_duplicates(TABLES["bench"].keys, keep="last")
        write_csv(self.path, rounded(table))

    def generation(self, texts: int) -> None:
        """Answer tokens/s of a batch of dialogues, user turns included; a step moves weights and every row's cache."""
        settings = GeneratorSettings(batch_size=texts)
        length, rows = settings.max_length_tokens, rows_at_once(self.target, settings.max_length_tokens, texts)
        if self.target.device.type == "cuda":  # the first batch records graphs
            generate_batch(self.target, "train", 1, replace(settings, batch_size=rows))
        begun = time.perf_counter()
        made = generate_batch(self.target, "train", 0, settings)
        took = time.perf_counter() - begun
        weights, all_moved = (target_cost(self.target, seen).bytes for seen in (0, length // 2))
        floor = self.moved / self.bytes / (weights / rows + all_moved - weights)
        answers = sum(len(document.answer) for document in made)
        self.add(f"write dialogues, {rows} at a time", answers / took, "answer tokens/s", floor)

    def decoding(self, prompts: Sequence[np.ndarray], drafter: Drafter | None, plan: Chain, new: int = 64) -> None:
        """Tokens/s of greedy answers; the target's and the drafter's weights and entries move once a round."""
        tokens, forwards, took = 0, 0, 0.0
        for prompt in prompts:
            work = partial(decode, self.target, drafter, prompt, plan, max_new_tokens=new)
            out, times = take_turns(self.target.device, {plan: work}, 3)[plan]
            tokens, forwards, took = tokens + len(out.tokens), forwards + out.target_forwards, took + median(times)
        drafted = chain_cost(drafter, draft_length=plan.length).bytes if drafter else 0
        mat = (tokens - len(prompts)) / forwards  # the prompt gives the first token
        floor = mat * self.moved / self.bytes / (target_cost(self.target).bytes + drafted)
        what = f"decode with a chain of {plan.length}" if drafter else "decode alone"
        self.add(what, tokens / took, "tokens/s", floor)


def configs_of(*variants: str) -> list[DrafterConfig]:
    """The configuration of each variant."""
    return [configurations(parameters_of(variant))[0] for variant in variants]


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Of ``work``, the median, after first runs that aren't timed."""
    timer = Timer("work()", globals={"work": work})  # it waits for a GPU, and warms up
    return median(timer.timeit(1).median for _ in range(repeats))


def training_speed(
    target: Target, source, configs: Sequence[DrafterConfig], training: TrainConfig, draft_ids: torch.Tensor,
    steps: int, compiled: bool = False,
) -> float:  # fmt: skip
    """Tokens/s of so many steps of drafters by turns, over all processes, after some that warm up (and compile)."""
    drafters = [build_drafter(config, target, source.spec, draft_ids) for config in configs]
    drafters = [drafter.compile_steps() if compiled else drafter for drafter in drafters]
    short = replace(training, max_steps=WARM_UP + steps, epochs=WARM_UP + steps, branch_warmup_steps=0)
    with tempfile.TemporaryDirectory() as empty:
        trainings = [Training(drafter, source, source, short, empty, target.dtype) for drafter in drafters]
    for number, indices in enumerate(batches(source.lengths, short, 0, short.max_steps)):
        if number == WARM_UP:
            trainings[-1].check()  # waits for the device
            tokens, begun = trainings[0].progress.trained_tokens, time.perf_counter()
        for one in trainings:
            one.step(indices)
    trainings[-1].check()
    return (trainings[0].progress.trained_tokens - tokens) / (time.perf_counter() - begun)


def launched_speed(processes: int, options: dict) -> float:
    """Tokens/s of `bench`'s training in so many processes, started by `accelerate launch`."""
    several = ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    several += ["--num_processes", str(processes), "-m"]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", *(several if processes > 1 else ()), "kvshot_lib", "bench", "--share", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.findall(r"^data-parallel ([\d.]+)$", ended.stdout, re.MULTILINE)
    if ended.returncode or len(found) != 1:
        why = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise StudyError(f"training with {processes} processes failed: {why}")
    return float(found[0])


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this process has held: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
