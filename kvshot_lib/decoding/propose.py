"""What a drafter proposes: a chain of its most likely tokens, or a tree of them.

Either is a `Proposal`: tokens with parents, the root first. The root is x_{t+1}, which the target has
chosen already; it is verified along with its drafts because the target's state at t+1 is wanted. A root R
with children A and B, and A's child C:

    tokens    R  A  B  C         row may see    R A B C
    parents  -1  0  0  1                   R    1 . . .
    depths    0  1  1  2                   A    1 1 . .        row = the parent's row, and self
                                           B    1 . 1 .
                                           C    1 1 . 1

A drafter that runs step by step grows EAGLE's dynamic tree. The slots of a `block` don't know what the
others will hold: its one pass gives marginal distributions q_1 … q_K. Its chain takes the best token of
each, its tree the paths that are best under their *product*: path (c_1, …, c_d) has the score Σ log
q_i(c_i), each c_i among its slot's ``top_k`` best.
"""

import heapq
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from ..drafters.block import run_blocks
from ..drafters.drafter import Drafter
from ..drafters.layers import View
from ..errors import StudyError
from ..settings import check_settings
from .clock import part


@dataclass(frozen=True)
class Chain:
    """Draft ``length`` tokens, at each step the most likely one; 0 drafts nothing: the target alone.

    A block drafts no more than it has mask slots.
    """

    length: int = 7

    def __post_init__(self):
        check_settings(self)
        if self.length < 0:
            raise StudyError(f"a chain of {self.length} drafts makes no sense; give 0 (the target alone) or more")

    @property
    def label(self) -> tuple[str, str]:
        """Columns ``mode`` and ``plan`` of tables."""
        return ("chain", str(self.length)) if self.length else ("alone", "-")


CHAIN, ALONE = Chain(), Chain(0)


@dataclass(frozen=True)
class Tree:
    """EAGLE's dynamic tree; of a `block` drafter, the best paths under the product of its slots' distributions.

    depth : how often a frontier is run after the first level; drafts reach depth + 1 levels below the root.
    top_k : children that every node proposes when it is run, and nodes of a frontier.
    total : tokens to verify, the root included.
    """

    depth: int = 8
    top_k: int = 10
    total: int = 60

    def __post_init__(self):
        check_settings(self)
        if self.depth < 0 or self.top_k < 1 or self.total < 1:
            raise StudyError(
                f"tree (depth, top_k, total) = ({self.depth}, {self.top_k}, {self.total}): "
                "depth must be 0 or more, top_k and total 1 or more"
            )

    @property
    def label(self) -> tuple[str, str]:
        """Columns ``mode`` and ``plan`` of tables."""
        return "tree", f"{self.depth}/{self.top_k}/{self.total}"


@dataclass(frozen=True)
class Proposal:
    """Tokens for one verification; every node comes after its parent, and the root (parent -1) is the first."""

    tokens: list[int]
    parents: list[int]

    @classmethod
    def chain(cls, tokens: list[int]) -> "Proposal":
        """Each token the child of the one before it."""
        return cls(tokens, list(range(-1, len(tokens) - 1)))

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.tokens) - 1))

    @cached_property
    def depths(self) -> list[int]:
        """Steps below the root, of each node."""
        depths = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    @cached_property
    def children(self) -> list[list[int]]:
        """Of each node, in the order in which they are tried: the drafter's likelier ones first."""
        found = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents[1:], 1):
            found[parent].append(node)
        return found

    @property
    def sees(self) -> Tensor:
        """[T, T] bool: node i sees j if j is i itself or one of its ancestors."""
        rows = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            rows[node] |= rows[parent]
        return rows


@dataclass
class Frontier:
    """M nodes of one level of a draft, about to be run.

    tokens : [M] target ids. position : RoPE position of them all (a number, or [] int64).
    state : [1, M, d] what is fed back, None for `kv`.
    views : what each drafter layer sees; row m of their chains holds the entries of node m's ancestors.
    """

    tokens: Tensor
    position: int | Tensor
    state: Tensor | None
    views: list[View]


@part("draft")
def run_frontier(drafter: Drafter, frontier: Frontier) -> Tensor:
    """One draft step of all nodes -> logits [M, V_draft]; state and chains move on, tokens don't."""
    positions = torch.zeros_like(frontier.tokens) + frontier.position
    output = drafter.step(frontier.tokens[None], positions[None], frontier.state, frontier.views)
    frontier.state, frontier.position = drafter.feedback(output), frontier.position + 1
    for view in frontier.views:
        view.first = False
    return drafter.logits(drafter.norm(output[0]))


def branch(frontier: Frontier, tokens: Tensor, rows: Tensor) -> None:
    """Make ``tokens`` [M'] the frontier: each takes over the state and chain of its parent, a node of ``rows`` [M']."""
    frontier.tokens = tokens
    if frontier.state is not None:
        frontier.state = frontier.state[:, rows]
    for view in frontier.views:
        view.mask = view.mask[:, :, :1].expand(-1, -1, len(rows), -1)
        view.chains = {name: (keys[:, :, rows], values[:, :, rows]) for name, (keys, values) in view.chains.items()}


def draft_chain(drafter: Drafter, frontier: Frontier, length: int) -> Proposal:
    """``length`` draft steps from the root, each on the token that the last one found most likely."""
    return Proposal.chain(chain_tokens(drafter, frontier, length).tolist())


