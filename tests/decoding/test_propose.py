import copy

import pytest
import torch
from examples import drafter, target

from kvshot_lib.decoding.decode import Drafting
from kvshot_lib.decoding.propose import Chain, Proposal, Tree, branch, run_frontier, select
from kvshot_lib.decoding.verify import TargetRun, check_cache
from kvshot_lib.errors import StudyError
from kvshot_lib.target.capture import capture

PROMPT = [5, 77, 130, 9, 411, 68]
FORK = Proposal([40, 41, 42, 43, 44], [-1, 0, 0, 1, 2])  # R; A, B below R; C below A; D below B


def at_anchor(variant: str, plan, name: str = "tiny-llama") -> Drafting:
    """A drafter that has read the prompt's state; the token after the prompt is 40."""
    drafting = Drafting(drafter(variant, name), plan, 32)
    chosen = target(name)
    with torch.no_grad(), capture(chosen.model, hidden=drafting.hidden_layers) as taken:
        run = TargetRun(chosen, check_cache(chosen, None), taken, drafting.kv_layers)
        run.prefill(PROMPT)
        drafting.extend(run, [*PROMPT, 40])
    return drafting


def naive_candidates(drafting: Drafting, tree: Tree, levels: int) -> dict[tuple[int, ...], float]:
    """Path of tokens below the root -> score, for all drafts that the algorithm scores; every path is run anew from the root."""

    def next_scores(path):
        frontier = drafting.root(40)
        logits = run_frontier(drafting.drafter, frontier)
        for token in path:
            branch(frontier, torch.tensor([token]), torch.tensor([0]))
            logits = run_frontier(drafting.drafter, frontier)
        return logits[0].log_softmax(-1)

    scored, frontier = {}, [()]
    for _ in range(min(levels, tree.depth + 1)):
        level = {}
        for path in frontier:
            log_p = next_scores(path)
            for place in log_p.argsort(descending=True)[: tree.top_k].tolist():
                token = int(drafting.drafter.draft_ids[place])
                level[(*path, token)] = scored.get(path, 0.0) + float(log_p[place])
        scored |= level
        frontier = sorted(level, key=level.get, reverse=True)[: tree.top_k]
    return scored


def paths(proposal: Proposal) -> set[tuple[int, ...]]:
    found = []
    for token, parent in zip(proposal.tokens, proposal.parents):
        found.append(() if parent < 0 else (*found[parent], token))
    return set(found[1:])


@pytest.mark.parametrize("variant", ["hidden", "hidden_post_norm", "kv_2", "hybrid", "cross_only", "kv_2_lagged"])
@pytest.mark.parametrize("tree", [Tree(3, 4, 12), Tree(2, 3, 60), Tree(0, 5, 4)], ids=str)
def test_a_tree_is_the_best_of_what_single_paths_score(variant, tree):
    with torch.no_grad():
        drafting = at_anchor(variant, tree)
        proposal = drafting.propose(40, levels=9)
        scored = naive_candidates(drafting, tree, 9)
    best = sorted(scored, key=scored.get, reverse=True)[: tree.total - 1]
    assert proposal.tokens[0] == 40 and paths(proposal) == set(best)
    assert len(proposal.tokens) == len(best) + 1


def test_the_study_tree_scores_810_drafts_and_verifies_60_tokens():
    with torch.no_grad():
        drafting = at_anchor("kv_1", Tree())
        proposal = drafting.propose(40, levels=99)
        assert len(naive_candidates(drafting, Tree(), 99)) == 10 + 8 * 100
    assert len(proposal.tokens) == 60 and max(proposal.depths) <= 9


@torch.no_grad()
def test_siblings_are_tried_in_the_order_of_their_scores():
    drafting = at_anchor("hybrid", Tree(3, 4, 14))
    proposal = drafting.propose(40, levels=9)
    scored = naive_candidates(drafting, Tree(3, 4, 14), 9)
    path = [()]
    for token, parent in zip(proposal.tokens[1:], proposal.parents[1:]):
        path.append((*path[parent], token))
    for children in proposal.children:
        scores = [scored[path[child]] for child in children]
        assert scores == sorted(scores, reverse=True)


