"""What is recorded of a target, and a batch of it: the interface of all sources of features."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import StudyError
from ..settings import check_value
from ..target.capture import check_layers, hidden_layers, uniform_layers
from ..target.load import Target, full_attention_layers
from ..text.corpus import Document

STATE = ("hidden_states", "keys", "values", "final_hidden", "target_argmax")


@dataclass(frozen=True)
class FeatureSpec:
    """What is read from which target: equal specs hold comparable features.

    ``hidden_layers`` are layer inputs (EAGLE's count), ``kv_layers`` layers whose cache is read.
    """

    target: str
    target_hash: str
    tokenizer_hash: str
    hidden_layers: tuple[int, ...]
    kv_layers: tuple[int, ...]
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_json(cls, read: dict) -> "FeatureSpec":
        """A spec back from JSON, which knows lists but no tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in read.items()})

    def of_layers(self, kv: Sequence[int] | None, hidden: Sequence[int] | None) -> "FeatureSpec":
        """The same with other layers; None leaves them."""
        kv, hidden = self.kv_layers if kv is None else kv, self.hidden_layers if hidden is None else hidden
        return replace(self, kv_layers=tuple(kv), hidden_layers=tuple(hidden))

    def places(self, wanted: "FeatureSpec") -> dict[str, list[int]]:
        """Where the layers of ``wanted`` stand in each recorded field that has others too; missing ones are refused."""
        if missing := [layer for layer in wanted.kv_layers if layer not in self.kv_layers]:
            raise StudyError(
                f"no keys and values of target layers {missing} were recorded, only of {list(self.kv_layers)}; "
                f"run notebook 01_extract_kv_cache with kv_layers={sorted({*self.kv_layers, *wanted.kv_layers})}"
            )
        if missing := [layer for layer in wanted.hidden_layers if layer not in self.hidden_layers]:
            raise StudyError(
                f"no inputs of target layers {missing} were recorded, only of {list(self.hidden_layers)}; "
                "run notebook 01_extract_kv_cache with state_layers='kv'"
            )
        cached = [self.kv_layers.index(layer) for layer in wanted.kv_layers]
        found = {} if wanted.kv_layers == self.kv_layers else {"keys": cached, "values": cached}
        if wanted.hidden_layers != self.hidden_layers:
            found["hidden_states"] = [self.hidden_layers.index(layer) for layer in wanted.hidden_layers]
        return found

    @property
    def bytes_per_token(self) -> dict[str, int]:
        """Bytes that one token's features take in bfloat16, by kind."""
        kv = len(self.kv_layers) * self.num_kv_heads * self.head_dim * 2
        return {
            "hidden_states": len(self.hidden_layers) * self.hidden_size * 2,
            "keys": kv,
            "values": kv,
            "final_hidden": self.hidden_size * 2,
            "target_argmax": 4,
        }


@dataclass(frozen=True)
class Features:
    """A batch of B documents, right-padded to n tokens; a causal target never lets padding reach a real token.

    Fields not asked for are None.
    """

    tokens: Tensor
    """[B, n] int64, padded with 0"""
    answer_mask: Tensor
    """[B, n] bool; False on padding"""
    documents: Tensor
    """[B] int64: index of each document in its source"""
    hidden_states: Tensor | None = None
    """[B, n, S_h, d]: inputs of the fused layers"""
    keys: Tensor | None = None
    """[B, n, S_kv, G, D] as cached (after key norm and RoPE)"""
    values: Tensor | None = None
    """[B, n, S_kv, G, D]"""
    final_hidden: Tensor | None = None
    """[B, n, d] after the target's last norm; times the LM head it is p_t's logits"""
    target_argmax: Tensor | None = None
    """[B, n] int64: argmax of p_t over the whole vocabulary"""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Features":
        """Move to a device; floating-point fields also change their dtype."""
        held = self._held().items()
        return replace(self, **{name: moved(t, device, dtype if t.is_floating_point() else None) for name, t in held})

    def lengthened(self, multiple: int) -> "Features":
        """The same with zeros behind, up to a length that is a multiple of this."""
        more, given = -self.tokens.shape[1] % multiple, self._held()
        del given["documents"]
        longer = {name: nn.functional.pad(t, (*[0] * (2 * t.dim() - 3), more)) for name, t in given.items()}
        return replace(self, **longer)

    def _held(self) -> dict[str, Tensor]:
        return {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}


