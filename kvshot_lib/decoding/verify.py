"""The target while it decodes: one growing sequence and its cache, which is verified against and rolled back.

The cache is one of transformers' own, which keeps all positions in sliding layers too: a window that has moved on has
forgotten what a rollback would need again, so masks alone make those layers slide. Rolling back crops the cache by its
own method; of a tree's entries the accepted ones are first moved to the front of the tail, in order, so nothing that
was there before the verification is touched or copied.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..features.spec import Features
from ..target.capture import Captured
from ..target.load import Target
from .clock import part
from .propose import Proposal


class TargetRun:
    """The target over one growing sequence, with its cache; inside `capture`, whose record is ``taken``."""

    def __init__(self, target: Target, taken: Captured, kv_layers: Sequence[int] = ()):
        self.model, self.config, self.device = target.model, target.config, target.device
        self.cache, self.taken, self.kv_layers = DynamicCache(), taken, kv_layers
        self.length, self.end = 0, 0  # positions cached before the last forward, and those that count after it
        self.kept = slice(0, 0)  # rows of the last forward that were kept

    @part("prefill")
    def prefill(self, tokens: list[int]) -> Tensor:
        """Logits [V] after the last token of the prompt."""
        ids = torch.tensor([tokens], device=self.device)
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.kept, self.end = slice(0, len(tokens)), len(tokens)
        return logits[0, -1]

    @part("bookkeeping")
    def verify(self, proposal: Proposal) -> Tensor:
        """Logits [T, V] after each node of the proposal; the cache takes them all in."""
        self.length = self.end
        ids, extra = torch.tensor([proposal.tokens], device=self.device), {}
        if not proposal.is_chain:
            depths = torch.tensor([proposal.depths], device=self.device)
            extra = {
                "attention_mask": self.masks(self.tree_mask(proposal), depths[0]),
                "position_ids": self.length + depths,
            }
        return self.forward(ids, **extra)[0]

    @part("verify")
    def forward(self, ids: Tensor, **extra) -> Tensor:
        """Logits [1, T, V] of new tokens, whose entries join the cache."""
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **extra).logits

    def tree_mask(self, proposal: Proposal) -> Tensor:
        """Additive [1, 1, T, N + T]: every node sees the N cached positions, its ancestors and itself."""
        sees, dtype = proposal.sees.to(self.device), self.model.dtype
        mask = torch.zeros(len(sees), self.length + len(sees), dtype=dtype, device=self.device)
        mask[:, self.length :].masked_fill_(~sees, torch.finfo(dtype).min)
        return mask[None, None]

    def masks(self, mask: Tensor, depths: Tensor) -> Tensor | dict[str, Tensor]:
        """The mask, or one for each kind of layer where some slide: those see positions p - window < s only."""
        if "sliding_attention" not in (getattr(self.config, "layer_types", None) or ()):
            return mask
        places = torch.cat([torch.arange(self.length, device=self.device), self.length + depths])
        outside = places <= (self.length + depths)[:, None] - self.config.sliding_window
        sliding = mask.masked_fill(outside, torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": sliding}

    @part("bookkeeping")
    def keep(self, path: list[int]) -> None:
        """Roll the cache back to the accepted nodes of the last verification, in order: only the tail is touched."""
        if path[-1] != len(path) - 1:  # not the first nodes: move the accepted entries up
            rows = torch.tensor(path, device=self.device)
            for layer in self.cache.layers:
                for part in (layer.keys, layer.values):
                    tail = part[:, :, self.length :]
                    tail[:, :, : len(path)] = tail[:, :, rows]
        self.kept, self.end = path, self.length + len(path)
        self.crop()

    def crop(self) -> None:
        """Take what does not count off the cache."""
        if surplus := self.cache.get_seq_length() - self.end:
            self.cache.crop(-surplus)

    def features(self, tokens: list[int], reads: Sequence[str], dtype: torch.dtype) -> Features:
        """Target state at the kept positions s, with x_s and one token more: what prefix entries are made from."""
        hidden, ids = self.taken.hidden_states, torch.tensor([tokens[self.length :]], device=self.device)
        states = torch.stack([own[:, self.kept] for own in hidden.values()], 2) if "hidden_states" in reads else None
        cached = self.cache, self.kv_layers, lambda entries: entries[:, :, self.length : self.end]
        return prefix_features(ids, states, *cached, reads, dtype)


def prefix_features(
    ids: Tensor, states: Tensor | None, cache: Cache, kv_layers: Sequence[int], kept: Callable[[Tensor], Tensor],
    reads: Sequence[str], dtype: torch.dtype,
) -> Features:  # fmt: skip
    """What prefix entries of m positions are made from: tokens [1, m + 1] and what of the target's state is read.

    ``states`` [1, m, S, d] are hidden; of a layer's cached keys or values [1, G, N, D] ``kept`` gives those m.
    """
    state = {} if states is None else {"hidden_states": states}
    for name in {"keys", "values"} & {*reads}:
        layers = [kept(getattr(cache.layers[layer], name)) for layer in kv_layers]
        state[name] = torch.stack(layers, dim=2).permute(0, 3, 2, 1, 4)  # [1, m, S_kv, G, D]
    return Features(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 0], **state).to(ids.device, dtype)
