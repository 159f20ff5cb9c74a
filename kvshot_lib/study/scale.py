"""What a study takes: its heavy loops timed on this machine (`bench`), a profile tried at its real size (`dry_run`).

A dry run gives the profile's target random weights, which change neither time nor memory, but for draft acceptance; so
decoding is timed by step. Every stage goes a few steps through the code that a study runs. Nothing is downloaded.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .. import parallel
from ..decoding.decode import decode
from ..decoding.latency import ARCHITECTURES
from ..decoding.propose import Tree
from ..drafters.checkpoint import draft_vocabulary
from ..drafters.context import drafter_spec, read_by
from ..drafters.drafter import Drafter, build_drafter, in_dtype
from ..drafters.variants import parameters_of
from ..errors import StudyError
from ..features.extract import prepare
from ..features.live import LiveFeatures, extraction_speed
from ..features.spec import FeatureSpec, feature_spec
from ..features.store import StoredFeatures, write_store
from ..provenance import device_name
from ..target.load import Target, resolve_device, resolve_dtype
from ..target.smollm2 import DEFAULT_TARGET, smollm2_folder
from ..target.tiny import tiny_tokenizer
from ..text.corpus import Document
from ..text.generate import GeneratorSettings, write_answers
from ..training.config import TrainConfig, configurations
from ..training.judging import match_documents
from ..training.loop import train
from .notebooks import check_names, parameter_defaults
from .profiles import NOTEBOOKS, Profile, checked_profile, extract_values, results_of, train_values

BENCHED = ("hidden", "kv_2", "hybrid", "block_kv_2")
NARROW = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
PROMPT_TOKENS = 64


def bench(
    *, target: str = DEFAULT_TARGET, corpus: str = "selfgen", documents: int = 8, steps: int = 3,
    vocabulary: int = 8192, processes: Sequence[int] = (1, 2), share: bool = False,
) -> None:  # fmt: skip
    """Speed of extraction and training on this machine.

    Extraction is given as a ratio to the bare target forward, training in tokens/s over batches of four documents.

    Parameters
    ----------
    documents : the longest of the corpus. steps : timed training steps. vocabulary : draft_vocab_size.
    processes : numbers of processes to train with, one after the other. share : only this process's part of that.
    """
    if share:
        parallel.begin()
    values = parameter_defaults(NOTEBOOKS["extract"]) | {"target": target, "corpus": corpus, "dtype": "auto"}
    made = prepare(values | {"train_documents": None})
    model, device = made.target, made.target.device
    longest = sorted(made.documents["train"].documents, key=lambda d: -len(d.tokens))[:documents]
    live = LiveFeatures(model, longest, made.spec)
    draft_ids = draft_vocabulary(torch.from_numpy(made.answer_token_counts), min(vocabulary, model.vocab_size))

    def speed(name: str, source, fraction: float = 0.2) -> float:
        drafter = build_drafter(configurations(parameters_of(name))[0], model, source.spec, draft_ids)
        training = TrainConfig(batch_documents=4, anchor_fraction=fraction)
        history = timed_training(drafter, source, training, steps, model.dtype)
        return history["trained_tokens"].max() / history["seconds"].max()

    if share:
        found = speed("kv_2", live)
        if parallel.is_main():
            print(f"data-parallel {found:.2f}", flush=True)
        return
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{device_name(device)}, {dtype}, torch {torch.__version__}, target {model.name}")
    extraction, bare = extraction_speed(live, range(min(4, len(live))))
    print(f"extraction {extraction:,.0f} tokens/s, bare forward {bare:,.0f}: ratio {extraction / bare:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        write_store(folder, live, batch_documents=4)
        for name in BENCHED:
            for fraction in (1.0, 0.2):
                found = speed(name, StoredFeatures(folder), fraction)
                print(f"train {name:10} anchor_fraction {fraction:.1f}: {found:>8,.0f} tokens/s", flush=True)
    own = {"target": target, "corpus": corpus, "documents": documents, "steps": steps, "vocabulary": vocabulary}
    speeds = [launched_speed(number, own) for number in processes]
    for number, found in zip(processes, speeds, strict=True):
        told = f"train kv_2 from live features, {number} process(es): {found:,.0f} tokens/s"
        print(f"{told}, {found / speeds[0]:.2f} times the first")
    print(f"peak memory {peak_memory_bytes(device) / 1e9:.1f} GB")


def timed_training(drafter: Drafter, source, training: TrainConfig, steps: int, dtype, judged=None) -> pd.DataFrame:
    """The history of a training of so many steps, over however many processes there are; two before it warm up."""
    training = replace(training, validate_every=0, checkpoint_every_s=1e9)
    for number in (2, steps):
        short = replace(training, max_steps=number, epochs=number + 1)
        with tempfile.TemporaryDirectory() as folder:
            history = train(drafter, source, judged or source, short, folder, dtype=dtype)
    return history


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


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Stage:
    """What one stage took: ``tokens`` (or draft-verify ``steps``) in ``seconds``.

    ``passes`` over its dialogues are what a study makes.
    """

    name: str
    passes: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@contextmanager
def timed(stages: list[Stage], device: torch.device, name: str, passes: float = 0.0) -> Iterator[Stage]:
    """Time and peak memory of the block, printed; it fills in the tokens (and the seconds, where it knows better)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started, stage = time.perf_counter(), Stage(name, passes)
    yield stage
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    stage.seconds = stage.seconds or time.perf_counter() - started
    stages.append(stage)
    told = f"{stage.tokens_per_s:>10,.0f} tokens/s"
    if stage.steps:
        told = f"{1000 * stage.seconds / stage.steps:>10,.1f} ms a step"
    print(f"{name:24} {told}, {peak_memory_bytes(device) / 1e9:6.1f} GB at most", flush=True)


