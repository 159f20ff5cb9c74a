"""What verifying and drafting cost at the paper's scale: the Qwen3-8B *architecture* with random weights, on a GPU.

python -m kvshot_lib.decoding.latency --keep TABLES_DIR    writes TABLES_DIR/step_latency.csv, a row as soon as it is measured

A latency does not depend on the weights' values, so none are loaded: 36 layers, width 4,096, 32 heads, 8 KV heads of size 128, 151,936 tokens,
in bfloat16. Each forward is captured as a CUDA graph and replayed, so that launching kernels from Python does not decide; small
operations are fused by torch.compile where that works. Column ``method`` says what was done. Drafters are the study's own, at these sizes, with
a draft vocabulary of 32,000 tokens. Rows, by ``what``:

    verify            one target forward over ``tokens`` new tokens, LM head included: 1 is the target alone, 9 a chain of 8, 61 a tree
    draft VARIANT     one draft step, LM head and argmax included, the mean over a chain of 7 (tokens = 1); of a tree's level (tokens = 10)
    block VARIANT     the one pass of a block that drafts ``tokens`` tokens
    project VARIANT   target state of ``tokens`` accepted tokens -> prefix entries
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ..drafters import attention
from ..drafters.drafter import Drafter, DrafterConfig, drafter_sizes, in_dtype
from ..drafters.layers import View
from ..drafters.variants import VARIANTS
from ..errors import StudyError, one_line_errors
from ..features.spec import Features, feature_spec
from ..metrics import tables
from ..provenance import device_name
from ..target.load import Target, resolve_device
from .plain_target import Kernels, PlainTarget, over_prefix
from .propose import Frontier, run_frontier
from .propose_block import slot_logits

QWEN3_8B = {
    "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
TINY = QWEN3_8B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ARCHITECTURES = {"qwen3-8b": QWEN3_8B, "tiny": TINY}
DRAFTERS = ("hidden", "kv_1", "kv_2", "kv_4", "hybrid", "cross_only_warm", "block_kv_2")
PREFIXES, VERIFIED = (512, 2048, 8192), (1, 5, 8, 9, 61)
CHAIN, LEVEL, ACCEPTED, DRAFT_VOCABULARY = 7, 10, 3, 32_000


@dataclass(frozen=True)
class Machine:
    """Where and how things run: ``graphs`` captures CUDA graphs, ``compiled`` fuses small operations first."""

    device: torch.device
    dtype: torch.dtype
    replays: int
    graphs: bool
    compiled: bool

    @property
    def method(self) -> str:
        return ("CUDA graph" if self.graphs else "eager") + (", compiled" if self.compiled else "")

    @torch.inference_mode()
    def milliseconds(self, work: Callable[[], object]) -> list[float]:
        """Of ``work``, ``replays`` times; it must read and write the same tensors each time."""
        return self._replayed(work) if self.graphs else self._eager(work)

    def _eager(self, work: Callable[[], object]) -> list[float]:
        found = []
        for _ in range(self.replays + 1):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            found.append(1000 * (time.perf_counter() - started))
        return found[1:]  # the first warms up

    def _replayed(self, work: Callable[[], object]) -> list[float]:
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(3):
                work()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        for _ in range(5):
            graph.replay()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.replays)]
        for before, after in pairs:
            before.record()
            graph.replay()
            after.record()
        self.wait()
        return [before.elapsed_time(after) for before, after in pairs]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def machine_for(device: torch.device, replays: int, graphs: bool, compiled: bool) -> Machine:
    """Graphs and compiled kernels where there is a GPU and they work; otherwise without, and it says why."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if compiled and cuda:
        try:
            torch.compile(lambda x: (x * 2).relu())(torch.ones(8, device=device))
        except Exception as error:  # noqa: BLE001 - no compiler, no triton: whatever the reason, the measurement goes on
            print(f"torch.compile does not work here ({str(error).splitlines()[0][:120]}): not compiled", flush=True)
            compiled = False
    return Machine(device, dtype, replays, graphs and cuda, compiled and cuda)


