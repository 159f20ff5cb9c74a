"""What verifying and drafting cost at the paper's scale: the Qwen3-8B *architecture* with random weights, on a GPU.

A latency does not depend on the weights' values, so none are loaded: 36 layers, width 4,096, 32 heads, 8 KV
heads of size 128, 151,936 tokens, in bfloat16. Each forward is captured as a CUDA graph and replayed, and
small operations are fused by torch.compile, so that launching kernels from Python does not decide; column
``method`` says what was done. Drafters are the study's own at these sizes, with a draft vocabulary of
32,000 tokens. Rows of ``step_latency``, by ``what``:

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
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

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

    Parameters
    ----------
    architecture : qwen3-8b, on a GPU; tiny tries the command out.
    drafters : names of variants.
    prefixes : context lengths in tokens.
    vocabulary : draft_vocab_size.

    Raises
    ------
    StudyError : an unknown architecture or variant, or one that needs a GPU where there is none.
    """
    where = resolve_device(device)
    if architecture not in ARCHITECTURES:
        raise StudyError(f"architecture={architecture!r}: there are {', '.join(ARCHITECTURES)}")
    if where.type != "cuda" and architecture != "tiny":
        raise StudyError(f"{architecture} needs a GPU, and there is none here; --architecture tiny tries it out")
    target, rows = random_target(architecture, where), []
    labels = {"method": "CUDA graph, compiled" if where.type == "cuda" else "eager", "device": device_name(where)}
    labels |= {"dtype": str(target.dtype).removeprefix("torch."), "architecture": architecture}
    with unmasked_attention():
        for what, tokens, prefix, work, parts in cases(target, drafters, prefixes, vocabulary):
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


def cases(
    target: Target, drafters: Sequence[str], prefixes: Sequence[int], vocabulary: int
) -> Iterator[tuple[str, int, int, Callable, int]]:
    """(what, tokens, prefix, what to time, parts that its time is divided into), prepared one after the other."""
    compiled = target.device.type == "cuda"
    for prefix in prefixes:
        for tokens in VERIFIED:
            yield "verify", tokens, prefix, verify_call(target, tokens, prefix, compiled), 1
    draft_ids = torch.arange(min(vocabulary, target.vocab_size), device=target.device)
    for variant in drafters:
        drafter = random_drafter(variant, target, draft_ids)
        if compiled:
            drafter.compile_steps()
        features = accepted_features(target, drafter, ACCEPTED)
        yield f"project {variant}", ACCEPTED, 0, partial(drafter.prefix, features), 1
        for prefix in prefixes:
            for (kind, tokens), (work, parts) in draft_calls(drafter, features, prefix).items():
                yield f"{kind} {variant}", tokens, prefix, work, parts


def random_target(architecture: str, device: torch.device) -> Target:
    """A target of that architecture, its random weights made on the device."""
    config = AutoConfig.for_model("qwen3", **ARCHITECTURES[architecture])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="kvshot_grouped")
    model.eval().requires_grad_(False)
    return Target(f"{architecture} architecture, random weights", model, None, "random", "none")


def random_drafter(variant: str, target: Target, draft_ids: Tensor) -> Drafter:
    """The study's drafter of that name for this target, untrained, on its device and in its dtype."""
    if not (own := parameters_of(variant)):
        raise StudyError(f"there is no variant {variant!r}")
    config = DrafterConfig.of(own)
    spec, model = drafter_spec(config, target), target.model
    frozen = model.get_input_embeddings().weight, model.get_output_embeddings().weight[draft_ids]
    with torch.device(target.device):
        drafter = Drafter(config, spec, drafter_sizes(target.config, spec), draft_ids, *frozen)
    return in_dtype(drafter.to(target.device), target.dtype).eval().requires_grad_(False)


