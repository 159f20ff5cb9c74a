"""Decoding with fixed shapes, for GPUs: verifying a proposal is one CUDA graph, drafting the next chain another; of a
greedy chain both are one.

A proposal is filled up to the plan's number of tokens with nodes that nobody sees. The cache has room for more than the
sequence; its columns hold their own positions, and what lies behind the sequence is written over by the next proposal.
So are the drafter's entries: they're made for all verified tokens, and only the accepted ones are ever seen. A prompt
is filled up in the same way. Graphs are kept for the next prompt of about the same length.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from ..drafters.drafter import Drafter, joined
from ..drafters.layers import View, compiled
from ..features.spec import Features
from ..target.capture import Captured
from ..target.load import Target
from ..target.static import PlacedCache, address, recorded
from .clock import part
from .drafting import Drafting, NoDrafting, rooms
from .forwards import Forward, Prefill, Verifier
from .propose import Chain, Frontier, Proposal, Tree, chain_tokens
from .verify import TargetRun, prefix_features

ROUNDED_TO = 256  # positions: prompts of different lengths share their graphs
RECORDED = 2048  # tokens of a prompt that a graph is made for, at most; more keep a GPU busy however they're launched


class StaticRun(TargetRun):
    """A `TargetRun` over the cache of a `Verifier`, from which nothing needs to be taken off again.

    ``ahead`` : a `Round` that verifies, and drafts what comes next. ``prompt`` : what has read it, unless too long.
    """

    def __init__(
        self, target: Target, taken: Captured, kv_layers: tuple[int, ...], verifier: Verifier,
        ahead: "Round | None" = None,
    ):  # fmt: skip
        super().__init__(target, taken, kv_layers)
        self.verifier, self.cache, self.ahead, self.prompt = verifier, verifier.cache, ahead, None

    @part("prefill")
    def prefill(self, tokens: list[int]) -> Tensor:
        count, verifier = len(tokens), self.verifier
        if count > RECORDED:
            self.cache.place(torch.arange(count, device=self.device))
            return super().prefill(tokens)
        width = min(rounded_up(count), len(verifier.columns))
        self.prompt = prefill = _prefill(verifier.target, verifier.layers, width, self.cache)
        logits = prefill.run(tokens)
        self.taken.hidden_states.update(zip(prefill.layers, prefill.states.unbind(2)))
        self.kept, self.end = slice(0, count), count
        return logits

    @part("verify")
    def verify(self, proposal: Proposal) -> Tensor | list[int]:
        begun, self.length, verifier = self.length > 0, self.end, self.verifier
        if self.ahead:
            return self.ahead.verify(proposal, self.length, begun)
        verifier.fill(proposal, self.length)
        logits = verifier.run()[: len(proposal.tokens)]
        self.taken.hidden_states.update(zip(verifier.layers, verifier.states.unbind(2)))
        return logits

    def crop(self) -> None:
        pass


class Redrafter:
    """Entries of the tokens verified last, then the next chain, of ``width`` - 1 drafts, or as many as a block has.

    ``tokens`` [1, width + 1] : the ``count`` accepted ones (the root is the first) and the newest, then whatever.
    ``start`` : entries made before them. ``entries`` [1, G, capacity, D] each, per layer and branch.
    """

    def __init__(self, drafter: Drafter, verifier: Verifier, kv_layers: tuple[int, ...]):
        self.drafter, self.verifier, self.kv_layers = drafter, verifier, kv_layers
        self.numbers = verifier.numbers.new_zeros(verifier.tokens.shape[1] + 3)
        self.tokens, self.start, self.count = self.numbers[None, :-2], self.numbers[-2], self.numbers[-1]
        self.count.fill_(1)
        features = self.features(verifier, self.tokens, verifier.row)
        self.entries = rooms(drafter.prefix(features)[0], len(verifier.columns))
        slots = drafter.config.block_size if drafter.config.paradigm == "block" else len(verifier.row)
        self.drafts = min(slots, len(verifier.row)) - 1
        if self.tokens.is_cuda and has_triton():  # else a layer of its own has as many kernels as six of the target
            self.forward = compiled(self.forward)
        self.recorded = recorded(self.forward, self.tokens.device)

    def run(self, tokens: list[int], start: int) -> Tensor:
        """The newest of the ``tokens`` behind the first ``start``, and the drafts after it, [width]."""
        new = tokens[start:]
        self.numbers.copy_(torch.tensor([*new, *[0] * (self.tokens.shape[1] - len(new)), start, len(new) - 1]))
        return self.recorded()

    def forward(self) -> Tensor:
        """The newest token and the drafts after it, [width]; ``entries`` has those of all verified tokens."""
        drafter, places, length = self.drafter, self.start + self.verifier.row, self.start + self.count
        made, g = drafter.prefix(self.features(self.verifier, self.tokens, places), self.start, self.entries)
        for layer, new in zip(self.entries, made, strict=True):
            joined(layer, new, self.start)
        mask = drafter.mask((length - 1)[None, None], len(self.verifier.columns))
        views = [View(layer, mask, {}, True) for layer in self.entries]
        state = None if g is None else g.index_select(1, (self.count - 1)[None])
        root = Frontier(self.tokens[0].index_select(0, self.count[None]), length, state, views)
        return chain_tokens(drafter, root, self.drafts)

    def read(self, prefill: Prefill) -> None:
        """Entries of a prompt; its last, which wants the token that comes next, is made again with the first chain."""
        tokens = nn.functional.pad(prefill.ids, (0, 1))
        for layer, new in zip(self.entries, self.drafter.prefix(self.features(prefill, tokens, prefill.row))[0]):
            joined(layer, new, prefill.first)

    def features(self, forward: Forward, tokens: Tensor, places: Tensor) -> Features:
        """The target's state at all positions that ``forward`` was over, with what it read and one token more."""
        reads = self.drafter.reads
        states = forward.states if "hidden_states" in reads else None
        cached = self.verifier.cache, self.kv_layers, lambda entries: entries.index_select(2, places)
        return prefix_features(tokens, states, *cached, reads, self.drafter.norm.weight.dtype)


