"""What a `block` drafter proposes while decoding: a chain or a tree, both from the per-slot distributions of one forward pass.

Its slots don't know what the others will hold: q_1 … q_K are marginal distributions. A chain takes the best token of each. A tree takes
the paths that are best under their *product*: path (c_1, …, c_d) has the score Σ log q_i(c_i), each c_i among its slot's ``top_k`` best.
"""

import heapq
from itertools import count

import torch
from torch import Tensor

from ..drafters.block import run_blocks
from ..drafters.drafter import Drafter
from .propose import Chain, Frontier, Proposal, Tree


def draft_block(drafter: Drafter, frontier: Frontier, plan: Chain | Tree, levels: int) -> Proposal:
    """Drafts below the root, at most ``levels`` (and block_size - 1) deep; nothing is run where nothing can be drafted."""
    root = int(frontier.tokens)
    deepest = plan.length if isinstance(plan, Chain) else plan.depth + 1
    levels = min(deepest, levels, drafter.config.block_size - 1)
    if levels < 1:
        return Proposal.chain([root])
    logits = slot_logits(drafter, frontier, levels)
    if isinstance(plan, Chain):
        return Proposal.chain([root, *drafter.draft_ids[logits.argmax(-1)].tolist()])
    best = logits.float().log_softmax(-1).topk(min(plan.top_k, len(drafter.draft_ids)))
    return best_paths(root, drafter.draft_ids[best.indices].tolist(), best.values.tolist(), plan.total)


def slot_logits(drafter: Drafter, frontier: Frontier, levels: int) -> Tensor:
    """The whole block below one root in one forward -> logits of mask slots 1 … levels, [levels, V_draft]."""
    positions = torch.full_like(frontier.tokens, frontier.position)
    output = run_blocks(drafter, frontier.tokens[None], positions[None], frontier.views)[0, 1 : levels + 1, 0]
    return drafter.logits(drafter.norm(output))


def best_paths(root: int, tokens: list[list[int]], scores: list[list[float]], total: int) -> Proposal:
    """The ``total - 1`` best nodes under the product distribution, and the root.

    Parameters
    ----------
    tokens, scores : per slot, its candidates and their log-probabilities, best first. A node's score is the sum along its path.

    Nodes come out best first: a node taken offers its first child and its next sibling, neither of which can score higher. So exactly
    the best are found, and a parent always comes before its children: the tree is connected.

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
