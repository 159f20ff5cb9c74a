"""What drafting with a drafter costs and what its training took: arithmetic and memory traffic, counted from modules.

Counted are multiplications and additions of matrix products (2 · inputs · outputs for a linear map), and attention
over the entries that an anchor really sees. Padding, norms, RoPE, softmax, the optimiser, and what a kernel computes
only to mask it are left out, and so is the target's own pass in training (equal for equal tokens). Bytes are those
read, in bfloat16: every weight once, and the keys and values seen. One row uses a weight in 2 FLOPs, and a weight has
2 bytes: in linear maps they are equal.

Backward counts twice the forward: once for the gradient of the weights, once for that of the inputs. The frozen LM
head has no gradient of weights, a map that reads target state as it is no gradient of inputs; these count once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..drafters.drafter import Drafter, build_drafter
from ..features.spec import feature_spec
from ..target.load import Target
from ..text.corpus import Document
from .anchors import find_anchors
from .config import TrainConfig, batches, total_steps

BYTES = 2  # of a stored number: bfloat16, whatever the run computed in
CHAIN = 7  # draft steps of the chain whose cost is counted
CONTEXT = 512  # tokens that it and the target see


@dataclass(frozen=True)
class Cost:
    """Arithmetic, and memory read (or, of prefix entries, held)."""

    flops: float
    bytes: float


def run_cost(drafter: Drafter, training: TrainConfig, target: Target, documents: Sequence[Document]) -> dict:
    """A run's columns of table ``compute``: its training on these documents, one chain of its drafts, a target forward.

    A hybrid's branch is trained alone for ``branch_warmup_steps``, or beside the whole with ``branch_loss_weight``.
    """
    work = run_work(documents, training, drafter.config.paradigm != "block")
    flops, chain, alone = training_flops(drafter, work), chain_cost(drafter), target_cost(target)
    if training.branch_warmup_steps or training.branch_loss_weight:
        config = replace(drafter.config, cross_only=True, gate_bias=0.0, gate_floor=0.0)
        warming = training.branch_warmup_steps / work.steps
        branch = training_flops(build_drafter(config, target, drafter.spec, drafter.draft_ids.cpu()), work)
        flops = (1 - warming) * flops + (1 if training.branch_loss_weight else warming) * branch
    return {
        "tokens": work.tokens,
        "anchors": work.rows[0],
        "pairs": work.rows.sum(),
        "training_flops": flops,
        "chain_flops": chain.flops,
        "chain_bytes": chain.bytes + prefix_cost(drafter).flops,  # two a weight of the maps, as it has bytes
        "target_flops": alone.flops,
        "target_bytes": alone.bytes,
        "context_length_tokens": CONTEXT,
    }


def chain_cost(drafter: Drafter, draft_length: int = CHAIN) -> Cost:
    """Of a chain's draft steps together, or of a block's one pass."""
    passes = 1 if drafter.config.paradigm == "block" else draft_length
    steps = [pass_cost(drafter, CONTEXT, k) for k in range(passes)]
    return Cost(sum(step.flops for step in steps), sum(step.bytes for step in steps))


def pass_cost(drafter: Drafter, context_length_tokens: float, draft_step: int = 0) -> Cost:
    """Of draft step k of one chain whose anchor sees N positions of target state; of a block of b slots, its one pass.

    FLOPs of a step = 2 d V + Σ over layers of (Σ over linear maps 2 in · out + Σ over branches 4 H D (N + J)), with V
    draft tokens, H query heads of size D, and J entries of the chain itself: k + 1 for a branch over the target's KV;
    k for one over hidden states, whose step 0 makes no entry (the prefix has it) and needs no key and value map. Of a
    block: b times the layers, (b - 1) times the head, J = b, and with ``block_context="both"`` 2 N.
    """
    block, head = drafter.config.paradigm == "block", 2 * drafter.head.numel()
    rows = drafter.config.block_size if block else 1
    maps, attended, read = 0, 0, 0
    for layer in drafter.layers:
        maps += _linear(layer) - _linear(getattr(layer, "fusion", None))
        for attention in _attentions(layer):
            chain = rows if block else draft_step + 1
            if layer.reads_state and _makes_its_prefix(layer, attention):
                chain -= 1
                maps -= 0 if draft_step else _keys_and_values(attention)
            seen = context_length_tokens * _entries_a_position(drafter) + chain
            attended += 4 * attention.q_proj.out_features * seen
            read += _entry_bytes(attention) * seen
    return Cost(head * max(1, rows - 1) + rows * (maps + attended), head + maps + read)


def prefix_cost(drafter: Drafter, context_length_tokens: float = CONTEXT) -> Cost:
    """Of one more token's target state: FLOPs that turn it into prefix entries, and bytes of these entries.

    With ``kv_fusion="heads"`` they are the target's own cache and take no memory besides. Where a layer's entries are
    made from the output of the one below, the token runs through that one too, over N entries.
    """
    flops, entries = _linear(getattr(drafter, "fuse_hidden", None)), 0
    for layer in drafter.layers:
        flops += _linear(getattr(layer, "fusion", None))
        for attention in _attentions(layer):
            flops += _keys_and_values(attention) * _makes_its_prefix(layer, attention)
            entries += _entry_bytes(attention)
    for layer in drafter.layers[:-1]:
        if layer.own_prefix:
            attended = 4 * layer.attention.q_proj.out_features * context_length_tokens
            flops += _linear(layer) - _keys_and_values(layer.attention) + attended
    return Cost(flops, entries * _entries_a_position(drafter))


def _attentions(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if hasattr(module, "q_proj")]


def _makes_its_prefix(layer: nn.Module, attention: nn.Module) -> bool:
    """Are this branch's prefix entries its own keys and values, rather than projected target KV?"""
    over_state = layer.reads_state and attention is layer.attention
    over_hidden = getattr(layer, "context_norm", None) is not None  # a block's, through the same maps
    return over_state or over_hidden or getattr(layer, "fusion", None) is None


