"""What a study takes: a profile tried at its real size.

A dry run gives the profile's target random weights, which change neither time nor memory; generation, extraction and
every training go a few steps through the code that a study runs. Nothing is downloaded.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..decoding.latency import ARCHITECTURES
from ..drafters.context import drafter_spec, read_by
from ..errors import StudyError
from ..features.extract import extracted
from ..features.live import LiveFeatures, extraction_speed
from ..provenance import device_name
from ..target.load import Target, resolve_device, resolve_dtype
from ..target.tiny import tiny_tokenizer
from ..target.wheels import DEFAULT_TARGET, PACKED, packed_folder
from ..text.corpus import Document
from ..text.generate import GeneratorSettings, write_answers
from ..training.config import configurations
from .bench import peak_memory_gb, training_speed
from .notebooks import check_names
from .profiles import Profile, checked_profile, extract_values, train_values

PROMPT_TOKENS = 64


def dry_run(
    profile: str, *, steps: int = 20, length: int = 0, drafters: Sequence[str] = (), dialogues: int = 280_000,
    device: str = "auto", dtype: str = "auto",
) -> str:  # fmt: skip
    """A profile's generation, extraction and trainings for a few steps with random weights: what will it take?"""
    loaded = checked_profile(profile)
    check_names(drafters, loaded.drafters, f"profile {loaded.name}, drafters:")
    values = extract_values(loaded, loaded.results) | ({"max_length_tokens": length} if length else {})
    target, length = random_target(loaded, device, dtype), values["max_length_tokens"]
    size = sum(p.numel() for p in target.model.parameters())
    machine = f"{device_name(target.device)}, torch {torch.__version__}"
    print(f"{machine}, {target.name}: {size:,} parameters, {target.dtype}", flush=True)
    tokens, spec = dialogues * length, extracted(target, values)

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
            compiled = given["compile_steps"] and target.device.type == "cuda"
            found = training_speed(target, source, [config], training, draft_ids, steps, compiled)
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


def random_target(profile: Profile, device: str, dtype: str) -> Target:
    """The profile's target with random weights made on the device, and a tokenizer of a few hundred words."""
    where, config = resolve_device(device), target_config(profile.extract.get("target", DEFAULT_TARGET))
    with torch.device(where), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(dtype, where), attn_implementation="sdpa")
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
