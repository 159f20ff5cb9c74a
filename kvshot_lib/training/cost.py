"""What drafting with a drafter costs: arithmetic counted from its modules, bytes, and seconds measured.

python -m kvshot_lib.training.cost [--target NAME] [--vocabulary N]    the study's variants side by side, on an otherwise idle machine

Acceptance says how many drafts are right; whether that pays depends on what a draft costs. Counted are multiplications and additions
of matrix products (2 · inputs · outputs for a linear map); norms, RoPE, softmax and the other small operations are left out.
"""

import argparse
import sys
import time
from dataclasses import fields
from statistics import median

import torch
from torch import nn

from ..drafters.drafter import Drafter, DrafterConfig, build_drafter
from ..drafters.variants import VARIANTS, parameters_of
from ..errors import one_line_errors
from ..features.spec import Features, feature_spec
from ..provenance import device_name
from ..target.load import load_target
from ..target.smollm2 import DEFAULT_TARGET
from .ttt import Anchors, draft_steps

BYTES = 2  # of a stored number: bfloat16, whatever the measured run computed in


def drafting_cost(drafter: Drafter, context_length_tokens: int = 512, draft_length: int = 7) -> dict[str, int]:
    """Columns for ``runs.csv``: what is counted. (Time is not: trainings side by side would lengthen it; see :func:`draft_step_s`.)

    Parameters
    ----------
    context_length_tokens : N, prefix entries that the chain's anchor sees. draft_length : K, steps of the chain.

    Returns
    -------
    ``drafting_flops`` of one draft step, the mean over the chain's K (of a block, its one pass over the K tokens that it drafts);
    ``prefix_flops_per_token`` and ``prefix_bytes_per_token``, for
    each token that the target verified; ``draft_context_tokens`` N.
    """
    if drafter.config.paradigm == "block":
        draft_length = drafter.config.block_size - 1
        total = block_flops(drafter, context_length_tokens)
    else:
        total = sum(step_flops(drafter, context_length_tokens, k) for k in range(draft_length))
    return {
        "drafting_flops": round(total / draft_length),
        "prefix_flops_per_token": prefix_flops_per_token(drafter),
        "prefix_bytes_per_token": prefix_bytes_per_token(drafter),
        "draft_context_tokens": context_length_tokens,
    }


def step_flops(drafter: Drafter, context_length_tokens: int, draft_step: int) -> int:
    """FLOPs of draft step k of one chain whose anchor sees N prefix entries.

    FLOPs = 2 d V + Σ over layers of (Σ over linear maps 2 in · out + Σ over branches 4 H D (N + J)), with V draft tokens, H query heads
    of size D, and J entries of the chain itself: k + 1 for a branch over the target's KV; k for one over hidden states, whose step 0
    makes no entry (the prefix has it) and needs no key and value map.
    """
    total = 2 * drafter.head.numel()
    for layer in drafter.layers:
        total += _linear(layer) - _linear(getattr(layer, "fusion", None))
        for attention in _attentions(layer):
            own, unused = _chain_entries(layer, attention, draft_step)
            total += 4 * attention.q_proj.out_features * (context_length_tokens + own) - unused
    return total


def _chain_entries(layer: nn.Module, attention: nn.Module, draft_step: int) -> tuple[int, int]:
    """J, and the FLOPs of key and value maps that the step does without."""
    if _makes_its_prefix(layer, attention) and layer.reads_state:
        return draft_step, (draft_step == 0) * _keys_and_values(attention)
    return draft_step + 1, 0


def block_flops(drafter: Drafter, context_length_tokens: int) -> int:
    """FLOPs of one whole block of b slots whose anchor sees N positions of target state; b - 1 tokens are drafted by it.

    FLOPs = 2 d V (b - 1) + b Σ over layers of (Σ over linear maps 2 in · out + 4 H D (C N + b)), C = 2 for ``block_context="both"``,
    whose positions have two entries each, else 1.
    """
    slots, seen = drafter.config.block_size, context_length_tokens * _contexts(drafter)
    total = 2 * drafter.head.numel() * (slots - 1)
    for layer in drafter.layers:
        maps = _linear(layer) - _linear(layer.fusion)
        total += slots * (maps + 4 * layer.attention.q_proj.out_features * (seen + slots))
    return total