def _entries_a_position(drafter: Drafter) -> int:
    return 2 if drafter.config.paradigm == "block" and drafter.config.block_context == "both" else 1


def _entry_bytes(attention: nn.Module) -> int:
    """Of one entry's key and value."""
    return (attention.k_proj.out_features + attention.v_proj.out_features) * BYTES


def _linear(module: nn.Module | None) -> int:
    """FLOPs of every linear map in a module, each used once on one row; None has none."""
    parts = [] if module is None else module.modules()
    return sum(2 * part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def _keys_and_values(attention: nn.Module) -> int:
    return _linear(attention.k_proj) + _linear(attention.v_proj)


def target_cost(target: Target, context_length_tokens: int = CONTEXT) -> Cost:
    """Of one target forward over one new token, LM head included."""
    config = target.config
    weights = sum(m.weight.numel() for m in target.model.modules() if isinstance(m, nn.Linear))
    layers, size = config.num_hidden_layers, feature_spec(target).head_dim
    attention = 4 * layers * config.num_attention_heads * size * context_length_tokens
    entries = 2 * BYTES * layers * config.num_key_value_heads * size * context_length_tokens
    return Cost(2 * weights + attention, BYTES * weights + entries)


@dataclass(frozen=True)
class Work:
    """What one training computed; its batches are a function of its seed, so it is counted by walking them again.

    tokens, columns : of all documents that went through; prefix entries are made for every token but a document's last.
    rows : float [K], anchors that draft step k ran on (expected, where they are drawn). entries : float [K], prefix
        entries that they saw. scored : float [K], pairs (t, k) whose loss was taken; those outside the draft
        vocabulary are among them.
    steps : of the optimiser.
    """

    tokens: int
    columns: int
    rows: np.ndarray
    entries: np.ndarray
    scored: np.ndarray
    steps: int


def document_work(answer_mask: np.ndarray, ttt_steps: int, fraction: float, dense_first: bool = True) -> np.ndarray:
    """``rows``, ``entries`` and ``scored`` of one document, float [3, K].

    An answer of 6 tokens after 3 others, K = 3, all anchors: steps 0, 1, 2 have 5, 4, 3 pairs; 5 anchors t = 2 … 6 see
    3 + … + 7 = 25 entries, at every step, because a chain runs to its end. With ``fraction=.2`` one anchor of the
    five is drawn for k ≥ 1 (``dense_first=False``, a block: for step 0 too), and sees 5 entries on average.
    """
    anchors = find_anchors(torch.from_numpy(answer_mask)[None], ttt_steps)
    used = anchors.valid[0, :, 0]
    number = used.sum()
    share = float(torch.ceil(number * fraction) / number.clamp(min=1)) if fraction < 1 else 1.0
    shares = np.full(ttt_steps, share)
    if dense_first:
        shares[0] = 1.0
    seen = float((anchors.index[0] + 1)[used].sum())
    return np.stack([shares * float(number), shares * seen, shares * anchors.valid[0].sum(0).numpy()])


def run_work(documents: Sequence[Document], config: TrainConfig, dense_first: bool = True) -> Work:
    """What a training on these documents computes, from start to end."""
    options = config.ttt_steps, config.anchor_fraction, dense_first
    each = [document_work(document.answer_mask, *options) for document in documents]
    lengths, total = [len(document.tokens) for document in documents], total_steps(config, len(documents))
    times = np.zeros(len(documents), dtype=np.int64)
    for indices in batches(lengths, config, 0, total):
        times[indices] += 1
    tokens = int(times @ np.array(lengths))
    return Work(tokens, tokens - int(times.sum()), *np.tensordot(times, np.stack(each), 1), total)


def training_flops(drafter: Drafter, work: Work) -> float:
    """Layers 3 times their forward, prefix maps 2 or 3 times, LM head 2 times, and the target's probabilities."""
    block, head = drafter.config.paradigm == "block", 2 * drafter.head.numel()
    drafted = drafter.config.block_size - 1 if block else 1
    seen = work.entries / np.maximum(work.rows, 1)  # on average; costs are linear in it
    passes = range(1 if block else len(work.rows))
    layers = sum(work.rows[k] * (pass_cost(drafter, seen[k], k).flops - head * drafted) for k in passes)
    prefix = work.columns * (3 * prefix_cost(drafter, seen[0]).flops - plain_prefix_flops(drafter))
    return float(3 * layers + prefix + 2 * head * work.scored.sum() + head * work.tokens)


def plain_prefix_flops(drafter: Drafter) -> int:
    """FLOPs a token of the maps that read target state as it is stored: nothing before them is trained."""
    config, maps = drafter.config, []
    if config.fuses_hidden and not config.hidden_norm:
        maps.append(drafter.fuse_hidden)
    if config.kv_control != "from_hidden" and not config.kv_norm:
        fusions = [fusion for layer in drafter.layers if (fusion := getattr(layer, "fusion", None))]
        maps += [part for fusion in fusions for part in (fusion.keys, fusion.values)]
    first = [part[0] if isinstance(part, nn.Sequential) else part for part in maps]
    return sum(2 * part.weight.numel() for part in first if isinstance(part, nn.Linear))