def test_selection_by_hand():
    """Level 1: 5 (-1), 6 (-3). Below 5: 7 (-1.5), 8 (-4). Below 7: 9 (-2), 10 (-9). The best four: 5, 7, 9 and 6."""
    tokens, parents = torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([0, 0, 1, 1, 3, 3])
    scores = torch.tensor([-1.0, -3.0, -1.5, -4.0, -2.0, -9.0])
    assert select(1, tokens, parents, scores, 5) == Proposal([1, 5, 6, 7, 9], [-1, 0, 0, 1, 3])
    assert select(1, tokens, parents, scores, 2) == Proposal([1, 5], [-1, 0])
    assert select(1, tokens, parents, scores, 1) == Proposal([1], [-1])
    assert len(select(1, tokens, parents, scores, 99).tokens) == 7


def test_a_child_never_comes_without_its_parent_even_at_equal_scores():
    chain = torch.arange(6)
    for total in range(1, 8):  # a drafter that is sure of itself: every score is 0
        proposal = select(9, chain, chain, torch.zeros(6), total)
        assert proposal.tokens == [9, *range(total - 1)] and proposal.is_chain
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        parents = torch.tensor([int(torch.randint(0, i + 1, (1,), generator=generator)) for i in range(30)])
        steps = torch.randint(0, 3, (30,), generator=generator)  # often 0
        scores = torch.zeros(31)
        for i in range(30):
            scores[i + 1] = scores[parents[i]] - steps[i]
        proposal = select(9, torch.arange(30), parents, scores[1:], 12)
        assert all(parent < node for node, parent in enumerate(proposal.parents))
        assert [int(parents[token]) for token in proposal.tokens[1:]] == [
            0 if parent == 0 else proposal.tokens[parent] + 1 for parent in proposal.parents[1:]
        ]


def test_shape_and_mask_of_a_proposal_by_hand():
    assert FORK.depths == [0, 1, 1, 2, 2] and FORK.children == [[1, 2], [3], [4], [], []]
    assert FORK.sees.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert Proposal.chain([4, 5, 6]) == Proposal([4, 5, 6], [-1, 0, 1])
    assert Proposal.chain([4, 5, 6]).is_chain and Proposal.chain([4]).is_chain and not FORK.is_chain


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
@torch.no_grad()
def test_every_branch_is_verified_as_if_it_were_alone(name):
    chosen = target(name)
    with capture(chosen.model) as taken:
        run = TargetRun(chosen, check_cache(chosen, None), taken)
        run.prefill(PROMPT)
        logits = run.verify(FORK)
        assert run.tree_mask(FORK).shape == (1, 1, 5, len(PROMPT) + 5)
        for node, branch_tokens in enumerate([[40], [40, 41], [40, 42], [40, 41, 43], [40, 42, 44]]):
            alone = chosen.model(torch.tensor([PROMPT + branch_tokens])).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, atol=2e-5, rtol=1e-4)
        before = [copy.copy(layer.keys[:, :, : len(PROMPT)]) for layer in run.cache.layers]
        run.keep([0, 2, 4])
        plain = chosen.model(torch.tensor([[*PROMPT, 40, 42, 44]])).past_key_values
        for layer, prompt_keys, wanted in zip(run.cache.layers, before, plain.layers):
            assert torch.equal(layer.keys[:, :, : len(PROMPT)], prompt_keys)
            torch.testing.assert_close(layer.keys, wanted.keys, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(layer.values, wanted.values, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_trees_are_cut_to_what_the_drafter_and_the_answer_have_room_for():
    drafting = at_anchor("kv_1", Tree(8, 10, 60))
    assert drafting.propose(40, levels=0) == Proposal([40], [-1])
    assert max(drafting.propose(40, levels=2).depths) <= 2
    assert at_anchor("kv_1", Tree(3, 2, 1)).propose(40, levels=5) == Proposal([40], [-1])
    few = Drafting(drafter("kv_1", draft_ids=torch.tensor([7, 9])), Tree(2, 10, 60), 32)
    few.entries, few.length = drafting.entries, drafting.length
    assert len(few.propose(40, levels=5).tokens) == 1 + 2 + 4 + 8


@pytest.mark.parametrize(
    "plan", [lambda: Chain(-1), lambda: Tree(-1, 1, 1), lambda: Tree(1, 0, 1), lambda: Tree(1, 1, 0)]
)
def test_impossible_plans_are_refused(plan):
    with pytest.raises(StudyError, match="or more"):
        plan()
