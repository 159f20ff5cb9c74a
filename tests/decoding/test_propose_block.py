"""Decoding with block drafters: lossless for chain and tree, the tree exactly the best of the product distribution."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from blocks import block_drafter, steps_of
from examples import live_of, target
from test_decode import NEW, alone, prompt

from kvshot_lib.decoding import propose_block as block_drafts
from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.decoding.propose_block import best_paths
from kvshot_lib.decoding.sampling import Sampling
from kvshot_lib.text.corpus import Document
from kvshot_lib.training.judging import match_documents
from kvshot_lib.training.ttt import find_anchors, ttt_loss

PLANS = (Chain(5), Tree(3, 4, 14))
CASES = [(variant, "tiny-llama") for variant in ("block_kv_1", "block_kv_2", "block_states_2")]
CASES += [("block_both_2", "tiny-qwen2"), ("block_kv_2_unrotate", "tiny-qwen3")]


@cache
@torch.enable_grad()
def trained(variant: str, name: str):
    """A drafter that has learned part of the answers by heart: long runs, short ones and misses all happen."""
    answered = sorted({token for seed in range(3) for token in alone(name, seed)})
    built = block_drafter(variant, name, torch.tensor(answered[: len(answered) * 9 // 10]))
    tokens = [np.array(prompt(seed) + alone(name, seed), dtype=np.int32) for seed in range(2)]
    features = live_of(*(Document(part, np.arange(len(part)) >= 9) for part in tokens), name=name).batch([0, 1])
    optimiser = torch.optim.AdamW(built.parameters(), lr=5e-3)
    for _ in range(25):
        ttt_loss(built, features, ttt_steps=steps_of(built)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return built.eval()


@pytest.mark.parametrize("variant, name", CASES)
def test_greedy_output_is_the_targets_own_and_acceptance_the_teacher_forced_one(variant, name):
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
    built, passes, run = trained("block_kv_2", "tiny-llama"), [], block_drafts.run_blocks
    monkeypatch.setattr(block_drafts, "run_blocks", lambda *given: passes.append(1) or run(*given))
    for plan in (Chain(7), Tree()):
        passes.clear()
        out = decode(target(), built, prompt(0), plan, max_new_tokens=NEW, eos_token_ids=())
        assert len(passes) == sum(drafted > 0 for drafted in out.drafted)
    out = decode(target(), built, prompt(0), Chain(0), max_new_tokens=9, eos_token_ids=())
    assert out.decoded_mat == 1 and out.tokens == alone("tiny-llama", 0)[:9]


@pytest.mark.parametrize("variant", ["block_kv_2", "block_states_2"])
def test_exactly_as_many_tokens_as_asked_for(variant):
    for new, plan in itertools.product((1, 2, 3, 7), PLANS):
        out = decode(target(), trained(variant, "tiny-llama"), prompt(0), plan, max_new_tokens=new, eos_token_ids=())
        assert out.tokens == alone("tiny-llama", 0)[:new] and max(out.drafted, default=0) <= max(0, new - 2)


def test_sampling_follows_its_seed():
    built = trained("block_states_2", "tiny-llama")
    draws = [
        decode(target(), built, prompt(0), Tree(2, 3, 9), Sampling(1.0, seed=seed), max_new_tokens=20).tokens
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def paths_of(proposal):
    """Every node's tokens from below the root."""
    found = []
    for node, parent in enumerate(proposal.parents):
        found.append(() if parent < 0 else (*found[parent], proposal.tokens[node]))
    return found


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
