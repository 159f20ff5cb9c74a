"""What verifying and drafting cost at the paper's scale: the Qwen3-8B *architecture* with random weights, on a GPU.

A latency does not depend on the weights' values, so none are loaded: 36 layers, width 4,096, 32 heads, 8 KV heads of
size 128, 151,936 tokens, in bfloat16. A decoder layer of the target has the arithmetic of a drafter's plain layer, so
the target's forward is a draft step through 36 of those and the whole LM head (a test holds it to transformers' own
model): verifying and drafting are timed through the same code. Each forward is captured as a CUDA graph and replayed,
and small operations are fused by torch.compile, so that launching kernels from Python does not decide; column
``method`` says what was done. Drafters are the study's own at these sizes, with a draft vocabulary of 32,000 tokens.
(The table recorded for `full` was measured with a forward of the target that fused the attention to new tokens too.)
Rows of ``step_latency``, by ``what``:

    verify            one target forward over ``tokens`` new tokens, LM head included: 1 is the target alone, 61 a tree
    draft VARIANT     one draft step, LM head and argmax included, the mean over a chain of 7 (1 token), or over 7
                      levels of a tree (10 tokens)
    block VARIANT     the one pass of a block that drafts ``tokens`` tokens
    project VARIANT   target state of ``tokens`` accepted tokens -> prefix entries
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModelForCausalLM

from ..drafters import attention
from ..drafters.config import DrafterConfig
from ..drafters.context import drafter_spec
from ..drafters.drafter import Drafter, drafter_sizes, in_dtype
from ..drafters.layers import View
from ..drafters.variants import parameters_of
from ..errors import StudyError
from ..features.spec import Features
from ..metrics import tables
from ..provenance import device_name
from ..settings import at_least
from ..target.load import Target, resolve_device
from .propose import Frontier, run_frontier, slot_logits

QWEN3_8B = {
    "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
ARCHITECTURES = {"qwen3-8b": QWEN3_8B, "tiny": QWEN3_8B | TINY}
DRAFTERS = ("hidden", "kv_1", "kv_2", "kv_4", "hybrid", "cross_only_warm", "block_kv_2")
VERIFIED, CHAIN, LEVEL, ACCEPTED = (1, 5, 8, 9, 61), 7, 10, 3


@torch.inference_mode()
def measure_latency(
    tables_dir: str, *, architecture: str = "qwen3-8b", drafters: Sequence[str] = DRAFTERS,
    prefixes: Sequence[int] = (512, 2048, 8192), vocabulary: int = 32_000, device: str = "auto",
) -> Path:  # fmt: skip
    """Time verifying and drafting at the size of an architecture, with random weights: step_latency in TABLES_DIR.

    ``architecture`` is qwen3-8b, on a GPU, or tiny, which tries the command out; ``prefixes`` are context lengths in
    tokens, ``vocabulary`` is the draft vocabulary's size.

    Raises
    ------
    StudyError : an unknown architecture or variant, or one that needs a GPU where there is none.
    """
    at_least(1, vocabulary=vocabulary, **{f"prefixes {prefix}": prefix for prefix in prefixes})
    where = resolve_device(device)
    if architecture not in ARCHITECTURES:
        raise StudyError(f"architecture={architecture!r}: there are {', '.join(ARCHITECTURES)}")
    if where.type != "cuda" and architecture != "tiny":
        raise StudyError(f"{architecture} needs a GPU, and there is none here; --architecture tiny tries it out")
    build, rows = Untrained(architecture, vocabulary, where), []
    labels = {"method": "CUDA graph, compiled" if where.type == "cuda" else "eager", "device": device_name(where)}
    labels |= {"dtype": str(build.dtype).removeprefix("torch."), "architecture": architecture}
    with unmasked_attention():
        for what, tokens, prefix, work, parts in cases(build, drafters, prefixes):
            found = [each / parts for each in milliseconds(work, where)]
            row = {"what": what, "tokens": tokens, "prefix_tokens": prefix, "milliseconds": median(found)}
            row |= {"fastest_ms": min(found), "slowest_ms": max(found), "replays": len(found)}
            rows.append(row | labels)
            print(f"{what:24} {tokens:>3} tokens at {prefix:>5}: {median(found):8.3f} ms", flush=True)
            path = tables.write(tables_dir, "step_latency", tables.rounded(pd.DataFrame(rows)))
    return path


def milliseconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Of ``work``, several times over, on the same tensors each time; on a GPU as a graph that is replayed."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph  # torch's wheels for CPUs come without it

        return do_bench_cudagraph(work, return_mode="all")
    timer = Timer("work()", globals={"work": work})
    return [1000 * timer.timeit(1).mean for _ in range(10)]


class Untrained:
    """Untrained stacks of layers at the sizes of an architecture, on a device; nothing of the target is loaded."""

    def __init__(self, architecture: str, vocabulary: int, device: torch.device):
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **ARCHITECTURES[architecture]))
        self.target = Target(f"{architecture} architecture, random weights", model, None, "random", "none")
        self.embedding, self.head = (
            torch.randn(self.target.vocab_size, self.target.config.hidden_size, device=device, dtype=self.dtype)
            for _ in range(2)
        )
        self.draft_ids = torch.arange(min(vocabulary, self.target.vocab_size), device=device)

    def layers(self) -> Drafter:
        """The target's own layers, norm and whole LM head, run like a drafter's."""
        config = DrafterConfig("kv", self.target.num_layers, kv_control="none", qk_norm=True)
        return self.stack(config, torch.arange(self.target.vocab_size, device=self.device))

    def drafter(self, variant: str) -> Drafter:
        """The study's drafter of that name."""
        if not (own := parameters_of(variant)):
            raise StudyError(f"there is no variant {variant!r}")
        return self.stack(DrafterConfig.of(own), self.draft_ids)

    def stack(self, config: DrafterConfig, draft_ids: Tensor) -> Drafter:
        spec = drafter_spec(config, self.target)
        sizes, frozen = drafter_sizes(self.target.config, spec), (self.embedding, self.head[draft_ids])
        with torch.device(self.device):
            made = in_dtype(Drafter(config, spec, sizes, draft_ids, *frozen), self.dtype)
        return made.compile_steps() if self.device.type == "cuda" else made


