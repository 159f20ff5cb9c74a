"""What is proposed: trees that are the best of what single paths score, and one pass a block; each branch verified as if alone."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from blocks import steps_of
from examples import drafter, live_of, target
from greedy import NEW, alone, prompt, trained

from kvshot_lib.decoding import propose
from kvshot_lib.decoding.decode import Drafting, decode
from kvshot_lib.decoding.propose import Chain, Proposal, Tree, best_paths, branch, run_frontier, select
from kvshot_lib.decoding.sampling import Sampling
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.errors import StudyError
from kvshot_lib.target.capture import capture
from kvshot_lib.text.corpus import Document
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import match_documents

PROMPT = [5, 77, 130, 9, 411, 68]
FORK = Proposal([40, 41, 42, 43, 44], [-1, 0, 0, 1, 2])  # R; A, B below R; C below A; D below B


def at_anchor(variant: str, plan, name: str = "tiny-llama") -> Drafting:
    """A drafter that has read the prompt's state; the token after the prompt is 40."""
    drafting = Drafting(drafter(variant, name), plan, 32)
    chosen = target(name)
    with torch.no_grad(), capture(chosen.model, hidden=drafting.hidden_layers) as taken:
        run = TargetRun(chosen, taken, drafting.kv_layers)
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


def paths_of(proposal: Proposal) -> list[tuple[int, ...]]:
    """Every node's tokens from below the root."""
    found = []
    for token, parent in zip(proposal.tokens, proposal.parents):
        found.append(() if parent < 0 else (*found[parent], token))
    return found


@pytest.mark.parametrize("variant", ["hidden", "hidden_post_norm", "kv_2", "hybrid", "cross_only", "kv_2_lagged"])
@pytest.mark.parametrize("tree", [Tree(3, 4, 12), Tree(2, 3, 60), Tree(0, 5, 4)], ids=str)
def test_a_tree_is_the_best_of_what_single_paths_score(variant, tree):
    with torch.no_grad():
        drafting = at_anchor(variant, tree)
        proposal = drafting.propose(40, levels=9)
        scored = naive_candidates(drafting, tree, 9)
    best = sorted(scored, key=scored.get, reverse=True)[: tree.total - 1]
    assert proposal.tokens[0] == 40 and set(paths_of(proposal)[1:]) == set(best)
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
    path = paths_of(proposal)
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
        run = TargetRun(chosen, taken)
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


PLANS = (Chain(5), Tree(3, 4, 14))
BLOCKS = [(variant, "tiny-llama") for variant in ("block_kv_1", "block_kv_2", "block_states_2")]
BLOCKS += [("block_both_2", "tiny-qwen2"), ("block_kv_2_unrotate", "tiny-qwen3")]


@pytest.mark.parametrize("variant, name", BLOCKS)
def test_with_a_block_greedy_output_is_the_targets_own_and_acceptance_the_teacher_forced_one(variant, name):
    """Token for token for chain and tree; and anchor by anchor, a chain's accepted run is the run of matches found there."""
    built, accepted, matched = trained(variant, name), 0, 0
    for seed, plan in [*itertools.product((0, 2), PLANS), (0, Tree())]:  # learned in part, and never seen
        out = decode(target(name), built, prompt(seed), plan, max_new_tokens=NEW, eos_token_ids=())
        assert out.tokens == alone(name, seed), (variant, name, plan)
        assert out.decoded_mat == pytest.approx(1 + np.mean(out.accepted))
        assert max(out.drafted) <= steps_of(built)
        accepted += sum(out.accepted)
        if isinstance(plan, Chain):
            assert max(out.drafted) == min(5, steps_of(built))
            matched += sum(runs_match(built, name, seed, out, min(5, steps_of(built))))
    assert accepted > 5 and matched > 0


