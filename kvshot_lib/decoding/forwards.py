"""The target's forwards of fixed shapes: over a prompt, and over what a drafter proposes.

Both fill up what they are given to a fixed number of tokens. What the filling leaves in the cache lies behind the
sequence, where nobody sees it and the next forward writes.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..target.capture import capture
from ..target.load import Target
from ..target.static import PlacedCache, recorded, static_forward
from .propose import Proposal


class Forward:
    """The target's forward over ``width`` tokens, which join the ``cache``.

    ``states`` [1, width, m, d] : inputs of the hidden ``layers`` at these tokens.
    """

    def __init__(self, target: Target, layers: tuple[int, ...], width: int, cache: PlacedCache):
        self.target, self.layers, self.cache, device = target, layers, cache, target.device
        capacity = cache.layers[0].max_cache_len
        self.row, self.columns = torch.arange(width, device=device), torch.arange(capacity, device=device)
        self.states = torch.zeros(1, width, len(layers), target.config.hidden_size, dtype=target.dtype, device=device)

    def logits(self, ids: Tensor, positions: Tensor, *given: Tensor | None) -> Tensor:
        """Those of `static_forward`, [tokens, V]; ``states`` is filled."""
        with capture(self.target.model, hidden=self.layers) as taken:
            logits = static_forward(self.target, self.cache, ids, positions, *given)
        if self.layers:
            self.states.copy_(torch.stack([taken.hidden_states[layer] for layer in self.layers], dim=2))
        return logits[0]


class Prefill(Forward):
    """The forward over a prompt of ``width`` tokens at most."""

    def __init__(self, target: Target, layers: tuple[int, ...], width: int, cache: PlacedCache):
        super().__init__(target, layers, width, cache)
        self.numbers = torch.zeros(width + 2, dtype=torch.int64, device=target.device)
        self.ids, self.first, self.last = self.numbers[None, :-2], self.numbers[-2], self.numbers[-1:]
        self.recorded = recorded(self.forward, target.device)

    def forward(self) -> Tensor:
        """Logits [1, V] after the last token; what the filling writes is written over before anybody sees it."""
        return self.logits(self.ids, self.row[None], self.first, self.columns[None], None, self.last)

    def run(self, tokens: list[int]) -> Tensor:
        """Logits [V] after the last of these tokens."""
        spare = [0] * (len(self.row) - len(tokens))
        self.numbers.copy_(torch.tensor([*tokens, *spare, 0, len(tokens) - 1]))
        return self.recorded()[0]


class Verifier(Forward):
    """The forward over ``width`` nodes behind a sequence of ``length`` tokens."""

    def __init__(self, target: Target, layers: tuple[int, ...], width: int, cache: PlacedCache):
        super().__init__(target, layers, width, cache)
        device = target.device
        self.numbers = torch.zeros(width * (width + 2) + 1, dtype=torch.int64, device=device)  # one copy fills them all
        self.tokens, self.depths = self.numbers[: 2 * width].view(2, 1, width)
        self.sees, self.length = self.numbers[2 * width : -1].view(width, width), self.numbers[-1]
        self.all_seen = torch.ones(width, len(self.columns), dtype=torch.bool, device=device)
        self.forward()  # the cache takes its room
        self.run = recorded(self.forward, device)

    def forward(self) -> Tensor:
        """Logits [width, V]; ``states`` is filled."""
        places, positions = self.length + self.row, self.length + self.depths
        held = self.columns[None].index_copy(1, places, positions)
        sees = self.all_seen.index_copy(1, places, self.sees.bool())
        return self.logits(self.tokens, positions, self.length, held, sees)

    def fill(self, proposal: Proposal, length: int) -> None:
        """What the next forward is over."""
        width = len(self.row)
        tokens = proposal.tokens + [0] * (width - len(proposal.tokens))
        self.numbers.copy_(
            torch.cat([torch.tensor(tokens), _form(tuple(proposal.parents), width), torch.tensor([length])])
        )


@lru_cache(maxsize=64)
def _form(parents: tuple[int, ...], width: int) -> Tensor:
    """Depths and what sees what, of a proposal filled up to ``width`` nodes: [width + width²] int64."""
    proposal, spare = Proposal([0] * len(parents), list(parents)), width - len(parents)
    sees = torch.block_diag(proposal.sees, torch.eye(spare, dtype=torch.bool))
    return torch.cat([torch.tensor(proposal.depths + [0] * spare), sees.flatten()])