class Round:
    """A greedy round of a chain as one graph: verify, accept, make entries, draft. Of the target alone: the next token.

    Accepted drafts are the target's own tokens, so what follows the root is ``best``, wherever acceptance ends. A GPU
    is given the next round before the host has read this one; the last is for nothing.
    """

    def __init__(self, verifier: Verifier, redrafter: Redrafter | None):
        self.redrafter, self.verifier, self.drafted, self.next = redrafter, verifier, [], None
        verifier.length.zero_()  # recording goes on from there, and the room behind is for that
        self.run = recorded(self.forward, verifier.row.device)

    def forward(self) -> Tensor:
        """The target's best token after each node [width], and the next chain with its root [width] or less."""
        redrafter, verifier = self.redrafter, self.verifier
        best = verifier.forward().argmax(-1)
        if redrafter is None:
            verifier.tokens[0] = best
            verifier.length.add_(1)
            return best
        drafts = verifier.tokens[0, 1 : redrafter.drafts + 1]
        count = 1 + (best[: len(drafts)] == drafts).cumprod(0).sum()
        parts = verifier.tokens[0, :1], best, verifier.length[None], count[None]
        redrafter.numbers.copy_(torch.cat(parts))
        drafted = redrafter.forward()
        verifier.tokens[0, : len(drafted)] = drafted
        verifier.length.add_(count)
        return torch.cat([best, drafted])

    def verify(self, proposal: Proposal, length: int, begun: bool) -> list[int]:
        """The target's best token after each node; once ``begun``, the proposal is what the last round has drafted."""
        width = len(self.verifier.row)
        if not begun:
            self.verifier.fill(Proposal.chain(proposal.tokens + [0] * (width - len(proposal.tokens))), length)
            self.next = None
        out, done = self.next or self.launch()
        self.next = self.launch() if done else None
        if done:
            done.synchronize()
        told = out.tolist()
        self.drafted = told[width:]
        return told[: len(proposal.tokens)]

    def launch(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """A round's result on the host, and when it will be there (None: it is)."""
        out = self.run()
        if not out.is_cuda:
            return out, None
        there, done = torch.empty(out.shape, dtype=out.dtype, pin_memory=True), torch.cuda.Event()
        there.copy_(out, non_blocking=True)
        done.record()
        return there, done


class StaticDrafting(Drafting):
    """A `Drafting` of chains over entries of fixed size; a prompt's last entry is made with the first chain."""

    def __init__(self, drafter: Drafter, plan: Chain, redrafter: Redrafter, ahead: Round | None = None):
        super().__init__(drafter, plan, len(redrafter.verifier.columns))
        self.redrafter, self.entries, self.tokens, self.ahead = redrafter, redrafter.entries, [], ahead

    @part("project")
    def extend(self, run: StaticRun, tokens: list[int]) -> None:
        self.drafted = self.ahead.drafted if self.ahead and self.tokens else []  # of the round before
        if not self.tokens:
            read = _reading(self.redrafter, run.prompt) if run.prompt else partial(super().extend, run, tokens)
            read()
            self.length = len(tokens) - 2
            for state, layer in zip(run.verifier.states[0, 0], run.verifier.layers):
                state.copy_(run.taken.hidden_states[layer][0, self.length])
        self.tokens = tokens

    @part("draft")
    def propose(self, token: int, levels: int) -> Proposal:
        drafted = self.drafted or self.redrafter.run(self.tokens, self.length).tolist()
        self.length = len(self.tokens) - 1
        return Proposal.chain(drafted[: levels + 1])


def static_parts(
    target: Target, drafting: Drafting | NoDrafting, plan: Chain | Tree, capacity: int, taken: Captured, ahead: bool
) -> tuple[StaticRun, Drafting | NoDrafting]:
    """Target and drafter with fixed shapes, for ``capacity`` positions at most; ``ahead``: a `Round`, if greedy."""
    width = max(1, plan.total if isinstance(plan, Tree) else plan.length + 1)
    most = max(capacity, 4 * width) + 2 * width  # recording a round runs four, one after the other
    layers, kv_layers = tuple(drafting.hidden_layers), tuple(drafting.kv_layers)
    verifier = _verifier(target, layers, width, _cache(target, rounded_up(most), address(target.model)))
    if isinstance(plan, Tree):  # is drafted with growing shapes
        return StaticRun(target, taken, kv_layers, verifier), drafting
    if isinstance(drafting, NoDrafting):
        return StaticRun(target, taken, kv_layers, verifier, _round(verifier, None) if ahead else None), drafting
    drafter = drafting.drafter
    redrafter = _redrafter(drafter, verifier, kv_layers, address(drafter))
    both = _round(verifier, redrafter) if ahead else None
    return StaticRun(target, taken, kv_layers, verifier, both), StaticDrafting(drafter, plan, redrafter, both)


def rounded_up(positions: int) -> int:
    """To a multiple of `ROUNDED_TO`."""
    return -(-positions // ROUNDED_TO) * ROUNDED_TO


@lru_cache(maxsize=8)
def _cache(target: Target, capacity: int, _address: int) -> PlacedCache:
    """One for all that decode so many positions, for one prompt is decoded at a time."""
    return PlacedCache(target, capacity)


@lru_cache(maxsize=64)
def _redrafter(drafter: Drafter, verifier: Verifier, kv_layers: tuple[int, ...], _address: int) -> Redrafter:
    return Redrafter(drafter, verifier, kv_layers)


_prefill = lru_cache(maxsize=32)(Prefill)  # where the target's weights have moved, its cache is another one
_reading = lru_cache(maxsize=64)(lambda drafter, prefill: recorded(partial(drafter.read, prefill), prefill.row.device))
_verifier = lru_cache(maxsize=64)(Verifier)
_round = lru_cache(maxsize=64)(Round)
