"""The target with fixed shapes: a cache of fixed size, and a forward over it that a GPU can record once and replay.

A small target's forward is a thousand small kernels: a GPU runs them in a millisecond or two, Python launches them in
twenty. A CUDA graph holds them all. Elsewhere the same code is called; tests hold it there to the growing cache.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._triton import has_triton
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .load import Target

STATIC = ("cuda",)  # devices on which text is written and decoded with fixed shapes
EMPTY = 2**31  # what a column without an entry holds: after every position
_GROUPED = "kvshot_grouped_sdpa"


class PlacedLayer(StaticLayer):
    """A layer of a cache whose new entries go to the columns ``places`` [T]."""

    places: Tensor

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys.index_copy_(2, self.places, keys)
        self.values.index_copy_(2, self.places, values)
        return self.keys, self.values


class PlacedCache(Cache):
    """Room for ``columns`` entries in every layer; sliding ones keep all of them too, and their masks slide.

    It counts nothing: a forward without masks is one over an empty cache.
    """

    def __init__(self, target: Target, columns: int):
        super().__init__(layers=[PlacedLayer(columns) for _ in range(target.num_layers)])

    def place(self, places: Tensor) -> None:
        """Where the next entries go, [T] int64."""
        for layer in self.layers:
            layer.places = places


def static_forward(
    target: Target, cache: PlacedCache, ids: Tensor, positions: Tensor, column: Tensor, held: Tensor,
    sees: Tensor | None = None, wanted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Logits [B, T, V] after each of T new tokens in B rows; nothing in it waits for the device.

    Parameters
    ----------
    ids, positions : [B, T] int64.
    column : [] int64, where in the ``cache`` the first new entry goes; the others follow it.
    held : [B, C] int64, the position of each column's entry, new ones included; `EMPTY` where there is none.
    sees : [T, C] bool, what the new tokens may see of the entries at or before their positions (None: all).
    wanted : [W] int64, the tokens whose logits are given, [B, W, V] (None: all).
    """
    config, dtype = target.config, target.dtype
    cache.place(column + torch.arange(ids.shape[1], device=ids.device))
    visible = held[:, None] <= positions[:, :, None]  # [B, T, C]
    if sees is not None:
        visible = visible & sees
    shared = config.num_attention_heads // config.num_key_value_heads

    def additive(seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None].repeat(1, 1, shared, 1)

    mask = additive(visible)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        inside = held[:, None] > positions[:, :, None] - config.sliding_window
        mask = {"full_attention": mask, "sliding_attention": additive(visible & inside)}
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    given |= {} if wanted is None else {"logits_to_keep": wanted}
    family = sys.modules[type(target.model).__module__]  # transformers has a module for each, with a RoPE of its own
    with _grouped_attention(target.model), _joint_projections(target.model), _fused(target.model, family):
        return target.model(input_ids=ids, **given).logits


def recorded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``work``, whose tensors stay where they are, as a CUDA graph that returns the same tensors at every replay.

    It runs four times meanwhile. Where it can't be recorded, or on another device, it's called each time.
    """
    if device.type != "cuda":
        return work
    try:
        with torch.cuda.device(device):
            here, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(3):
                    work()
            here.wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside):
                out = work()
    except RuntimeError as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logging.getLogger(__name__).warning("no CUDA graph here (%s): every kernel is launched by itself, slowly", why)
        return work

    def replay():
        graph.replay()
        return out

    return replay


def address(module: nn.Module) -> int:
    """Where its weights are: a graph reads them there, so a module that was moved since needs another."""
    return next(module.parameters()).data_ptr()


@contextmanager
def _fused(model: PreTrainedModel, rope: ModuleType) -> Iterator[None]:
    """Within it the model's norms and MLPs, and its module's RoPE, are few kernels on a GPU, by torch.compile."""
    with ExitStack() as undo:
        if next(model.parameters()).is_cuda and has_triton():
            compiled = partial(torch.compile, dynamic=True)
            for part in model.modules():
                if type(part).__name__.endswith(("RMSNorm", "MLP")):
                    undo.enter_context(patch.object(part, "forward", compiled(part.forward)))
            undo.enter_context(patch.object(rope, "apply_rotary_pos_emb", compiled(rope.apply_rotary_pos_emb)))
        yield


TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear maps of one input, by their names in an attention or an MLP."""


@contextmanager
def _joint_projections(model: PreTrainedModel) -> Iterator[None]:
    """Within it the maps of `TOGETHER` are one matrix product: of a single token, a product takes as long as three."""
    with ExitStack() as undo:
        for maps, weight in _joint_weights(model, address(model)):
            for part, forward in zip(maps, _joint_forwards(maps, weight), strict=True):
                undo.enter_context(patch.object(part, "forward", forward))
        yield


@lru_cache(maxsize=4)
def _joint_weights(model: PreTrainedModel, _address: int) -> list[tuple[list[nn.Linear], Tensor]]:
    """Maps without biases that read one input, and their weights end to end."""
    found = []
    for part in model.modules():
        for names in TOGETHER:
            maps = [getattr(part, name, None) for name in names]
            if all(type(own) is nn.Linear and own.bias is None for own in maps):
                found.append((maps, torch.cat([own.weight for own in maps])))
    return found


def _joint_forwards(maps: list[nn.Linear], weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Of each map: the first computes all and leaves the others what is theirs, if they are asked about the same."""
    sizes, made = [own.out_features for own in maps], {}

    def first(x: Tensor) -> Tensor:
        out, *others = linear(x, weight).split(sizes, -1)
        made.update((number, (x, other)) for number, other in enumerate(others, 1))
        return out

    def later(number: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            asked, out = made.pop(number, (None, None))
            return out if asked is x else linear(x, maps[number].weight)

        return forward  # a closure, which torch.compile takes for the same code in every layer; a `partial` it doesn't

    return [first, *map(later, range(1, len(maps)))]


@contextmanager
def _grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model attends by `_grouped_sdpa`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **_):
    """Fused attention, heads that share a KV head as rows of one: the cache is read in place, not repeated for each.

    query [B, H, T, D], key and value [B, G, C, D], mask [B, 1, H/G · T, C] -> [B, T, H, D]. For a single token in half
    precision other kernels take half the time: cuDNN's for one row (for many it differs from call to call), else flex.
    """
    single = query.is_cuda and query.shape[2] == 1 and query.dtype != torch.float32
    if single and len(query) == 1:
        mask = attention_mask[:, :, :1]
        out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [B, G, H/G · T, D]
    attend = torch.compile(_flex_sdpa, dynamic=False) if single and has_triton() else scaled_dot_product_attention
    out = attend(rows, key, value, attention_mask, scale=scaling)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).transpose(1, 2).contiguous(), None


def _flex_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with a mask [B, 1, T, C] that is added."""
    masked = lambda score, row, _head, token, column: score + mask[row, 0, token, column]
    return flex_attention(query, key, value, masked, scale=scale)


AttentionInterface.register(_GROUPED, _grouped_sdpa)
AttentionMaskInterface.register(_GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