def random_target(name: str, machine: Machine) -> Target:
    """A target of that architecture, its random weights made on the device."""
    config = AutoConfig.for_model("qwen3", **ARCHITECTURES[name])
    with torch.device(machine.device):
        model = AutoModelForCausalLM.from_config(config, dtype=machine.dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    return Target(f"{name} architecture, random weights", model, None, "random", "none")


def random_drafter(variant: str, target: Target, draft_ids: Tensor) -> Drafter:
    """The study's drafter of that name for this target, untrained, on its device and in its dtype."""
    known = DrafterConfig.__dataclass_fields__
    config = DrafterConfig(**{name: value for name, value in VARIANTS[variant].parameters.items() if name in known})
    spec, model = feature_spec(target, config.kv_layers), target.model
    frozen = model.get_input_embeddings().weight, model.get_output_embeddings().weight[draft_ids]
    with torch.device(target.device):
        drafter = Drafter(config, spec, drafter_sizes(target.config, spec), draft_ids, *frozen)
    return in_dtype(drafter.to(target.device), target.dtype).eval().requires_grad_(False)


def verify_call(target: Target, tokens: int, prefix: int, kernels: Kernels) -> Callable[[], Tensor]:
    """One verification of ``tokens`` tokens after ``prefix``; caches hold random entries. (What sees what does not matter to its time.)"""
    device, shape = target.device, (1, target.config.num_key_value_heads, prefix + tokens, target.config.head_dim)
    cache = [
        tuple(torch.randn(shape, device=device, dtype=target.dtype) for _ in range(2)) for _ in range(target.num_layers)
    ]
    sees = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    plain = PlainTarget(target.model, cache, prefix + torch.arange(tokens, device=device), sees, kernels)
    ids = torch.randint(target.vocab_size, (tokens,), device=device)
    return lambda: plain(ids).argmax(-1)


def accepted_features(target: Target, drafter: Drafter, tokens: int) -> Features:
    """Random target state of ``tokens`` positions, and one token more: what a step's prefix entries are made from."""
    spec, device = drafter.spec, target.device
    kv = (1, tokens, len(spec.kv_layers), spec.num_kv_heads, spec.head_dim)
    shapes = {"hidden_states": (1, tokens, len(spec.hidden_layers), spec.hidden_size), "keys": kv, "values": kv}
    state = {name: torch.randn(shapes[name], device=device, dtype=target.dtype) for name in drafter.reads}
    ids = torch.randint(target.vocab_size, (1, tokens + 1), device=device)
    return Features(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0], **state)


def prefix_views(drafter: Drafter, features: Features, prefix: int) -> Callable[[], list[View]]:
    """Makes what the layers see of ``prefix`` random entries, of the shapes that the drafter makes."""
    made, _ = drafter.prefix(features)
    entries = [
        {name: tuple(torch.randn(1, p.shape[1], prefix, p.shape[3], device=p.device, dtype=p.dtype) for p in parts) for name, parts in layer.items()}
        for layer in made
    ]  # fmt: skip
    mask = torch.zeros(1, 1, 1, prefix, device=features.tokens.device)
    return lambda: [View(layer, mask, {}, True) for layer in entries]


def draft_calls(drafter: Drafter, features: Features, prefix: int) -> dict[tuple[str, int], tuple[Callable, int]]:
    """(kind, tokens) -> what to time, and into how many draft steps its time is divided."""
    views, ids = prefix_views(drafter, features, prefix), features.tokens[0]
    _, fused = drafter.prefix(features)
    state = None if fused is None else fused[:, -1:]

    def frontier(width: int) -> Frontier:
        return Frontier(ids[:1].expand(width), prefix, None if state is None else state.expand(-1, width, -1), views())

    def chain() -> Tensor:
        front = frontier(1)
        for _ in range(CHAIN):
            front.tokens = drafter.draft_ids[run_frontier(drafter, front).argmax(-1)]
        return front.tokens

    def levels() -> Tensor:
        front = frontier(LEVEL)
        for view in front.views:
            view.mask = view.mask.expand(-1, -1, LEVEL, -1)
        for _ in range(CHAIN):
            front.tokens = drafter.draft_ids[run_frontier(drafter, front).argmax(-1)]
        return front.tokens

    if drafter.config.paradigm == "block":
        slots = drafter.config.block_size - 1
        return {("block", slots): (lambda: slot_logits(drafter, frontier(1), slots).argmax(-1), 1)}
    return {("draft", 1): (chain, CHAIN), ("draft", LEVEL): (levels, CHAIN)}


@contextmanager
def unmasked_attention() -> Iterator[None]:
    """Within it the drafters' attention over the prefix takes the target's kernel: here every entry is visible, so no mask is needed."""
    before = attention._prefix_attention, attention._mask_rows
    attention._prefix_attention = lambda rows, keys, values, mask, scale: (*over_prefix(rows, keys, values), ())
    attention._mask_rows = lambda mask, repeats, dtype: mask
    try:
        yield
    finally:
        attention._prefix_attention, attention._mask_rows = before


