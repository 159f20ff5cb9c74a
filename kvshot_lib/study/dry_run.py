"""Every stage of a profile for a few steps, with the target's real architecture and random weights: what will it take?

python -m kvshot_lib.study.dry_run qwen3-8b                        all 36 layers, 20 steps a stage: for a GPU
python -m kvshot_lib.study.dry_run qwen3-8b --layers 4 --narrow    a cut of it that two CPU cores run in a minute

It generates, extracts (on the fly and into a store), trains and judges every drafter and decodes with its tree, through the code that a
study runs, and prints memory, tokens/s, and the hours and disk that ``--dialogues`` dialogues of full length would take. No weights are
downloaded. Random weights change neither time nor memory, but for draft acceptance: decoding is timed by step.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..decoding.decode import decode
from ..decoding.latency import ARCHITECTURES
from ..decoding.propose import Tree
from ..drafters.drafter import DrafterConfig, build_drafter, in_dtype
from ..errors import StudyError, one_line_errors
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
from ..training.judging import match_documents
from ..training.loop import TrainConfig, train
from .bench import peak_memory_bytes
from .profiles import NOTEBOOKS, Profile, check_drafters, check_profile, load_profile, parameter_defaults

NARROW = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
PROMPT_TOKENS = 64


@dataclass
class Stage:
    """What one stage took: ``tokens`` (or draft-verify ``steps``) in ``seconds``, and the most memory held meanwhile.

    ``passes`` over its dialogues are what a study makes.
    """

    name: str
    tokens: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    passes: float = 0.0
    steps: int = 0

    @property
    def told(self) -> str:
        """Its speed, in tokens or (decoding) in steps."""
        if self.steps:
            return f"{1000 * self.seconds / self.steps:>10,.1f} ms a step"
        return f"{self.tokens_per_s:>10,.0f} tokens/s "

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def random_target(profile: Profile, layers: int, narrow: bool, device: str, dtype: str) -> Target:
    """The profile's target with random weights made on the device, and a tokenizer of a few hundred words."""
    where = resolve_device(device)
    kind = resolve_dtype(dtype, where)
    config = target_config(profile)
    changes = (NARROW if narrow else {}) | ({"num_hidden_layers": layers, "layer_types": None} if layers else {})
    config = type(config)(**config.to_dict() | changes)
    with torch.device(where), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    full_attention_layers(model)
    return Target(
        f"{profile.name}, {config.num_hidden_layers} layers, random weights", model, tiny_tokenizer(), "random", "none"
    )


def target_config(profile: Profile) -> PretrainedConfig:
    """Config of the profile's target: known here (Qwen3-8B's), or read from the hub or its folder."""
    target = profile.extract.get("target", DEFAULT_TARGET)
    known = {"Qwen/Qwen3-8B": "qwen3-8b", "tiny": "tiny"}.get(target)
    if known:
        return AutoConfig.for_model("qwen3", **ARCHITECTURES[known])
    target = str(smollm2_folder()) if target == DEFAULT_TARGET else target
    try:
        return AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise StudyError(
            f"could not read the config of target {target!r}: {why}; known without: Qwen/Qwen3-8B"
        ) from error


def random_documents(target: Target, number: int, length: int) -> list[Document]:
    """Documents of ``length`` random tokens, an eighth of them prompt."""
    chance = np.random.default_rng(0)
    mask = np.arange(length) >= length // 8
    return [Document(chance.integers(3, target.vocab_size, length).astype(np.int32), mask) for _ in range(number)]


@contextmanager
def measured(target: Target, name: str, stages: list[Stage], passes: float = 0.0) -> Iterator[Stage]:
    """Time and peak memory of the block; it fills in the tokens (and the seconds, where it knows better). Without a name it is not told."""
    cuda, stage = target.device.type == "cuda", Stage(name, passes=passes)
    if cuda:
        torch.cuda.synchronize(target.device)
        torch.cuda.reset_peak_memory_stats(target.device)
    started = time.perf_counter()
    yield stage
    if cuda:
        torch.cuda.synchronize(target.device)
    stage.seconds = stage.seconds or time.perf_counter() - started
    stage.memory_bytes = peak_memory_bytes(target.device)
    stages.append(stage)
    if name:
        print(f"{name:24} {stage.told}, {stage.memory_bytes / 1e9:6.1f} GB at most", flush=True)