class OfLayers:
    """Recorded features of some target layers, of which a view may read fewer.

    ``_whole`` is all that was recorded, ``_chosen`` by field which of its target layers are read (absent: all).
    """

    target: Target | None = None  # who computes them, where they aren't recorded

    def __init__(self, spec: FeatureSpec):
        self.spec, self._whole, self._chosen = spec, spec, {}

    def with_layers(self, kv: Sequence[int] | None = None, hidden: Sequence[int] | None = None) -> "OfLayers":
        """The same features, with cache and hidden states of some of their target layers only (None: of all)."""
        view = copy.copy(self)
        view.spec = self._whole.of_layers(kv or self.spec.kv_layers, hidden or self.spec.hidden_layers)
        view._chosen = self._whole.places(view.spec)
        return view

    def _read(self, name: str, field: Tensor) -> Tensor:
        """A field [B, n, …] of all recorded layers, as this view reads it."""
        return field[:, :, self._chosen[name]] if name in self._chosen else field


def check_origin(origin: Mapping | FeatureSpec, target: Target | FeatureSpec, told: str) -> None:
    """Refuse what was made for another target or tokenizer than this; ``origin`` names both as a `FeatureSpec` does.

    ``told`` begins the line: "the drafter in runs/a was trained".
    """
    origin = vars(origin) if isinstance(origin, FeatureSpec) else origin
    name, own = (target.target, target.target_hash) if isinstance(target, FeatureSpec) else (target.name, target.hash)
    for what, theirs, ours in (
        ("target", origin.get("target_hash"), own),
        ("the tokenizer of", origin.get("tokenizer_hash"), target.tokenizer_hash),
    ):
        if theirs != ours:
            raise StudyError(
                f"{told} for {what} {origin.get('target')} ({theirs!s:.8}…), not for {name} ({ours:.8}…); load that "
                "target, or make it anew for this one"
            )


def feature_spec(
    target: Target, kv_layers: int | Sequence[int] = 3, fused_layers: Sequence[int] | None = None
) -> FeatureSpec:
    """Choose layers of ``target``: ``kv_layers`` is a list, or how many uniformly spaced ones."""
    config = target.config
    kinds = int | tuple[int, ...]
    given = check_value("kv_layers", tuple(kv_layers) if isinstance(kv_layers, list | range) else kv_layers, kinds)
    chosen = uniform_layers(full_attention_layers(target.model), given) if isinstance(given, int) else given
    fused = tuple(fused_layers or hidden_layers(config.num_hidden_layers))
    if not chosen or len(chosen) > len({*chosen}):
        told = "reuses nothing" if not chosen else "reuses a layer twice"
        raise StudyError(f"kv_layers={list(chosen)} {told}; give layers, or how many uniformly spaced ones")
    check_layers(target.model, fused, chosen)
    return FeatureSpec(
        target=target.name, target_hash=target.hash, tokenizer_hash=target.tokenizer_hash,
        hidden_layers=fused, kv_layers=chosen,
        hidden_size=config.hidden_size, num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )  # fmt: skip


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device; the processor doesn't wait until a GPU, busy with earlier work, has fetched it."""
    fetched = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if fetched else tensor).to(device, dtype, non_blocking=fetched)


def pad_documents(documents: Sequence[Document], indices: Sequence[int]) -> Features:
    """Tokens and masks of a batch, right-padded; no target state yet."""
    chosen = [documents[i] for i in indices]
    shape = len(chosen), max(2, *(len(document.tokens) for document in chosen))  # as `padded`, in a tenth of its time
    tokens, mask = np.zeros(shape, dtype="int64"), np.zeros(shape, dtype=bool)
    for row, document in enumerate(chosen):
        tokens[row, : len(document.tokens)], mask[row, : len(document.tokens)] = document.tokens, document.answer_mask
    return Features(torch.from_numpy(tokens), torch.from_numpy(mask), torch.tensor(list(indices)))


def padded(rows: list[Tensor]) -> Tensor:
    """Rows [n_i, …] as one tensor [B, n, …], zeros behind; n ≥ 2, for an empty prefix crashes the fused kernel."""
    least = [*rows, rows[0].new_zeros(2, *rows[0].shape[1:])]
    return pad_sequence(least, batch_first=True)[:-1]