def cases(
    build: Untrained, drafters: Sequence[str], prefixes: Sequence[int]
) -> Iterator[tuple[str, int, int, Callable, int]]:
    """(what, tokens, prefix, what to time, parts that its time is divided into), prepared one after the other."""
    target = build.layers()
    features = accepted_features(target, ACCEPTED)
    for prefix in prefixes:
        frontier = after_prefix(target, features, prefix)
        for tokens in VERIFIED:
            yield "verify", tokens, prefix, partial(steps, target, frontier, tokens, 1), 1
    del target
    for variant in drafters:
        drafter = build.drafter(variant)
        features = accepted_features(drafter, ACCEPTED)
        yield f"project {variant}", ACCEPTED, 0, partial(drafter.prefix, features), 1
        for prefix in prefixes:
            frontier = after_prefix(drafter, features, prefix)
            if drafter.config.paradigm == "block":
                slots = drafter.config.block_size - 1
                draft = lambda: slot_logits(drafter, frontier(1), slots).argmax(-1)  # noqa: B023 - called at once
                yield f"block {variant}", slots, prefix, draft, 1
            else:
                for width in (1, LEVEL):
                    yield f"draft {variant}", width, prefix, partial(steps, drafter, frontier, width, CHAIN), CHAIN


def accepted_features(drafter: Drafter, tokens: int) -> Features:
    """Random target state of ``tokens`` positions, and one token more: what prefix entries are made from."""
    spec, frozen = drafter.spec, drafter.embedding
    kv = (1, tokens, len(spec.kv_layers), spec.num_kv_heads, spec.head_dim)
    shapes = {"hidden_states": (1, tokens, len(spec.hidden_layers), spec.hidden_size), "keys": kv, "values": kv}
    state = {name: torch.randn(shapes[name], device=frozen.device, dtype=frozen.dtype) for name in drafter.reads}
    ids = torch.randint(len(frozen), (1, tokens + 1), device=frozen.device)
    return Features(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0], **state)


def after_prefix(drafter: Drafter, features: Features, prefix: int) -> Callable[[int], Frontier]:
    """What makes a frontier of so many tokens after ``prefix`` random entries."""
    (made, fused), ids = drafter.prefix(features), features.tokens[0]
    room = lambda like: torch.randn(1, like.shape[1], prefix, like.shape[3], device=like.device, dtype=like.dtype)
    entries = [{name: tuple(map(room, pair)) for name, pair in layer.items()} for layer in made]

    def frontier(width: int) -> Frontier:
        mask = torch.zeros(1, 1, width, prefix, device=ids.device)
        state = None if fused is None else fused[:, -1:].expand(-1, width, -1)
        return Frontier(ids[:1].expand(width), prefix, state, [View(layer, mask, {}, True) for layer in entries])

    return frontier


def steps(drafter: Drafter, frontier: Callable[[int], Frontier], width: int, count: int) -> Tensor:
    """The tokens [width] after ``count`` steps of as many nodes, each on what the last one found most likely."""
    front = frontier(width)
    for _ in range(count):
        front.tokens = drafter.draft_ids[run_frontier(drafter, front).argmax(-1)]
    return front.tokens


def unmasked_attention():
    """Within it drafters attend to the prefix by the target's kernel: they see all of it, so no mask is needed."""
    return patch.multiple(attention, _prefix_attention=over_prefix, _mask_rows=lambda mask, repeats, dtype: mask)


def over_prefix(rows: Tensor, keys: Tensor, values: Tensor, *_) -> tuple[Tensor, Tensor, tuple]:
    """Attention of [1, G, Q, D] rows over [1, G, N, D] -> output, log-sum-exp [1, G, Q], nothing."""
    if rows.device.type == "cuda":
        return *torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values)[:2], ()
    return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, values), ()