def step_bytes(drafter: Drafter, context_length_tokens: int, draft_step: int) -> int:
    """Bytes that draft step k of one chain reads, in bfloat16: every weight that it uses once, and the keys and values that it sees.

    One row uses a weight in 2 FLOPs, and a weight has 2 bytes: in linear maps, bytes equal FLOPs.
    """
    total = 2 * drafter.head.numel()
    for layer in drafter.layers:
        total += _linear(layer) - _linear(getattr(layer, "fusion", None))
        for attention in _attentions(layer):
            own, unused = _chain_entries(layer, attention, draft_step)
            total += _entry_bytes(attention) * (context_length_tokens + own) - unused
    return total


def block_bytes(drafter: Drafter, context_length_tokens: int) -> int:
    """Bytes that one pass over a block reads, in bfloat16: every weight once for all slots, the prefix, and the block's own entries."""
    maps = sum(_linear(layer) - _linear(layer.fusion) for layer in drafter.layers)
    own = sum(_entry_bytes(layer.attention) for layer in drafter.layers)
    seen = prefix_bytes_per_token(drafter) * context_length_tokens
    return 2 * drafter.head.numel() + maps + seen + own * drafter.config.block_size


def _contexts(drafter: Drafter) -> int:
    """Prefix entries per position and branch."""
    return 2 if drafter.config.paradigm == "block" and drafter.config.block_context == "both" else 1


def prefix_flops_per_token(drafter: Drafter) -> int:
    """FLOPs that turn one more token's target state into prefix entries: fusing layers, and keys and values where the drafter makes them."""
    total = _linear(getattr(drafter, "fuse_hidden", None))
    for layer in drafter.layers:
        total += _linear(getattr(layer, "fusion", None))
        total += sum(_keys_and_values(a) for a in _attentions(layer) if _makes_its_prefix(layer, a))
    return total


def prefix_bytes_per_token(drafter: Drafter) -> int:
    """Bytes of keys and values that the drafter's attention reads per context token, in bfloat16.

    With ``kv_fusion="heads"`` these are the target's own cache and take no memory besides.
    """
    attentions = [attention for layer in drafter.layers for attention in _attentions(layer)]
    return _contexts(drafter) * sum(map(_entry_bytes, attentions))


def _entry_bytes(attention: nn.Module) -> int:
    """Bytes of one entry's key and value."""
    return (attention.k_proj.out_features + attention.v_proj.out_features) * BYTES


@torch.no_grad()
def draft_step_s(
    drafter: Drafter,
    context_length_tokens: int,
    draft_length: int,
    *,
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
) -> float:
    """Seconds of one draft step of one chain (batch 1), prefix entries ready, LM head and argmax included: median over ``repeats`` chains.

    A block drafts all its tokens in one pass, whatever ``draft_length``: the pass, by the tokens that it drafts.

    Values don't matter to the time, so everything the drafter reads is zero; and it runs as it is written, not compiled. Other work on
    the machine, trainings side by side say, lengthens it.
    """
    device, block = drafter.norm.weight.device, drafter.config.paradigm == "block"
    draft_length = drafter.config.block_size - 1 if block else draft_length
    features, anchors = _zeros(drafter, context_length_tokens, draft_length)
    seconds = []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), torch.compiler.set_stance("force_eager"):
        ready = _WithPrefix(drafter, features)
        for _ in range(repeats + 1):
            _wait(device)
            started = time.perf_counter()
            steps = (output for _, _, output in draft_steps(ready, features, anchors, draft_length))
            for output in [torch.cat([*steps], 1)] if block else steps:
                drafter.logits(drafter.norm(output[0])).argmax(-1)
            _wait(device)
            seconds.append((time.perf_counter() - started) / draft_length)
    return median(seconds[1:])  # the first warms up


