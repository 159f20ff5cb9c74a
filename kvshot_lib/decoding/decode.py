"""Lossless speculative decoding: prefill, draft, verify, accept, roll back; one prompt at a time (batch size 1).

Between two iterations with x_{t+1} the newest token, the target's cache holds x_0 … x_t and the drafter's entries s = 0 … t:

    draft     from x_{t+1} on, at RoPE positions t+1, t+2, …: a chain or a tree
    verify    one target forward over x_{t+1} and all drafts: p_{t+1}, p_{t+2}, … along every branch
    accept    the longest branch that the rule of `sampling` takes, a drafts, and a bonus token from the p where it ends
    roll back the target's cache to x_0 … x_{t+1+a}: the accepted entries, in order
    extend    the drafter's prefix by s = t+1 … t+1+a, made from the *target's* state, never from the drafter's own

so every iteration adds a + 1 tokens. Prefix entries are made once each; the target's cache is read where it lies.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from ..drafters.drafter import Drafter
from ..drafters.layers import Entries, View
from ..errors import StudyError
from ..target.capture import capture
from ..target.load import Target
from ..target.shared import check_length
from .propose import CHAIN, Chain, Frontier, Proposal, Tree, draft_chain, draft_tree
from .propose_block import draft_block
from .sampling import GREEDY, Chooser, Sampling
from .verify import TargetRun, check_cache


@dataclass(frozen=True)
class Decoded:
    """What came out, and what it took.

    tokens : the answer, up to and including the first end-of-text token.
    accepted : drafts accepted, per iteration. drafted : levels drafted (the length of a chain, the depth of a tree), per iteration;
        the last ones draft no deeper than ``max_new_tokens`` allows.
    seconds : by what they went into: prefill, project (target state to prefix entries), draft, verify, accept (choice and rollback).
    """

    tokens: list[int]
    accepted: list[int]
    drafted: list[int]
    seconds: dict[str, float]

    @property
    def target_forwards(self) -> int:
        """Verifications; the prefill, which gives the first token, is not counted."""
        return len(self.accepted)

    @property
    def decoded_mat(self) -> float:
        """Tokens per target forward, bonus included (without prefill and the first token, which it gives): 1.0 for the target alone."""
        return (len(self.tokens) - 1) / self.target_forwards if self.accepted else float("nan")

    @property
    def draft_s(self) -> float:
        """Seconds of the drafter: its prefix entries and its steps."""
        return self.seconds.get("project", 0.0) + self.seconds.get("draft", 0.0)

    @property
    def verify_s(self) -> float:
        """Seconds of the target's forwards, prefill aside."""
        return self.seconds.get("verify", 0.0)

    @property
    def other_s(self) -> float:
        """Seconds of choosing, accepting and rolling back."""
        return self.seconds.get("accept", 0.0)


@torch.inference_mode()
def decode(
    target: Target, drafter: Drafter | None, prompt: Sequence[int] | Tensor, plan: Chain | Tree = CHAIN,
    sampling: Sampling = GREEDY, *, max_new_tokens: int = 128, eos_token_ids: Sequence[int] | None = None,
    cache: DynamicCache | None = None, timed: bool = True,
) -> Decoded:  # fmt: skip
    """Continue one prompt as the target alone would: the same tokens if greedy, the same distribution if sampled.

    Parameters
    ----------
    drafter : None is the target alone (as is ``Chain(0)``), through the same code.
    prompt : [n] token ids, chat template and all.
    eos_token_ids : what ends the answer; by default the target's end-of-turn token. ``()`` never ends.
    cache : an empty cache to use; it ends up with the entries of all tokens but the last.
    timed : False leaves ``seconds`` empty and never waits for the device only to read a clock.

    Raises
    ------
    StudyError : a prompt that is empty, too long or not alone; a drafter of another target or with another document's KV;
        a target or cache that can't be rolled back.
    """
    prompt = check_prompt(target, prompt, max_new_tokens)
    cache = check_cache(target, cache)
    eos = {target.eos_token_id} if eos_token_ids is None else set(eos_token_ids)
    drafting = Drafting(check_drafter(target, drafter), plan, len(prompt) + max_new_tokens) if drafter else NoDrafting()
    with capture(target.model, hidden=drafting.hidden_layers) as taken:
        run = TargetRun(target, cache, taken, drafting.kv_layers)
        return speculate(run, drafting, prompt, Chooser(sampling), max_new_tokens, eos, Stopwatch(target.device, timed))


