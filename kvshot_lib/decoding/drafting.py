"""A drafter while it decodes: its prefix entries, made once each of the target's state, and what it proposes."""

from collections.abc import Sequence

import torch

from ..drafters.attention import Entries
from ..drafters.drafter import Drafter, joined
from ..drafters.layers import View
from .clock import part
from .propose import Chain, Frontier, Proposal, Tree, draft_block, draft_chain, draft_tree
from .verify import TargetRun


def rooms(made: Sequence[dict[str, Entries]], capacity: int) -> list[dict[str, Entries]]:
    """Blank keys and values [1, G, capacity, D] for entries such as these, per layer and branch."""
    blank = lambda like: like.new_zeros(*like.shape[:2], capacity, like.shape[3])
    return [{name: tuple(map(blank, pair)) for name, pair in layer.items()} for layer in made]


class Drafting:
    """A drafter over the same sequence: its prefix entries, made once each and kept, and its proposals.

    ``capacity`` : most positions the sequence can have; the room for entries is taken once.
    """

    def __init__(self, drafter: Drafter, plan: Chain | Tree, capacity: int):
        self.drafter, self.plan, self.capacity = drafter, plan, capacity
        self.hidden_layers = drafter.spec.hidden_layers if "hidden_states" in drafter.reads else ()
        self.kv_layers = drafter.spec.kv_layers if "keys" in drafter.reads else ()
        self.entries: list[dict[str, Entries]] = []
        self.length, self.state = 0, None

    @part("project")
    def extend(self, run: TargetRun, tokens: list[int]) -> None:
        """Add the entries of the positions that ``run`` kept last."""
        features = run.features(tokens, self.drafter.reads, self.drafter.norm.weight.dtype)
        made, fused = self.drafter.prefix(features, self.length, self.first(self.length))
        if not self.entries:
            self.entries = rooms(made, self.capacity)
        end = self.length + features.tokens.shape[1] - 1
        first = torch.tensor(self.length, device=features.tokens.device)
        for layer, new in zip(self.entries, made, strict=True):
            joined(layer, new, first)
        self.length, self.state = end, None if fused is None else fused[:, -1:]

    def first(self, count: int) -> list[dict[str, Entries]]:
        """Views of the first ``count`` entries, per layer and branch."""
        return [
            {name: (keys[:, :, :count], values[:, :, :count]) for name, (keys, values) in layer.items()}
            for layer in self.entries
        ]

    def root(self, token: int) -> Frontier:
        """x_{t+1} at position t+1, seeing the entries that anchor t = length - 1 may."""
        device = self.drafter.draft_ids.device
        anchor = torch.tensor([[self.length - 1]], device=device)
        seen = int(self.drafter.visible(anchor))
        mask = self.drafter.mask(anchor, seen)
        views = [View(prefix, mask, {}, True) for prefix in self.first(seen)]
        return Frontier(torch.tensor([token], device=device), self.length, self.state, views)

    @part("bookkeeping")
    def propose(self, token: int, levels: int) -> Proposal:
        """Drafts below x_{t+1} = ``token``, at most ``levels`` deep."""
        if self.drafter.config.paradigm == "block":
            return draft_block(self.drafter, self.root(token), self.plan, levels)
        if isinstance(self.plan, Tree):
            return draft_tree(self.drafter, self.root(token), self.plan, levels)
        return draft_chain(self.drafter, self.root(token), min(self.plan.length, levels))


class NoDrafting:
    """The target alone: proposes nothing."""

    hidden_layers, kv_layers = (), ()

    def extend(self, run: TargetRun, tokens: list[int]) -> None:
        pass

    def propose(self, token: int, levels: int) -> Proposal:
        return Proposal.chain([token])