def dry_run(
    profile: Profile, target: Target, steps: int, keep: Callable[[list[Stage]], object] = lambda stages: None
) -> list[Stage]:
    """All stages, in the order of a study; prints each as it ends. ``keep`` is called with those done, before the first drafter and after each."""
    extract = parameter_defaults(NOTEBOOKS["extract"]) | profile.extract
    batch, length, stages = extract["batch_documents"], extract["max_length_tokens"], []
    asked = profile.dialogues or {}
    settings = GeneratorSettings(max_length_tokens=PROMPT_TOKENS + steps, batch_size=asked.get("batch_size", 32))
    prompts = [document.tokens for document in random_documents(target, settings.batch_size, PROMPT_TOKENS)]
    write_answers(target, prompts[:1], settings, greedy=False)
    with measured(target, "generate answers", stages, 1.0) as stage:
        stage.tokens = sum(len(document.answer) for document in write_answers(target, prompts, settings, greedy=False))
    live = LiveFeatures(
        target, random_documents(target, steps * batch, length), feature_spec(target, extract["kv_layers"]), length
    )
    live.batch([0])
    with measured(target, "extract on the fly", stages) as stage:
        for step in range(steps):
            live.batch(range(step * batch, (step + 1) * batch))
        stage.tokens = steps * batch * length
    few = LiveFeatures(target, live.documents[: extract["shard_documents"]], live.spec, length)
    with tempfile.TemporaryDirectory() as folder, measured(target, "extract into a store", stages, 1.0) as stage:
        write_store(folder, few, batch_documents=batch, shard_documents=extract["shard_documents"])
        stage.tokens = sum(few.lengths)
    keep(stages)
    for variant, parameters in profile.drafters.items():
        values = parameter_defaults(NOTEBOOKS["train"]) | profile.train | parameters
        try:
            train_stages(target, live, variant, values, steps, stages)
        except torch.OutOfMemoryError:
            print(
                f"{variant}: out of memory with batch_documents={values['batch_documents']}; set fewer in the profile",
                flush=True,
            )
            torch.cuda.empty_cache()
        keep(stages)
    return stages


def train_stages(
    target: Target, live: LiveFeatures, variant: str, values: dict, steps: int, stages: list[Stage]
) -> None:
    """Train one drafter from features made on the fly, judge it, and decode with it."""
    drafter_config, config = (
        kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
        for kind in (DrafterConfig, TrainConfig)
    )
    source = live
    if drafter_config.reads_kv:
        source = live.with_kv_layers(uniform_layers(full_attention_layers(target.model), drafter_config.kv_layers))
    draft_ids = torch.arange(min(values["draft_vocab_size"], target.vocab_size))
    drafter = build_drafter(drafter_config, target, source.spec, draft_ids)
    if values["compile_steps"] and target.device.type == "cuda":  # on a CPU compiling would take longer than the run
        drafter.compile_steps()
    wanted = min(steps * config.batch_documents, len(source.documents))
    documents = LiveFeatures(target, source.documents[:wanted], source.spec, source.max_length_tokens)
    judged = LiveFeatures(target, source.documents[:2], source.spec, source.max_length_tokens)
    given = {f.name: getattr(config, f.name) for f in fields(config)} | {"validate_every": 0, "checkpoint_every_s": 1e9}
    given |= {"branch_warmup_steps": min(config.branch_warmup_steps, 1)}
    for number, name in ((2, ""), (steps, f"train {variant}")):  # the first warms up, and compiles
        own = TrainConfig(**given | {"max_steps": number, "epochs": number})
        with (
            tempfile.TemporaryDirectory() as folder,
            measured(target, name, stages if name else [], config.epochs) as stage,
        ):
            history = train(drafter, documents, judged, own, folder, dtype=target.dtype)
            stage.tokens, stage.seconds = int(history["trained_tokens"].max()), float(history["seconds"].max())
    with (
        measured(target, f"judge {variant}", stages) as stage,
        torch.autocast(target.device.type, target.dtype, enabled=target.dtype != torch.float32),
    ):
        match_documents(judged, drafter, config.ttt_steps, device=target.device, dtype=target.dtype)
        stage.tokens = sum(judged.lengths)
    if drafter_config.kv_control == "shuffled":
        return
    # A drafter that isn't compiled, as decoding has it: a compiled one would be compiled anew for one length of the prefix after another.
    ready = in_dtype(build_drafter(drafter_config, target, source.spec, draft_ids), target.dtype).eval()
    prompt = live.documents[0].tokens[:PROMPT_TOKENS].tolist()
    decode(target, ready, prompt, Tree(), max_new_tokens=2, eos_token_ids=())  # the first call allocates
    with measured(target, f"decode {variant}", stages) as stage:
        made = decode(target, ready, prompt, Tree(), max_new_tokens=steps + 1, eos_token_ids=())
        stage.steps, stage.seconds = made.target_forwards, made.draft_s + made.verify_s + made.other_s


