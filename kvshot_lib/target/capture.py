"""Reading a target's state while it runs: hidden states, cached keys and values, queries."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import StudyError
from ..settings import check_value
from .load import full_attention_layers

_RECORDING = "kvshot_recording_sdpa"


@dataclass(frozen=True)
class Captured:
    """State of the last forward inside :func:`capture`; dictionaries are keyed by layer.

    B sequences, n tokens of this forward, N of prefix and forward, H query heads, G KV heads, D head size.
    """

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    """``hidden_states[l]`` [B, n, d]: the input of decoder layer l (as EAGLE counts; l = 0 is the embedding)."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """[B, G, N, D] as cached: after key norm and RoPE."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """[B, G, N, D]"""
    queries: dict[int, Tensor] = field(default_factory=dict)
    """[B, H, n, D] after query norm and RoPE, if asked for; scaled so that scores are q k / sqrt(D) in every layer."""
    final: dict[str, Tensor] = field(default_factory=dict)
    """``final["hidden"]`` [B, n, d]: after the target's last norm, what its LM head reads."""


def hidden_layers(num_layers: int) -> tuple[int, int, int]:
    """The three layers whose inputs a `hidden` drafter fuses: 2, L/2, L-3, as EAGLE-3 counts them.

    >>> hidden_layers(30)
    (2, 15, 27)
    """
    low, middle, high = 2, num_layers // 2, num_layers - 3
    return (low, middle, high) if low < middle < high else (0, num_layers // 2, num_layers - 1)


def uniform_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """The last layer of each of ``count`` equal parts of ``layers``.

    >>> uniform_layers(range(30), 3), uniform_layers(range(30), 1)
    ((9, 19, 29), (29,))
    """
    if not 1 <= count <= len(layers):
        raise StudyError(f"can't choose {count} of {len(layers)} layers; give a number from 1 to {len(layers)}")
    return tuple(layers[round((part + 1) * len(layers) / count) - 1] for part in range(count))


@contextmanager
def capture(
    model: PreTrainedModel, *, hidden: Sequence[int] = (), kv: Sequence[int] = (), queries: bool = False
) -> Iterator[Captured]:
    """Record the state of ``model`` at each forward inside the block; each forward replaces the last one's.

    Parameters
    ----------
    hidden : layers whose input is recorded.
    kv : layers whose keys and values are recorded as a cache would hold them; the forward needs none.
    queries : record the queries of the ``kv`` layers too.

    Raises
    ------
    StudyError : a layer out of range, or one whose cache doesn't keep the whole prefix.

    Notes
    -----
    Everything is taken off again on leaving, also after an exception. Tensors are references, not copies.
    """
    check_layers(model, hidden, kv)
    decoder, taken = model.get_decoder(), Captured(dict.fromkeys(hidden))  # in the order asked for
    with ExitStack() as undo:
        for layer in hidden:
            keep = partial(_keep_input, taken, layer)
            undo.callback(decoder.layers[layer].register_forward_pre_hook(keep, with_kwargs=True).remove)
        keep = decoder.norm.register_forward_hook(lambda _m, _a, output: taken.final.update(hidden=output))
        undo.callback(keep.remove)
        for layer in kv:
            attention = decoder.layers[layer].self_attn
            attention._kvshot_record = partial(_keep_attention, taken, layer, queries)
            undo.callback(attention.__dict__.pop, "_kvshot_record", None)
        if kv:
            undo.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(_RECORDING)
        yield taken


def _keep_input(taken: Captured, layer: int, _module, args, kwargs) -> None:
    taken.hidden_states[layer] = args[0] if args else kwargs["hidden_states"]


def _keep_attention(
    taken: Captured, layer: int, queries: bool, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
) -> None:
    taken.keys[layer], taken.values[layer] = key, value
    if queries:
        usual = scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5)
        taken.queries[layer] = query if usual else query * (scaling * query.shape[-1] ** 0.5)


def check_layers(model: PreTrainedModel, hidden: Sequence[int], kv: Sequence[int]) -> None:
    """Refuse layers that don't exist or whose cache forgets part of the prefix."""
    number, full = model.config.get_text_config().num_hidden_layers, full_attention_layers(model)
    for layer in (*hidden, *kv):
        if not 0 <= check_value("layer", layer, int) < number:
            raise StudyError(f"layer {layer} is out of range; this target has layers 0 to {number - 1}")
    for layer in kv:
        if layer not in full:
            raise StudyError(f"layer {layer} keeps only a sliding window; layers that can be reused: {full}")


def _recording_sdpa(module, query, key, value, attention_mask, **kwargs):
    """transformers' sdpa attention, telling the module's recorder what it saw."""
    if record := module.__dict__.get("_kvshot_record"):
        record(query, key, value, kwargs.get("scaling"))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_RECORDING, _recording_sdpa)
AttentionMaskInterface.register(_RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@torch.no_grad()
def attention_rows(queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Attention weights of chosen query rows, recomputed from captured queries and keys.

    Parameters
    ----------
    queries : [B, H, n, D], keys : [B, G, N, D] with N - n tokens of prefix before the first query.
    positions : [M] which query rows, 0 … n-1.

    Returns
    -------
    [B, H, M, N] float32 weights; softmax(q k / sqrt(D)) over s ≤ the row's own position.
    """
    n, total = queries.shape[2], keys.shape[2]
    rows = queries[:, :, positions].float()
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).float()
    scores = rows @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    hidden = torch.arange(total, device=scores.device) > (positions + total - n)[:, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)