def verify_call(target: Target, tokens: int, prefix: int, compiled: bool) -> Callable[[], Tensor]:
    """One verification after ``prefix`` random entries. Every token sees all others: what sees what takes no time."""
    device, config = target.device, target.config
    shape = (1, config.num_key_value_heads, prefix + tokens, config.head_dim)
    cache = Room(target.num_layers, shape, device, target.dtype)
    given = {"input_ids": torch.randint(target.vocab_size, (1, tokens), device=device), "past_key_values": cache}
    given |= {"position_ids": prefix + torch.arange(tokens, device=device)[None], "use_cache": True}
    forward = torch.compile(target.model) if compiled else target.model
    return lambda: forward(**given, attention_mask={"full_attention": None}).logits.argmax(-1)


class Room:
    """A cache of one size, as transformers' models use one: random entries, new ones are written over the last."""

    def __init__(self, layers: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        entries = lambda: torch.randn(shape, device=device, dtype=dtype)
        self.entries = [(entries(), entries()) for _ in range(layers)]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        for kept, new in zip(self.entries[layer], (keys, values), strict=True):
            kept[:, :, -new.shape[2] :] = new
        return self.entries[layer]

    def get_seq_length(self, *_) -> int:
        return self.entries[0][0].shape[2]


def grouped(module, query: Tensor, keys: Tensor, values: Tensor, mask, **_) -> tuple[Tensor, None]:
    """Attention without a mask, [1, H, T, D] over [1, G, N, D]: the query heads of a KV head are rows of one product.

    So a kernel reads the cache once, whatever T is. Returns [1, T, H, D].
    """
    rows = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    out, *_ = over_prefix(rows, keys, values)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register("kvshot_grouped", grouped)


def accepted_features(target: Target, drafter: Drafter, tokens: int) -> Features:
    """Random target state of ``tokens`` positions, and one token more: what prefix entries are made from."""
    spec, device = drafter.spec, target.device
    kv = (1, tokens, len(spec.kv_layers), spec.num_kv_heads, spec.head_dim)
    shapes = {"hidden_states": (1, tokens, len(spec.hidden_layers), spec.hidden_size), "keys": kv, "values": kv}
    state = {name: torch.randn(shapes[name], device=device, dtype=target.dtype) for name in drafter.reads}
    ids = torch.randint(target.vocab_size, (1, tokens + 1), device=device)
    return Features(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0], **state)


def draft_calls(drafter: Drafter, features: Features, prefix: int) -> dict[tuple[str, int], tuple[Callable, int]]:
    """(kind, tokens) -> what to time after ``prefix`` random entries, and how many draft steps it takes."""
    (made, fused), ids = drafter.prefix(features), features.tokens[0]
    room = lambda like: torch.randn(1, like.shape[1], prefix, like.shape[3], device=like.device, dtype=like.dtype)
    entries = [{name: tuple(map(room, pair)) for name, pair in layer.items()} for layer in made]

    def frontier(width: int) -> Frontier:
        mask = torch.zeros(1, 1, width, prefix, device=ids.device)
        state = None if fused is None else fused[:, -1:].expand(-1, width, -1)
        return Frontier(ids[:1].expand(width), prefix, state, [View(layer, mask, {}, True) for layer in entries])

    def steps(width: int) -> Tensor:
        front = frontier(width)
        for _ in range(CHAIN):
            front.tokens = drafter.draft_ids[run_frontier(drafter, front).argmax(-1)]
        return front.tokens

    if drafter.config.paradigm == "block":
        slots = drafter.config.block_size - 1
        return {("block", slots): (lambda: slot_logits(drafter, frontier(1), slots).argmax(-1), 1)}
    return {("draft", width): (partial(steps, width), CHAIN) for width in (1, LEVEL)}


def unmasked_attention():
    """Within it drafters attend to the prefix by the target's kernel: they see all of it, so no mask is needed."""
    return patch.multiple(attention, _prefix_attention=over_prefix, _mask_rows=lambda mask, repeats, dtype: mask)


def over_prefix(rows: Tensor, keys: Tensor, values: Tensor, *_) -> tuple[Tensor, Tensor, tuple]:
    """Attention of [1, G, Q, D] rows over [1, G, N, D] -> output, log-sum-exp [1, G, Q], nothing."""
    if rows.device.type == "cuda":
        return *torch.ops.aten._scaled_dot_product_flash_attention(rows, keys, values)[:2], ()
    return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, keys, values), ()