def disk_table(spec: FeatureSpec, tokens: int) -> pd.DataFrame:
    """Bytes of stored features: this study's, what a KV drafter needs of them, and hidden states alone (as EAGLE-3's trainers store them)."""
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


def hours(stages: list[Stage], tokens: int) -> pd.DataFrame:
    """Hours of each stage that a study passes all its dialogues through, ``passes`` times."""
    rows = [(s.name, s.passes, s.tokens_per_s, s.passes * tokens / s.tokens_per_s / 3600) for s in stages if s.passes]
    return pd.DataFrame(rows, columns=["stage", "passes", "tokens/s", "hours"])


def report(profile: Profile, target: Target, stages: list[Stage], dialogues: int) -> str:
    """The extrapolation, as text."""
    extract = parameter_defaults(NOTEBOOKS["extract"]) | profile.extract
    tokens = dialogues * extract["max_length_tokens"]
    cut = target.config.num_hidden_layers != target_config(profile).num_hidden_layers
    numbers = {"float_format": lambda x: f"{x:,.2f}" if x < 100 else f"{x:,.0f}", "index": False}
    return "\n".join(
        [
            f"\n{dialogues:,} dialogues of {extract['max_length_tokens']:,} tokens (at most): {tokens / 1e9:.2f} billion tokens, one device"
            + (" (of a target cut short: not the whole one's)" if cut else ""),
            hours(stages, tokens).to_string(**numbers),
            "",
            disk_table(feature_spec(target, extract["kv_layers"]), tokens).to_string(**numbers),
            "",
            f"this profile keeps features: {extract['features']}. With live ones nothing of the training split is extracted, and",
            "trainings run the target over every batch once more: their tokens/s above include that.",
        ]
    )


def write_stages(path: str, target: Target, stages: list[Stage]) -> None:
    """The stages done as a table, a row each; nothing without a ``path``."""
    if path:
        rows = [vars(s) | {"tokens_per_s": s.tokens_per_s, "device": device_name(target.device)} for s in stages]
        write_csv(Path(path), pd.DataFrame(rows))


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.dry_run", description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--layers", type=int, default=0, help="cut the target to so many layers (0: don't)")
    parser.add_argument("--narrow", action="store_true", help="and to a width that a CPU can take")
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    parser.add_argument("--length", type=int, help="tokens of a document (default: the profile's max_length_tokens)")
    parser.add_argument("--drafters", nargs="+", metavar="VARIANT", help="some of the profile's (default: all)")
    parser.add_argument(
        "--dialogues", type=int, default=280_000, help="to extrapolate to (default: the paper's larger set)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", metavar="FILE.csv", help="keep the stages as a table")
    given = parser.parse_args(words)
    profile = load_profile(given.profile)
    check_profile(profile)
    check_drafters(profile)
    if unknown := set(given.drafters or ()) - set(profile.drafters):
        raise StudyError(
            f"{', '.join(sorted(unknown))}: not among the drafters of {profile.name}, {', '.join(profile.drafters)}"
        )
    extract = profile.extract | ({"max_length_tokens": given.length} if given.length else {})
    drafters = {name: own for name, own in profile.drafters.items() if name in (given.drafters or profile.drafters)}
    profile = replace(profile, extract=extract, drafters=drafters)
    target = random_target(profile, given.layers, given.narrow, given.device, given.dtype)
    parameters = sum(p.numel() for p in target.model.parameters())
    print(
        f"{device_name(target.device)}, torch {torch.__version__}, {target.name}: {parameters:,} parameters, {target.dtype}",
        flush=True,
    )
    stages = dry_run(profile, target, given.steps, partial(write_stages, given.out, target))
    print(report(profile, target, stages, given.dialogues))
    return 0


if __name__ == "__main__":
    sys.exit(main())