class _WithPrefix:
    """A drafter whose prefix entries are made once."""

    def __init__(self, drafter: Drafter, features: Features):
        self._drafter, self._entries = drafter, drafter.prefix(features)

    def prefix(self, features: Features):
        return self._entries

    def __getattr__(self, name: str):
        return getattr(self._drafter, name)


def _zeros(drafter: Drafter, context_length_tokens: int, draft_length: int) -> tuple[Features, Anchors]:
    """A document of N + 1 tokens and its anchor t = N - 1, which sees prefix entries s = 0 … N-1; steps k ≥ 1 reread its last token."""
    spec, device, length = drafter.spec, drafter.norm.weight.device, context_length_tokens + 1
    kv = (1, length, len(spec.kv_layers), spec.num_kv_heads, spec.head_dim)
    shapes = {"hidden_states": (1, length, len(spec.hidden_layers), spec.hidden_size), "keys": kv, "values": kv}
    state = {name: torch.zeros(shapes[name], device=device) for name in drafter.reads}
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    features = Features(tokens, tokens.bool(), tokens[:, 0], **state)
    index = torch.tensor([[context_length_tokens - 1]], device=device)
    valid = torch.ones(1, 1, draft_length, dtype=torch.bool, device=device)
    return features, Anchors(index, valid, valid[..., 0].float())


def _attentions(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if hasattr(module, "q_proj")]


def _makes_its_prefix(layer: nn.Module, attention: nn.Module) -> bool:
    """Are this branch's prefix entries its own keys and values, rather than projected target KV?"""
    over_state = layer.reads_state and attention is layer.attention
    over_hidden = getattr(layer, "context_norm", None) is not None  # a block's, through the same maps
    return over_state or over_hidden or getattr(layer, "fusion", None) is None


def _linear(module: nn.Module | None) -> int:
    """FLOPs of every linear map in a module, each used once on one row; None has none."""
    parts = [] if module is None else module.modules()
    return sum(2 * part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def _keys_and_values(attention: nn.Module) -> int:
    return _linear(attention.k_proj) + _linear(attention.v_proj)


def _wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@one_line_errors
def main(words: list[str] | None = None) -> int:
    """Print device and costs of every drafter that the study names, untrained: neither weights nor training matter to the cost."""
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.training.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--vocabulary", type=int, default=8192, help="draft_vocab_size")
    given = parser.parse_args(words)
    known, shown = {field.name for field in fields(DrafterConfig)}, set()
    target = load_target(given.target)
    draft_ids = torch.arange(min(given.vocabulary, target.vocab_size))
    print(f"{device_name(target.device)}, {target.dtype}, torch {torch.__version__}, target {target.name}")
    print(
        f"{'variant':18} {'parameters':>12} {'FLOPs/step':>14} {'FLOPs/token':>12} {'bytes/token':>11} {'ms/step':>8}"
    )
    for variant in VARIANTS:
        config = DrafterConfig(**{name: value for name, value in parameters_of(variant).items() if name in known})
        if config not in shown:  # variants that differ in their training alone cost the same
            drafter = build_drafter(config, target, feature_spec(target, config.kv_layers), draft_ids)
            parameters = sum(p.numel() for p in drafter.parameters())
            found = drafting_cost(drafter)
            counts = [parameters, found["drafting_flops"], found["prefix_flops_per_token"]]
            numbers = " ".join(f"{count:>{width},}" for count, width in zip(counts, (12, 14, 12), strict=True))
            seconds = 1000 * draft_step_s(drafter, found["draft_context_tokens"], 7, dtype=target.dtype)
            print(f"{variant:18} {numbers} {found['prefix_bytes_per_token']:>11,} {seconds:>8.2f}", flush=True)
        shown.add(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