def chain_tokens(drafter: Drafter, frontier: Frontier, length: int) -> Tensor:
    """The root and at most ``length`` drafts after it, [length + 1], before anybody waits for them."""
    if drafter.config.paradigm == "block":
        logits = slot_logits(drafter, frontier, min(length, drafter.config.block_size - 1))
        return torch.cat([frontier.tokens, drafter.draft_ids[logits.argmax(-1)]])
    drafted = [frontier.tokens]
    for _ in range(length):
        frontier.tokens = drafter.draft_ids[run_frontier(drafter, frontier).argmax(-1)]
        drafted.append(frontier.tokens)
    return torch.cat(drafted)


def draft_tree(drafter: Drafter, frontier: Frontier, tree: Tree, levels: int) -> Proposal:
    """The best ``tree.total - 1`` of all scored drafts, at most ``levels`` (and tree.depth + 1) below the root.

    A draft's score is the sum of the drafter's log-probabilities on the way to it. Of a level's drafts the
    best ``top_k`` are run. Drafts are numbered in the order in which they are made, from 1; the root is 0.
    """
    root, levels = frontier.tokens, min(levels, tree.depth + 1)
    nodes, scores = torch.zeros_like(root), torch.zeros(1, device=root.device)  # of the frontier
    made, found = 1, []
    for level in range(levels):
        width, logits = min(tree.top_k, len(drafter.draft_ids)), run_frontier(drafter, frontier)
        likely = logits.float().log_softmax(-1).topk(width)  # [M, width]
        tokens, totals = drafter.draft_ids[likely.indices].flatten(), (scores[:, None] + likely.values).flatten()
        found.append((tokens, nodes.repeat_interleave(width), totals))
        if level + 1 < levels:
            best = totals.sort(descending=True, stable=True).indices[: tree.top_k]
            branch(frontier, tokens[best], best // width)
            nodes, scores, made = made + best, totals[best], made + len(tokens)
    if not found:
        return Proposal.chain(root.tolist())
    tokens, parents, totals = map(torch.cat, zip(*found, strict=True))
    return select(int(root), tokens, parents, totals, tree.total)


def select(root: int, tokens: Tensor, parents: Tensor, scores: Tensor, total: int) -> Proposal:
    """The ``total - 1`` best of C scored drafts, and the root.

    Parameters
    ----------
    tokens, parents, scores : [C]; draft i is node i + 1, parents come before their children, the root is node 0.

    A parent scores at least as high as its child and, at equal scores, comes first in a stable sort: the
    tree is connected.

    >>> select(9, torch.tensor([5, 6, 7, 8]), torch.tensor([0, 0, 1, 1]), torch.tensor([-1.0, -3.0, -1.5, -4.0]), 4)
    Proposal(tokens=[9, 5, 6, 7], parents=[-1, 0, 0, 1])
    """
    kept = scores.sort(descending=True, stable=True).indices[: total - 1].sort().values
    number = {0: 0} | {node + 1: place for place, node in enumerate(kept.tolist(), 1)}
    return Proposal([root, *tokens[kept].tolist()], [-1, *(number[parent] for parent in parents[kept].tolist())])


def draft_block(drafter: Drafter, frontier: Frontier, plan: Chain | Tree, levels: int) -> Proposal:
    """Drafts below the root, at most ``levels`` (and block_size - 1) deep; one pass, or none if there is no room."""
    root = int(frontier.tokens)
    deepest = plan.length if isinstance(plan, Chain) else plan.depth + 1
    levels = min(deepest, levels, drafter.config.block_size - 1)
    if levels < 1:
        return Proposal.chain([root])
    if isinstance(plan, Chain):
        return draft_chain(drafter, frontier, levels)
    logits = slot_logits(drafter, frontier, levels)
    best = logits.float().log_softmax(-1).topk(min(plan.top_k, len(drafter.draft_ids)))
    return best_paths(root, drafter.draft_ids[best.indices].tolist(), best.values.tolist(), plan.total)


@part("draft")
def slot_logits(drafter: Drafter, frontier: Frontier, levels: int) -> Tensor:
    """The whole block below one root in one forward -> logits of mask slots 1 … levels, [levels, V_draft]."""
    positions = torch.zeros_like(frontier.tokens) + frontier.position
    output = run_blocks(drafter, frontier.tokens[None], positions[None], frontier.views)[0, 1 : levels + 1, 0]
    return drafter.logits(drafter.norm(output))


def best_paths(root: int, tokens: list[list[int]], scores: list[list[float]], total: int) -> Proposal:
    """The ``total - 1`` best nodes under the product distribution, and the root; a score is the sum along a path.

    Parameters
    ----------
    tokens, scores : per slot, its candidates and their log-probabilities, best first.

    Nodes come out best first: a node taken offers its first child and its next sibling, neither of which
    can score higher. So exactly the best are found, and a parent always comes before its children: the tree
    is connected.

    >>> best_paths(9, [[5, 6], [7, 8]], [[-0.5, -1.0], [-0.1, -3.0]], 4)
    Proposal(tokens=[9, 5, 7, 6], parents=[-1, 0, 1, 0])
    """
    chosen, parents, order = [root], [-1], count()  # equal scores: what was offered first
    offers = [(-scores[0][0], next(order), 0, 0, 0, 0.0)]  # score, order, parent, slot, rank, the parent's score
    while offers and len(chosen) < total:
        negative, _, parent, slot, rank, above = heapq.heappop(offers)
        node = len(chosen)
        chosen.append(tokens[slot][rank])
        parents.append(parent)
        if slot + 1 < len(tokens):
            heapq.heappush(offers, (negative - scores[slot + 1][0], next(order), node, slot + 1, 0, -negative))
        if rank + 1 < len(tokens[slot]):
            heapq.heappush(offers, (-above - scores[slot][rank + 1], next(order), parent, slot, rank + 1, above))
    return Proposal(chosen, parents)