def dry_run(
    profile: str, *, layers: int = 0, narrow: bool = False, steps: int = 20, length: int = 0,
    drafters: Sequence[str] = (), dialogues: int = 280_000, device: str = "auto", dtype: str = "auto",
) -> str:  # fmt: skip
    """Every stage of a profile for a few steps with random weights: what will it take?

    Parameters
    ----------
    layers : cut the target to so many (0: don't). narrow : and to a width that a CPU can take.
    steps : of each stage. length : tokens of a document (0: the profile's). drafters : some of the profile's.
    dialogues : to extrapolate to; the paper's larger set by default.
    """
    loaded = checked_profile(profile)
    check_names(drafters, loaded.drafters, f"profile {loaded.name}, drafters:")
    values = extract_values(loaded, results_of(loaded)) | ({"max_length_tokens": length} if length else {})
    target = random_target(loaded, layers, narrow, device, dtype)
    size = sum(p.numel() for p in target.model.parameters())
    machine = f"{device_name(target.device)}, torch {torch.__version__}"
    print(f"{machine}, {target.name}: {size:,} parameters, {target.dtype}", flush=True)
    stages: list[Stage] = []
    live = extraction_stages(stages, target, loaded, values, steps)
    for variant in drafters or loaded.drafters:
        given = train_values(loaded, variant, 0)
        try:
            drafter_stages(stages, live, variant, given, steps)
        except torch.OutOfMemoryError:
            print(f"{variant}: out of memory with batch_documents={given['batch_documents']}; set fewer in the profile")
            torch.cuda.empty_cache()
    return extrapolation(stages, live.spec, dialogues, values)


def random_target(profile: Profile, layers: int, narrow: bool, device: str, dtype: str) -> Target:
    """The profile's target with random weights made on the device, and a tokenizer of a few hundred words."""
    where, config = resolve_device(device), target_config(profile.extract.get("target", DEFAULT_TARGET))
    changes = (NARROW if narrow else {}) | ({"num_hidden_layers": layers, "layer_types": None} if layers else {})
    config, kind = type(config)(**config.to_dict() | changes), resolve_dtype(dtype, where)
    with torch.device(where), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    told = f"{profile.name}, {config.num_hidden_layers} layers, random weights"
    return Target(told, model, tiny_tokenizer(), "random", "none")


def target_config(target: str) -> PretrainedConfig:
    """A target's config: known here (Qwen3-8B's), or read from the hub or its folder."""
    if known := {"Qwen/Qwen3-8B": "qwen3-8b", "tiny": "tiny"}.get(target):
        return AutoConfig.for_model("qwen3", **ARCHITECTURES[known])
    try:
        return AutoConfig.from_pretrained(str(smollm2_folder()) if target == DEFAULT_TARGET else target)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise StudyError(f"can't read the config of target {target!r}: {why}; known without: Qwen/Qwen3-8B") from error


def random_documents(target: Target, number: int, length: int) -> list[Document]:
    """Documents of ``length`` random tokens, an eighth of them prompt."""
    chance, mask = np.random.default_rng(0), np.arange(length) >= length // 8
    return [Document(chance.integers(3, target.vocab_size, length).astype(np.int32), mask) for _ in range(number)]


