"""Every stage of a profile for a few steps, with the target's real size and random weights: what will it take?

Random weights change neither time nor memory, but for draft acceptance, so decoding is timed by step. The stages go
through the code that a study runs; hours and disk are extrapolated from them. Nothing is downloaded.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..decoding.decode import decode
from ..decoding.latency import ARCHITECTURES
from ..decoding.propose import Tree
from ..drafters.drafter import build_drafter, in_dtype
from ..errors import StudyError
from ..features.live import LiveFeatures
from ..features.spec import FeatureSpec, feature_spec
from ..features.store import write_store
from ..files import write_csv
from ..provenance import device_name
from ..target.capture import uniform_layers
from ..target.load import Target, full_attention_layers, resolve_device, resolve_dtype
from ..target.smollm2 import DEFAULT_TARGET, smollm2_folder
from ..target.tiny import tiny_tokenizer
from ..text.corpus import Document
from ..text.generate import GeneratorSettings, write_answers
from ..training.config import configurations
from ..training.judging import match_documents
from ..training.loop import train
from .bench import peak_memory_bytes
from .notebooks import check_names
from .profiles import Profile, checked_profile, extract_values, results_of, train_values

NARROW = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64,
}  # fmt: skip
PROMPT_TOKENS = 64


@dataclass
class Stage:
    """What one stage took: ``tokens`` (or draft-verify ``steps``) in ``seconds``, and the most memory held meanwhile.

    ``passes`` over its dialogues are what a study makes.
    """

    name: str
    passes: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    steps: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Stages(list):
    """Stages as they are timed, on one target; each is printed and kept in the table ``out``, if wanted."""

    def __init__(self, target: Target, out: str = ""):
        super().__init__()
        self.target, self.out = target, out

    @contextmanager
    def timed(self, name: str, passes: float = 0.0) -> Iterator[Stage]:
        """Time and peak memory of the block; it fills in the tokens (and the seconds, where it knows better)."""
        device, stage = self.target.device, Stage(name, passes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        yield stage
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stage.seconds = stage.seconds or time.perf_counter() - started
        stage.memory_bytes = peak_memory_bytes(device)
        self.append(stage)
        told = f"{stage.tokens_per_s:>10,.0f} tokens/s "
        if stage.steps:
            told = f"{1000 * stage.seconds / stage.steps:>10,.1f} ms a step"
        print(f"{name:24} {told}, {stage.memory_bytes / 1e9:6.1f} GB at most", flush=True)
        if self.out:
            rows = [vars(s) | {"tokens_per_s": s.tokens_per_s, "device": device_name(device)} for s in self]
            write_csv(Path(self.out), pd.DataFrame(rows))


def dry_run(
    profile: str, *, layers: int = 0, narrow: bool = False, steps: int = 20, length: int = 0, drafters: Sequence[str] = (),
    dialogues: int = 280_000, device: str = "auto", dtype: str = "auto", out: str = "",
) -> str:  # fmt: skip
    """Every stage of a profile for a few steps with random weights: what will it take?

    Parameters
    ----------
    layers : cut the target to so many (0: don't). narrow : and to a width that a CPU can take.
    steps : of each stage. length : tokens of a document (0: the profile's). drafters : some of the profile's (all by default).
    dialogues : to extrapolate to; the paper's larger set by default. out : FILE.csv that keeps the stages as a table.
    """
    loaded = checked_profile(profile)
    check_names(drafters, loaded.drafters, f"profile {loaded.name}, drafters:")
    extract = loaded.extract | ({"max_length_tokens": length} if length else {})
    chosen = {name: own for name, own in loaded.drafters.items() if name in (drafters or loaded.drafters)}
    loaded = replace(loaded, extract=extract, drafters=chosen)
    target = random_target(loaded, layers, narrow, device, dtype)
    size = sum(p.numel() for p in target.model.parameters())
    print(f"{device_name(target.device)}, torch {torch.__version__}, {target.name}: {size:,} parameters, {target.dtype}", flush=True)
    stages = Stages(target, out)
    run_stages(loaded, stages, steps)
    return extrapolation(loaded, stages, dialogues)


def random_target(profile: Profile, layers: int, narrow: bool, device: str, dtype: str) -> Target:
    """The profile's target with random weights made on the device, and a tokenizer of a few hundred words."""
    where, config = resolve_device(device), target_config(profile)
    changes = (NARROW if narrow else {}) | ({"num_hidden_layers": layers, "layer_types": None} if layers else {})
    config = type(config)(**config.to_dict() | changes)
    with torch.device(where), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = resolve_dtype(dtype, where)
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    full_attention_layers(model)
    told = f"{profile.name}, {config.num_hidden_layers} layers, random weights"
    return Target(told, model, tiny_tokenizer(), "random", "none")


def target_config(profile: Profile) -> PretrainedConfig:
    """Config of the profile's target: known here (Qwen3-8B's), or read from the hub or its folder."""
    target = profile.extract.get("target", DEFAULT_TARGET)
    if known := {"Qwen/Qwen3-8B": "qwen3-8b", "tiny": "tiny"}.get(target):
        return AutoConfig.for_model("qwen3", **ARCHITECTURES[known])
    try:
        return AutoConfig.from_pretrained(str(smollm2_folder()) if target == DEFAULT_TARGET else target)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise StudyError(f"could not read the config of target {target!r}: {why}; known without: Qwen/Qwen3-8B") from error


def random_documents(target: Target, number: int, length: int) -> list[Document]:
    """Documents of ``length`` random tokens, an eighth of them prompt."""
    chance = np.random.default_rng(0)
    mask = np.arange(length) >= length // 8
    return [Document(chance.integers(3, target.vocab_size, length).astype(np.int32), mask) for _ in range(number)]


def run_stages(profile: Profile, stages: Stages, steps: int) -> None:
    """All stages, in the order of a study."""
    values, target = extract_values(profile, results_of(profile)), stages.target
    batch, length = values["batch_documents"], values["max_length_tokens"]
    settings = GeneratorSettings(PROMPT_TOKENS + steps, batch_size=(profile.dialogues or {}).get("batch_size", 32))
    prompts = [document.tokens for document in random_documents(target, settings.batch_size, PROMPT_TOKENS)]
    write_answers(target, prompts[:1], settings, greedy=False)
    with stages.timed("generate answers", 1.0) as stage:
        stage.tokens = sum(len(document.answer) for document in write_answers(target, prompts, settings, greedy=False))
    spec = feature_spec(target, values["kv_layers"])
    live = LiveFeatures(target, random_documents(target, steps * batch, length), spec, length)
    live.batch([0])
    with stages.timed("extract on the fly") as stage:
        for step in range(steps):
            live.batch(range(step * batch, (step + 1) * batch))
        stage.tokens = steps * batch * length
    few = LiveFeatures(target, live.documents[: values["shard_documents"]], spec, length)
    with tempfile.TemporaryDirectory() as folder, stages.timed("extract into a store", 1.0) as stage:
        write_store(folder, few, batch_documents=batch, shard_documents=values["shard_documents"])
        stage.tokens = sum(few.lengths)
    for variant in profile.drafters:
        given = train_values(profile, variant, 0)
        try:
            drafter_stages(stages, live, variant, given, steps)
        except torch.OutOfMemoryError:
            told = f"{variant}: out of memory with batch_documents={given['batch_documents']}; set fewer in the profile"
            print(told, flush=True)
            torch.cuda.empty_cache()


def drafter_stages(stages: Stages, live: LiveFeatures, variant: str, values: dict, steps: int) -> None:
    """Train one drafter from features made on the fly, judge it, and decode with it."""
    target, (made, config) = stages.target, configurations(values)
    if made.reads_kv:
        live = live.with_kv_layers(uniform_layers(full_attention_layers(target.model), made.kv_layers))
    draft_ids = torch.arange(min(values["draft_vocab_size"], target.vocab_size))
    drafter = build_drafter(made, target, live.spec, draft_ids)
    if values["compile_steps"] and target.device.type == "cuda":  # on a CPU compiling would take longer than the run
        drafter.compile_steps()
    documents, judged = (
        LiveFeatures(target, live.documents[:number], live.spec, live.max_length_tokens)
        for number in (steps * config.batch_documents, 2)
    )
    short = replace(config, validate_every=0, checkpoint_every_s=1e9, branch_warmup_steps=min(config.branch_warmup_steps, 1))
    with tempfile.TemporaryDirectory() as folder:  # the first steps warm up, and compile
        train(drafter, documents, judged, replace(short, max_steps=2, epochs=2), folder, dtype=target.dtype)
    with tempfile.TemporaryDirectory() as folder, stages.timed(f"train {variant}", config.epochs) as stage:
        history = train(drafter, documents, judged, replace(short, max_steps=steps, epochs=steps), folder, dtype=target.dtype)
        stage.tokens, stage.seconds = int(history["trained_tokens"].max()), float(history["seconds"].max())
    with stages.timed(f"judge {variant}") as stage:
        match_documents(judged, drafter, config.ttt_steps, device=target.device, dtype=target.dtype)
        stage.tokens = sum(judged.lengths)
    if made.kv_control == "shuffled":
        return
    # One that isn't compiled, as decoding has it: a compiled one would be compiled anew for every length of the prefix.
    ready = in_dtype(build_drafter(made, target, live.spec, draft_ids), target.dtype).eval()
    prompt = live.documents[0].tokens[:PROMPT_TOKENS].tolist()
    decode(target, ready, prompt, Tree(), max_new_tokens=2, eos_token_ids=())  # the first call allocates
    with stages.timed(f"decode {variant}") as stage:
        done = decode(target, ready, prompt, Tree(), max_new_tokens=steps + 1, eos_token_ids=())
        stage.steps, stage.seconds = done.target_forwards, done.draft_s + done.verify_s + done.other_s


def disk_table(spec: FeatureSpec, tokens: int) -> pd.DataFrame:
    """Bytes of stored features: this study's, what a KV drafter needs of them, and hidden states alone (as EAGLE-3's)."""
    size = spec.bytes_per_token
    kv, judge = size["keys"] + size["values"], size["final_hidden"] + size["target_argmax"]
    kinds = {
        "KV of the reused layers": kv,
        "fused hidden states": size["hidden_states"],
        "final hidden state and argmax": judge,
        "all of that (the store)": kv + size["hidden_states"] + judge,
        "for kv drafters alone": kv + judge,
        "hidden-state storage (fused and final)": size["hidden_states"] + size["final_hidden"],
        "on the fly (features: live)": 0,
    }
    rows = [(name, number, number * tokens / 1e12) for name, number in kinds.items()]
    return pd.DataFrame(rows, columns=["stored", "bytes a token", "TB"])


def hours(stages: Sequence[Stage], tokens: int) -> pd.DataFrame:
    """Hours of each stage that a study passes all its dialogues through, ``passes`` times."""
    rows = [(s.name, s.passes, s.tokens_per_s, s.passes * tokens / s.tokens_per_s / 3600) for s in stages if s.passes]
    return pd.DataFrame(rows, columns=["stage", "passes", "tokens/s", "hours"])


def extrapolation(profile: Profile, stages: Stages, dialogues: int) -> str:
    """Hours and disk of so many dialogues, as text."""
    values, config = extract_values(profile, results_of(profile)), stages.target.config
    length, tokens = values["max_length_tokens"], dialogues * values["max_length_tokens"]
    cut = config.num_hidden_layers != target_config(profile).num_hidden_layers
    told = " (of a target cut short: not the whole one's)" if cut else ""
    numbers = {"float_format": lambda x: f"{x:,.2f}" if x < 100 else f"{x:,.0f}", "index": False}
    return (
        f"\n{dialogues:,} dialogues of {length:,} tokens (at most): {tokens / 1e9:.2f} billion tokens, one device{told}\n"
        f"{hours(stages, tokens).to_string(**numbers)}\n\n"
        f"{disk_table(feature_spec(stages.target, values['kv_layers']), tokens).to_string(**numbers)}\n\n"
        f"this profile keeps features: {values['features']}. With live ones nothing of the training split is extracted, and\n"
        "trainings run the target over every batch once more: their tokens/s above include that."
    )