def speculate(run, drafting, prompt: list[int], chooser: Chooser, max_new_tokens: int, eos: set[int], clock) -> Decoded:
    """The loop. ``run`` is a :class:`TargetRun`, ``drafting`` a :class:`Drafting`, or anything that acts like them."""
    tokens, end, accepted, drafted = list(prompt), len(prompt) + max_new_tokens, [], []
    logits = run.prefill(prompt)
    clock.lap("prefill")
    tokens.append(chooser.choose(logits)[0])
    while len(tokens) < end and tokens[-1] not in eos:
        clock.lap("accept")
        drafting.extend(run, tokens)
        clock.lap("project")
        proposal = drafting.propose(tokens[-1], levels=end - len(tokens) - 1)  # the bonus token needs a place too
        clock.lap("draft")
        logits = run.verify(proposal)
        clock.lap("verify")
        path, bonus = accept(proposal, logits, chooser)
        new = until(eos, [*(proposal.tokens[node] for node in path[1:]), bonus])
        run.keep(path[: len(new)])  # all of them but the newest have their state in the cache
        tokens += new
        accepted.append(min(len(path) - 1, len(new)))
        drafted.append(max(proposal.depths))
    clock.lap("accept")
    return Decoded(tokens[len(prompt) :], accepted, drafted, clock.seconds)


def accept(proposal: Proposal, logits: Tensor, chooser: Chooser) -> tuple[list[int], int]:
    """Walk down from the root as long as a child is accepted -> accepted nodes, root first, and the bonus token.

    ``logits`` [T, V]: the target's, after each node.
    """
    path = [0]
    while True:
        children = proposal.children[path[-1]]
        token, place = chooser.choose(logits[path[-1]], [proposal.tokens[child] for child in children])
        if place is None:
            return path, token
        path.append(children[place])


def until(eos: set[int], tokens: list[int]) -> list[int]:
    """Up to and including the first end-of-text token.

    >>> until({2}, [5, 2, 7]), until({2}, [5, 7])
    ([5, 2], [5, 7])
    """
    ends = [place for place, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


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

    def extend(self, run: TargetRun, tokens: list[int]) -> None:
        """Add the entries of the positions that ``run`` kept last."""
        features = run.features(tokens, self.drafter.reads, self.drafter.norm.weight.dtype)
        made, fused = self.drafter.prefix(features, self.length)
        if not self.entries:
            self.entries = [{name: self.room(parts) for name, parts in layer.items()} for layer in made]
        end = self.length + features.tokens.shape[1] - 1
        for layer, new in zip(self.entries, made, strict=True):
            for name, parts in new.items():
                for kept, part in zip(layer[name], parts, strict=True):
                    kept[:, :, self.length : end] = part
        self.length, self.state = end, None if fused is None else fused[:, -1:]

    def room(self, parts: Entries) -> Entries:
        """Empty keys and values [1, G, capacity, D]."""
        return tuple(part.new_empty(1, part.shape[1], self.capacity, part.shape[3]) for part in parts)

    def root(self, token: int) -> Frontier:
        """x_{t+1} at position t+1, seeing the entries that anchor t = length - 1 may."""
        device = self.drafter.draft_ids.device
        seen = int(self.drafter.visible(torch.tensor(self.length - 1)))
        mask = torch.zeros(1, 1, 1, seen, device=device)
        views = [
            View(
                {name: (keys[:, :, :seen], values[:, :, :seen]) for name, (keys, values) in layer.items()},
                mask,
                {},
                True,
            )
            for layer in self.entries
        ]
        return Frontier(torch.tensor([token], device=device), self.length, self.state, views)

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


@dataclass
class Stopwatch:
    """Seconds by name; every moment belongs to the lap that ends next."""

    device: torch.device
    running: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        if not self.running:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def check_prompt(target: Target, prompt: Sequence[int] | Tensor, max_new_tokens: int) -> list[int]:
    """The prompt as a list of ids, if it can be continued by ``max_new_tokens``."""
    ids = torch.as_tensor(prompt)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise StudyError(f"prompts of shape {tuple(ids.shape)}: decoding takes one prompt at a time, [tokens]")
    if not len(ids):
        raise StudyError("the prompt is empty; give one token or more")
    if ids.is_floating_point() or not 0 <= int(ids.min()) <= int(ids.max()) < target.vocab_size:
        raise StudyError(f"the prompt has ids that target {target.name} doesn't know (0 … {target.vocab_size - 1})")
    if max_new_tokens < 1:
        raise StudyError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    room = target.config.max_position_embeddings
    if len(ids) + max_new_tokens > room:
        raise StudyError(
            f"{len(ids)} prompt tokens and max_new_tokens={max_new_tokens} don't fit into the target's context of {room}"
        )
    check_length(target, len(ids) + max_new_tokens, "give a shorter prompt or fewer max_new_tokens")
    return ids.tolist()


def check_drafter(target: Target, drafter: Drafter) -> Drafter:
    """A drafter that can draft for this target."""
    theirs = drafter.spec
    if theirs.target_hash != target.hash:
        raise StudyError(
            f"the drafter was made for target {theirs.target} ({theirs.target_hash[:8]}…), "
            f"not for {target.name} ({target.hash[:8]}…); load that target or a drafter of this one"
        )
    if drafter.config.kv_control == "shuffled":
        raise StudyError(
            "kv_control='shuffled' reads another document's KV, which decoding one prompt has not; evaluate it under teacher forcing"
        )
    return drafter
