"""What a study takes: its heavy loops timed on this machine (`bench`), a profile tried at its real size (`dry_run`).

A dry run gives the profile's target random weights, which change neither time nor memory; generation, extraction and
every training go a few steps through the code that a study runs. Nothing is downloaded.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .. import parallel
from ..decoding.latency import ARCHITECTURES
from ..drafters.checkpoint import draft_vocabulary
from ..drafters.config import DrafterConfig
from ..drafters.context import drafter_spec, read_by
from ..drafters.drafter import build_drafter
from ..drafters.variants import parameters_of
from ..errors import StudyError
from ..features.extract import prepare
from ..features.live import LiveFeatures, extraction_speed
from ..features.spec import feature_spec
from ..features.store import StoredFeatures, write_store
from ..provenance import device_name
from ..target.load import Target, resolve_device, resolve_dtype
from ..target.tiny import tiny_tokenizer
from ..target.wheels import DEFAULT_TARGET, PACKED, packed_folder
from ..text.corpus import Document
from ..text.generate import GeneratorSettings, write_answers
from ..training.config import TrainConfig, configurations
from ..training.loop import train
from .notebooks import check_names, parameter_defaults
from .profiles import NOTEBOOKS, Profile, checked_profile, extract_values, train_values

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
    """Speed of extraction (beside the bare target forward) and of training, in tokens/s, over the longest documents.

    Training is in batches of four, also in several processes; ``share`` is what each of these does.
    """
    if share:
        parallel.begin()
    values = parameter_defaults(NOTEBOOKS["extract"]) | {"target": target, "corpus": corpus, "dtype": "auto"}
    made = prepare(values | {"train_documents": None})
    model, batches = made.target, TrainConfig(batch_documents=4)
    longest = sorted(made.documents["train"].documents, key=lambda d: -len(d.tokens))[:documents]
    live = LiveFeatures(model, longest, made.spec)
    draft_ids = draft_vocabulary(torch.from_numpy(made.answer_token_counts), min(vocabulary, model.vocab_size))
    if share:
        found = training_speed(model, live, configurations(parameters_of("kv_2"))[0], batches, draft_ids, steps)
        if parallel.is_main():
            print(f"data-parallel {found:.2f}", flush=True)
        return
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{device_name(model.device)}, {dtype}, torch {torch.__version__}, target {model.name}")
    extraction, bare = extraction_speed(live, range(min(4, len(live))))
    print(f"extraction {extraction:,.0f} tokens/s, bare forward {bare:,.0f}: ratio {extraction / bare:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        write_store(folder, live, batch_documents=4)
        for name in BENCHED:
            for fraction in (1.0, 0.2):
                config, training = configurations(parameters_of(name))[0], replace(batches, anchor_fraction=fraction)
                found = training_speed(model, StoredFeatures(folder), config, training, draft_ids, steps)
                print(f"train {name:10} anchor_fraction {fraction:.1f}: {found:>8,.0f} tokens/s", flush=True)
    own = {"target": target, "corpus": corpus, "documents": documents, "steps": steps, "vocabulary": vocabulary}
    speeds = [launched_speed(number, own) for number in processes]
    for number, found in zip(processes, speeds, strict=True):
        told = f"train kv_2 from live features, {number} process(es): {found:,.0f} tokens/s"
        print(f"{told}, {found / speeds[0]:.2f} times the first")
    print(f"peak memory {peak_memory_gb(model.device):.1f} GB")


def training_speed(
    target: Target, source, config: DrafterConfig, training: TrainConfig, draft_ids: torch.Tensor, steps: int,
    compiled: bool = False,
) -> float:  # fmt: skip
    """Tokens/s of so many steps, over however many processes there are; two steps before them warm up (and compile)."""
    training = replace(training, validate_every=0, checkpoint_every_s=1e9)
    drafter = build_drafter(config, target, source.spec, draft_ids)
    if compiled and target.device.type == "cuda":  # on a CPU compiling would take longer than the run
        drafter.compile_steps()
    for number in (2, steps):
        short = replace(training, max_steps=number, epochs=number + 1, branch_warmup_steps=0)
        with tempfile.TemporaryDirectory() as folder:
            history = train(drafter, source, source, short, folder, dtype=target.dtype)
    return history["trained_tokens"].max() / history["seconds"].max()


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


def dry_run(
    profile: str, *, layers: int = 0, narrow: bool = False, steps: int = 20, length: int = 0,
    drafters: Sequence[str] = (), dialogues: int = 280_000, device: str = "auto", dtype: str = "auto",
) -> str:  # fmt: skip
    """A profile's generation, extraction and trainings for a few steps with random weights: what will it take?"""
    loaded = checked_profile(profile)
    check_names(drafters, loaded.drafters, f"profile {loaded.name}, drafters:")
    values = extract_values(loaded, loaded.results) | ({"max_length_tokens": length} if length else {})
    target, length = random_target(loaded, layers, narrow, device, dtype), values["max_length_tokens"]
    size = sum(p.numel() for p in target.model.parameters())
    machine = f"{device_name(target.device)}, torch {torch.__version__}"
    print(f"{machine}, {target.name}: {size:,} parameters, {target.dtype}", flush=True)
    tokens, spec = dialogues * length, feature_spec(target, values["kv_layers"])

    def tell(stage: str, speed: float, passes: int) -> None:
        took = f"{passes * tokens / speed / 3600:10,.1f} hours" if passes else ""
        print(f"{stage:24} {speed:>10,.0f} tokens/s, {peak_memory_gb(target.device):6.1f} GB {took}", flush=True)

    tell("generate answers", generation_speed(target, (loaded.dialogues or {}).get("batch_size", 32), steps), 1)
    batch = values["batch_documents"]
    live = LiveFeatures(target, random_documents(target, steps * batch, length), spec, length)
    tell("extract", extraction_speed(live, range(batch))[0], int(values["features"] != "live"))
    for variant in drafters or loaded.drafters:
        given = train_values(loaded, variant, 0)
        config, training = configurations(given)
        source = read_by(config, drafter_spec(config, target), live)
        draft_ids = torch.arange(min(given["draft_vocab_size"], target.vocab_size))
        try:
            found = training_speed(target, source, config, training, draft_ids, steps, given["compile_steps"])
            tell(f"train {variant}", found, training.epochs)
        except torch.OutOfMemoryError:
            print(f"{variant}: out of memory with batch_documents={training.batch_documents}; set fewer in the profile")
            torch.cuda.empty_cache()
    stored = sum(spec.bytes_per_token.values())
    return (
        f"hours for {dialogues:,} dialogues of {length:,} tokens (at most), {tokens / 1e9:.2f} billion tokens, on one "
        f"device;\nthe target runs in each training. "
        f"Features: {stored:,} bytes a token, {tokens * stored / 1e12:.2f} TB"
    )


def generation_speed(target: Target, batch: int, steps: int) -> float:
    """Answer tokens/s of a batch of prompts; one prompt before them warms up."""
    settings = GeneratorSettings(max_length_tokens=PROMPT_TOKENS + steps, batch_size=batch)
    prompts = [document.tokens for document in random_documents(target, batch, PROMPT_TOKENS)]
    write_answers(target, prompts[:1], settings, greedy=False)
    started = time.perf_counter()
    answers = write_answers(target, prompts, settings, greedy=False)
    return sum(len(document.answer) for document in answers) / (time.perf_counter() - started)


def random_documents(target: Target, number: int, length: int) -> list[Document]:
    """Documents of ``length`` random tokens, an eighth of them prompt."""
    chance, mask = np.random.default_rng(0), np.arange(length) >= length // 8
    return [Document(chance.integers(3, target.vocab_size, length).astype(np.int32), mask) for _ in range(number)]


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
        return AutoConfig.from_pretrained(packed_folder(target) if target in PACKED else target)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise StudyError(f"can't read the config of target {target!r}: {why}; known without: Qwen/Qwen3-8B") from error