def runs_match(built, name, seed, out, length):
    tokens = np.array(prompt(seed) + out.tokens, dtype=np.int32)
    document, anchor = Document(tokens, np.arange(len(tokens)) >= 9), 9 - 1
    ((match, _),) = match_documents(live_of(document, name=name), built, length)
    index = find_anchors(torch.from_numpy(document.answer_mask)[None], length).index[0].tolist()
    for accepted, drafted in zip(out.accepted, out.drafted, strict=True):
        if drafted:
            assert accepted == np.logical_and.accumulate(match[index.index(anchor)][:drafted]).sum()
            yield accepted
        anchor += accepted + 1


def test_one_forward_pass_a_block_and_none_where_nothing_can_be_drafted(monkeypatch):
    built, passes, run = trained("block_kv_2", "tiny-llama"), [], propose.run_blocks
    monkeypatch.setattr(propose, "run_blocks", lambda *given: passes.append(1) or run(*given))
    for plan in (Chain(7), Tree()):
        passes.clear()
        out = decode(target(), built, prompt(0), plan, max_new_tokens=NEW, eos_token_ids=())
        assert len(passes) == sum(drafted > 0 for drafted in out.drafted)
    out = decode(target(), built, prompt(0), Chain(0), max_new_tokens=9, eos_token_ids=())
    assert out.decoded_mat == 1 and out.tokens == alone("tiny-llama", 0)[:9]


@pytest.mark.parametrize("variant", ["block_kv_2", "block_states_2"])
def test_with_a_block_exactly_as_many_tokens_as_asked_for(variant):
    for new, plan in itertools.product((1, 2, 3, 7), PLANS):
        out = decode(target(), trained(variant, "tiny-llama"), prompt(0), plan, max_new_tokens=new, eos_token_ids=())
        assert out.tokens == alone("tiny-llama", 0)[:new] and max(out.drafted, default=0) <= max(0, new - 2)


def test_with_a_block_sampling_follows_its_seed():
    built = trained("block_states_2", "tiny-llama")
    draws = [
        decode(target(), built, prompt(0), Tree(2, 3, 9), Sampling(1.0, seed=seed), max_new_tokens=20).tokens
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("total", [1, 2, 6, 20, 84, 200])
def test_a_tree_holds_the_best_paths_under_the_product(total):
    """Three slots of four candidates: 4 + 16 + 64 paths, all of them scored here. A parent comes before its children, siblings best first."""
    generator = torch.Generator().manual_seed(total)
    best = torch.randn(3, 9, generator=generator).log_softmax(-1).topk(4)
    tokens, scores = best.indices.tolist(), best.values.tolist()
    proposal = best_paths(500, tokens, scores, total)
    every = {
        tuple(tokens[slot][rank] for slot, rank in enumerate(ranks)): sum(
            scores[slot][rank] for slot, rank in enumerate(ranks)
        )
        for depth in (1, 2, 3)
        for ranks in itertools.product(range(4), repeat=depth)
    }
    wanted = sorted(every, key=every.get, reverse=True)[: total - 1]
    found = paths_of(proposal)
    assert found[0] == () and proposal.tokens[0] == 500 and found[1:] == wanted
    assert len(proposal.tokens) == min(total, 85) and len(set(found)) == len(found)
    assert all(parent < node for node, parent in enumerate(proposal.parents))
    for children in proposal.children:
        assert [every[found[child]] for child in children] == sorted((every[found[c]] for c in children), reverse=True)


def test_equal_scores_make_a_connected_tree_too():
    flat = [[math.log(0.5)] * 2] * 3
    proposal = best_paths(9, [[5, 6]] * 3, flat, 9)
    assert len(set(paths_of(proposal))) == 9 and all(parent < node for node, parent in enumerate(proposal.parents))


def test_a_tree_by_hand():
    """Slot 1: A .6, B .4; slot 2: C .9, D .1. Best first: A .6, AC .54, B .4, BC .36."""
    proposal = best_paths(0, [[1, 2], [3, 4]], [[math.log(0.6), math.log(0.4)], [math.log(0.9), math.log(0.1)]], 5)
    assert proposal.tokens == [0, 1, 3, 2, 3] and proposal.parents == [-1, 0, 1, 0, 3]