def cases(
    target: Target, machine: Machine, prefixes, drafters, vocabulary: int
) -> Iterator[tuple[str, int, int, Callable, int]]:
    """(what, tokens, prefix, what to time, parts that its time is divided into), prepared one after the other."""
    kernels = Kernels().compiled() if machine.compiled else Kernels()
    for prefix in prefixes:
        for tokens in VERIFIED:
            yield "verify", tokens, prefix, verify_call(target, tokens, prefix, kernels), 1
    draft_ids = torch.arange(min(vocabulary, target.vocab_size), device=target.device)
    for variant in drafters:
        drafter = random_drafter(variant, target, draft_ids)
        if machine.compiled:
            drafter.compile_steps()
        features = accepted_features(target, drafter, ACCEPTED)
        yield f"project {variant}", ACCEPTED, 0, partial(drafter.prefix, features), 1
        for prefix in prefixes:
            for (kind, tokens), (work, parts) in draft_calls(drafter, features, prefix).items():
                yield f"{kind} {variant}", tokens, prefix, work, parts


@torch.inference_mode()
def measure(
    name: str, machine: Machine, prefixes=PREFIXES, drafters=DRAFTERS, vocabulary: int = DRAFT_VOCABULARY
) -> Iterator[dict]:
    """The rows of ``step_latency.csv``, each as soon as it is measured; what fails compiled is tried again as it is, or else left out."""
    target = random_target(name, machine)
    labels = {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "device": device_name(machine.device),
        "architecture": name,
    }
    failed, ways = set(), [machine] + ([replace(machine, compiled=False)] if machine.compiled else [])
    with unmasked_attention():
        for way in ways:
            again, failed = failed, set()
            if way is not machine and not again:
                break
            for what, tokens, prefix, work, parts in cases(target, way, prefixes, drafters, vocabulary):
                if way is machine or (what, tokens, prefix) in again:
                    try:
                        found = [milliseconds / parts for milliseconds in way.milliseconds(work)]
                    except (
                        RuntimeError
                    ) as error:  # torch's own errors, of compiling and of capturing, are RuntimeErrors
                        failed.add((what, tokens, prefix))
                        print(
                            f"{what}, {tokens} tokens at {prefix}, {way.method}: {str(error).splitlines()[0][:200]}",
                            flush=True,
                        )
                        continue
                    yield {
                        "what": what, "tokens": tokens, "prefix_tokens": prefix, "milliseconds": median(found), "fastest_ms": min(found),
                        "slowest_ms": max(found), "replays": len(found), "method": way.method, **labels,
                    }  # fmt: skip


def write_as_they_come(rows: Iterator[dict], folder: Path) -> Path:
    """Print every row and write the table anew with it; what is there of an earlier call goes."""
    found = []
    for row in rows:
        found.append(row)
        told = f"{row['what']:24} {row['tokens']:>3} tokens at {row['prefix_tokens']:>5}: {row['milliseconds']:8.3f} ms"
        print(f"{told}  ({row['fastest_ms']:.3f} to {row['slowest_ms']:.3f}, {row['method']})", flush=True)
        path = tables.write(folder, "step_latency", tables.rounded(pd.DataFrame(found)))
    return path


@one_line_errors
def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.decoding.latency", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", required=True, metavar="TABLES_DIR", help="where step_latency.csv goes")
    parser.add_argument("--architecture", default="qwen3-8b", choices=ARCHITECTURES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--prefix", type=int, nargs="+", default=PREFIXES, help="context lengths in tokens")
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS, choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--vocabulary", type=int, default=DRAFT_VOCABULARY, help="draft_vocab_size")
    parser.add_argument("--no-graphs", action="store_true", help="launch kernels from Python")
    parser.add_argument("--no-compile", action="store_true", help="don't fuse small operations")
    given = parser.parse_args(words)
    device = resolve_device(given.device)
    if device.type != "cuda" and given.architecture != "tiny":
        raise StudyError(
            f"{given.architecture} needs a GPU, and there is none here; --architecture tiny tries the command out"
        )
    machine = machine_for(device, given.replays, not given.no_graphs, not given.no_compile)
    print(
        f"{device_name(device)}, torch {torch.__version__}, {given.architecture} architecture, random weights, {machine.method}",
        flush=True,
    )
    rows = measure(given.architecture, machine, given.prefix, given.drafters, given.vocabulary)
    print(write_as_they_come(rows, Path(given.keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
