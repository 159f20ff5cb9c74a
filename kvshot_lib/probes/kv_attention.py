"""Standing in a drafter's attention over the target's KV cache: to watch its queries, or to attend with others.

The target at position p = t+1+k attends with true queries q_p^{l,h} (layer l, head h) over its own keys at s ≤ p. A drafter's step k at
anchor t sees exactly these places: the prefix s ≤ t, and one entry of its own for each of t+1 … t+1+k. `TargetState` has the true
queries and keys of one document, recomputed from the target and kept on disk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..drafters.attention import chain_attention
from ..drafters.drafter import Drafter
from ..drafters.layers import Entries, extend
from ..errors import StudyError
from ..files import write_atomically
from ..target.capture import attention_rows, capture
from ..target.load import Target


@dataclass(frozen=True)
class Call:
    """One attention over the target's KV at one draft step, of M anchors of one document.

    inputs : [M, width] what the query projection reads, the drafter's state before this attention. query : [1, H, M, D].
    prefix : keys and values [1, G, N, D]. mask : [1, 1, M, N]. chain : keys and values [1, G, M, k+1, D].
    """

    layer: int
    draft_step: int
    inputs: Tensor
    query: Tensor
    prefix: Entries
    mask: Tensor
    chain: Entries

    @property
    def anchors(self) -> Tensor:
        """[M] t: an anchor sees t + 1 prefix entries."""
        return (self.mask[0, 0] == 0).sum(-1) - 1

    def places(self, length: int) -> Tensor:
        """[M] the position t+1+k of the query; clamped to a document of ``length`` tokens where the step isn't valid."""
        return (self.anchors + 1 + self.draft_step).clamp(max=length - 1)


Attend = Callable[[Call], Tensor]
"""What an attention gives: `Call` -> heads [1, H, M, D]"""


def own_query(call: Call) -> Tensor:
    """The drafter's own attention, unchanged."""
    return chain_attention(call.query, call.prefix, call.mask, call.chain)


def kv_attentions(drafter: Drafter) -> list[nn.Module]:
    """The attention over the target's KV of each layer, first layer first."""
    return [getattr(layer, "cross", None) or layer.attention for layer in drafter.layers]


@contextmanager
def attending(drafter: Drafter, attend: Attend) -> Iterator[None]:
    """Within it every attention over the target's KV gives what ``attend`` says; afterwards, also after an error, the drafter is as it was.

    Only for one document at a time, and not for a drafter whose steps were compiled.
    """

    def stand_in(index: int, module: nn.Module) -> Callable:
        def forward(inputs, rotary, prefix, mask, chain, append):
            query, *own = module.project(inputs, rotary, "q", "k", "v")
            chain = extend(chain, own)
            call = Call(index, chain[0].shape[3] - 1, inputs[0], query, prefix, mask, chain)
            return module.merge(attend(call)), chain

        return forward

    modules = kv_attentions(drafter)
    try:
        for index, module in enumerate(modules):
            module.forward = stand_in(index, module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def reuses_kv(config) -> bool:
    """Whether a drafter (its `DrafterConfig`) attends over a linear map of the target's own, rotated KV: kv_1 … kv_4 and the hybrids."""
    plain = config.kv_control == "" and config.kv_fusion == "linear" and config.kv_rope == "raw"
    plain = plain and not config.kv_with_hidden
    return config.paradigm in ("kv", "hybrid") and plain


def check_drafter(config, name: str) -> None:
    """Refuse, by name, a drafter whose queries can't be compared with the target's."""
    if not reuses_kv(config):
        raise StudyError(
            f"{name}: query estimation needs a kv or hybrid drafter over the target's own KV (kv_fusion='linear', kv_rope='raw', no "
            f"kv_control), not paradigm={config.paradigm!r} with kv_fusion={config.kv_fusion!r}, kv_rope={config.kv_rope!r}, "
            f"kv_control={config.kv_control!r}; leave it out"
        )


@dataclass(frozen=True)
class TargetState:
    """True queries [S, H, n, D] (after RoPE) and cached keys [S, G, n, D] of one document, for the S reused layers, float32."""

    queries: Tensor
    keys: Tensor

    def rows(self, place: int, positions: Tensor) -> Tensor:
        """The target's attention of reused layer number ``place`` at some positions [M]: [H, M, n]."""
        return attention_rows(self.queries[place][None], self.keys[place][None], positions)[0]


def read_state(folder: Path, target: Target, source, document: int) -> TargetState:
    """The target's queries and keys of one document of ``source``, from ``folder`` if they are there, else from the target (and kept)."""
    path = folder / f"{source.documents_hash[:8]}.{document:05d}.safetensors"
    if not path.exists():
        tokens = source.batch([document], ()).tokens[0, : source.lengths[document]]
        state = compute_state(target, tokens, source.spec.kv_layers)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(state).items()}
        write_atomically(path, lambda p: save_file(tensors, p))
    return TargetState(**{name: tensor.to(target.device) for name, tensor in load_file(path).items()})


@torch.no_grad()
def compute_state(target: Target, tokens: Tensor, layers) -> TargetState:
    """Run the target over tokens [n] and keep queries and keys of ``layers``."""
    with capture(target.model, kv=layers, queries=True) as taken:
        target.model.get_decoder()(input_ids=tokens[None].to(target.device), use_cache=False)
    return TargetState(
        *(torch.stack([part[layer][0] for layer in layers]).float() for part in (taken.queries, taken.keys))
    )
