"""Lossless speculative decoding: prefill, draft, verify, accept, roll back; one prompt at a time (batch size 1).

Between two iterations with x_{t+1} the newest token, the target's cache holds x_0 … x_t and the drafter's
entries s = 0 … t:

    draft     from x_{t+1} on, at RoPE positions t+1, t+2, …: a chain or a tree
    verify    one target forward over x_{t+1} and all drafts: p_{t+1}, p_{t+2}, … along every branch
    accept    the longest branch that the rule of `sampling` takes, a drafts, and a bonus token from the p where it ends
    roll back the target's cache to x_0 … x_{t+1+a}: the accepted entries, in order
    extend    the drafter's prefix by s = t+1 … t+1+a, made from the *target's* state, never from the drafter's own

so every iteration adds a + 1 tokens. Prefix entries are made once each; the target's cache is read where it
lies.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..drafters.config import DrafterConfig
from ..drafters.drafter import Drafter
from ..errors import StudyError
from ..features.spec import check_origin
from ..settings import check_value
from ..target.capture import capture
from ..target.load import Target
from ..target.shared import check_length
from ..target.static import STATIC
from .clock import is_timed, part
from .drafting import Drafting, NoDrafting
from .propose import ALONE, CHAIN, Chain, Proposal, Tree
from .sampling import GREEDY, Chooser, Sampling
from .static import static_parts
from .verify import TargetRun


@dataclass(frozen=True)
class Decoded:
    """What came out, and what it took.

    tokens : the answer, up to and including the first end-of-text token.
    rounds : of each iteration, what was proposed, and which nodes below its root are in the answer. The last ones draft
        no deeper than ``max_new_tokens`` allows.
    """

    tokens: list[int]
    rounds: list[tuple[Proposal, list[int]]]

    @property
    def accepted(self) -> list[int]:
        """Drafts accepted, per iteration."""
        return [len(path) for _, path in self.rounds]

    @property
    def drafted(self) -> list[int]:
        """Levels drafted (the length of a chain, the depth of a tree), per iteration."""
        return [max(proposal.depths) for proposal, _ in self.rounds]

    @property
    def target_forwards(self) -> int:
        """Verifications; the prefill, which gives the first token, is not counted."""
        return len(self.rounds)

    @property
    def decoded_mat(self) -> float:
        """Tokens per target forward, bonus included (prefill and first token aside): 1.0 for the target alone."""
        return (len(self.tokens) - 1) / self.target_forwards if self.rounds else float("nan")


@torch.inference_mode()
def decode(
    target: Target, drafter: Drafter | None, prompt: Sequence[int] | Tensor, plan: Chain | Tree = CHAIN,
    sampling: Sampling = GREEDY, *, max_new_tokens: int = 128, eos_token_ids: Sequence[int] | None = None,
) -> Decoded:  # fmt: skip
    """Continue one prompt as the target alone would: the same tokens if greedy, the same distribution if sampled.

    Parameters
    ----------
    drafter : None is the target alone, as is any drafter by the plan ``Chain(0)``, through the same code.
    prompt : [n] token ids, chat template and all.
    eos_token_ids : each of them ends the answer; by default all that end a turn of the target. ``()`` never ends.

    Raises
    ------
    StudyError : a prompt that is empty, too long or not alone; an option of another type; a drafter of another target
        or with another document's KV.
    """
    for name, value, kind in (("plan", plan, Chain | Tree), ("sampling", sampling, Sampling)):
        check_value(name, value, kind)
    prompt = check_prompt(target, prompt, check_value("max_new_tokens", max_new_tokens, int))
    stops = target.stop_ids if eos_token_ids is None else eos_token_ids
    stops = check_value("eos_token_ids", tuple(stops) if isinstance(stops, Iterable) else stops, tuple[int, ...])
    drafter = check_drafter(target, drafter) if drafter else None
    drafts = drafter and plan != ALONE
    capacity = len(prompt) + max_new_tokens
    drafting = Drafting(drafter, plan, capacity) if drafts else NoDrafting()
    with capture(target.model, hidden=drafting.hidden_layers) as taken:
        run = TargetRun(target, taken, drafting.kv_layers)
        if target.device.type in STATIC:
            ahead = sampling.temperature == 0 and not is_timed()  # one graph has no parts
            run, drafting = static_parts(target, drafting, plan if drafts else ALONE, capacity, taken, ahead)
        return speculate(run, drafting, prompt, Chooser(sampling), max_new_tokens, set(stops))


def speculate(run, drafting, prompt: list[int], chooser: Chooser, max_new_tokens: int, eos: set[int]) -> Decoded:
    """The loop. ``run`` is a `TargetRun`, ``drafting`` a `Drafting`, or anything that acts like them."""
    tokens, end, rounds = list(prompt), len(prompt) + max_new_tokens, []
    tokens.append(chooser.choose(run.prefill(prompt))[0])
    while len(tokens) < end and tokens[-1] not in eos:
        drafting.extend(run, tokens)
        proposal = drafting.propose(tokens[-1], levels=end - len(tokens) - 1)  # the bonus token needs a place too
        logits = run.verify(proposal)
        path, bonus = accept(proposal, logits, chooser)
        new = until(eos, [*(proposal.tokens[node] for node in path[1:]), bonus])
        run.keep(path[: len(new)])  # all of them but the newest have their state in the cache
        tokens += new
        rounds.append((proposal, path[1 : len(new) + 1]))
    return Decoded(tokens[len(prompt) :], rounds)


@part("sampling")
def accept(proposal: Proposal, logits: Tensor, chooser: Chooser) -> tuple[list[int], int]:
    """Walk down from the root as long as a child is accepted -> accepted nodes, root first, and the bonus token.

    ``logits`` [T, V]: the target's, after each node.
    """
    path, rows = [0], chooser.rows(logits)
    while True:
        children = proposal.children[path[-1]]
        token, place = chooser.choose(rows[path[-1]], [proposal.tokens[child] for child in children])
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


def check_prompt(target: Target, prompt: Sequence[int] | Tensor, max_new_tokens: int) -> list[int]:
    """The prompt as a list of ids, if it can be continued by ``max_new_tokens``."""
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise StudyError("a prompt is a list of token ids; `encode_turn` makes one of text") from None
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids):
        raise StudyError(f"a prompt of shape {tuple(ids.shape)}: decoding takes one prompt of one token or more")
    known = not ids.is_floating_point() and ids.dtype != torch.bool
    if not known or not 0 <= int(ids.min()) <= int(ids.max()) < target.vocab_size:
        raise StudyError(f"the prompt has ids that target {target.name} doesn't know (0 … {target.vocab_size - 1})")
    if max_new_tokens < 1:
        raise StudyError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if len(ids) + max_new_tokens > (room := target.config.max_position_embeddings):
        told = f"{len(ids)} prompt tokens and max_new_tokens={max_new_tokens}"
        raise StudyError(f"{told} don't fit into the target's context of {room}")
    check_length(target, len(ids) + max_new_tokens, "give a shorter prompt or fewer max_new_tokens")
    return ids.tolist()


def check_drafter(target: Target, drafter: Drafter) -> Drafter:
    """A drafter that can draft for this target."""
    check_origin(drafter.spec, target, "the drafter was trained")
    if why := undecodable(drafter.config):
        raise StudyError(why)
    return drafter


def undecodable(config: DrafterConfig) -> str:
    """Why such a drafter can't decode; empty if it can."""
    if config.kv_control == "shuffled":
        return "kv_control='shuffled' reads another document's KV, which decoding one prompt has not"
    told = f"query_from={config.query_from!r} is for judging along a known text"
    return "" if config.query_from == "own" else f"{told}; decode the same drafter with its own queries"