def extraction_stages(stages: list[Stage], target: Target, profile: Profile, values: dict, steps: int) -> LiveFeatures:
    """Generate, extract on the fly, extract into a store; gives the documents that trainings read."""
    batch, length, size = values["batch_documents"], values["max_length_tokens"], values["shard_documents"]
    settings = GeneratorSettings(PROMPT_TOKENS + steps, batch_size=(profile.dialogues or {}).get("batch_size", 32))
    prompts = [document.tokens for document in random_documents(target, settings.batch_size, PROMPT_TOKENS)]
    write_answers(target, prompts[:1], settings, greedy=False)
    with timed(stages, target.device, "generate answers", 1.0) as stage:
        stage.tokens = sum(len(d.answer) for d in write_answers(target, prompts, settings, greedy=False))
    spec = feature_spec(target, values["kv_layers"])
    live = LiveFeatures(target, random_documents(target, steps * batch, length), spec, length)
    live.batch([0])
    with timed(stages, target.device, "extract on the fly") as stage:
        for step in range(steps):
            live.batch(range(step * batch, (step + 1) * batch))
        stage.tokens = sum(live.lengths)
    few = LiveFeatures(target, live.documents[:size], spec, length)
    with tempfile.TemporaryDirectory() as folder, timed(stages, target.device, "extract into a store", 1.0) as stage:
        write_store(folder, few, batch_documents=batch, shard_documents=size)
        stage.tokens = sum(few.lengths)
    return live


def drafter_stages(stages: list[Stage], live: LiveFeatures, variant: str, values: dict, steps: int) -> None:
    """Train one drafter from features made on the fly, judge it, and decode with it."""
    target, (config, training) = live.target, configurations(values)
    device, dtype = target.device, target.dtype
    live = read_by(config, drafter_spec(config, target), live)
    documents, judged = (
        LiveFeatures(target, live.documents[:number], live.spec, live.max_length_tokens)
        for number in (steps * training.batch_documents, 2)
    )
    draft_ids = torch.arange(min(values["draft_vocab_size"], target.vocab_size))
    drafter = build_drafter(config, target, live.spec, draft_ids)
    if values["compile_steps"] and device.type == "cuda":  # on a CPU compiling would take longer than the run
        drafter.compile_steps()
    short = replace(training, branch_warmup_steps=min(training.branch_warmup_steps, 1))
    with timed(stages, device, f"train {variant}", training.epochs) as stage:
        history = timed_training(drafter, documents, short, steps, dtype, judged)
        stage.tokens, stage.seconds = int(history["trained_tokens"].max()), float(history["seconds"].max())
    half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with half, timed(stages, device, f"judge {variant}") as stage:
        match_documents(judged, drafter, training.ttt_steps, device=device, dtype=dtype)
        stage.tokens = sum(judged.lengths)
    if config.kv_control == "shuffled":
        return
    # One that isn't compiled, as decoding has it: a compiled one would be compiled anew for every length of the prefix.
    ready = in_dtype(build_drafter(config, target, live.spec, draft_ids), dtype).eval()
    prompt = live.documents[0].tokens[:PROMPT_TOKENS].tolist()
    decode(target, ready, prompt, Tree(), max_new_tokens=2, eos_token_ids=())  # the first call allocates
    with timed(stages, device, f"decode {variant}") as stage:
        stage.steps = decode(target, ready, prompt, Tree(), max_new_tokens=steps + 1, eos_token_ids=()).target_forwards


def extrapolation(stages: Sequence[Stage], spec: FeatureSpec, dialogues: int, values: dict) -> str:
    """Hours and disk of so many dialogues of full length, as text."""
    length, bytes_a_token = values["max_length_tokens"], sum(spec.bytes_per_token.values())
    tokens = dialogues * length
    table = hours(stages, tokens).to_string(float_format=lambda x: f"{x:,.2f}", index=False)
    return (
        f"\n{dialogues:,} dialogues of {length:,} tokens (at most): {tokens / 1e9:.2f} billion tokens, on one device\n"
        f"{table}\n"
        f"stored features: {bytes_a_token:,} bytes a token, {tokens * bytes_a_token / 1e12:.2f} TB; this profile keeps "
        f"them {values['features']}.\nLive ones cost every training one more pass of the target (included above)."
    )


def hours(stages: Sequence[Stage], tokens: int) -> pd.DataFrame:
    """Hours of each stage that a study passes all its dialogues through, ``passes`` times."""
    rows = [(s.name, s.passes, s.tokens_per_s, s.passes * tokens / s.tokens_per_s / 3600) for s in stages if s.passes]
    return pd.DataFrame(rows, columns=["stage", "passes", "tokens/s", "hours"])
