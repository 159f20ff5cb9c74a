"""The plain forward that latencies are measured on is the target's own verification, for chains and for trees."""

import pytest
import torch
from examples import target
from transformers import DynamicCache

from kvshot_lib.decoding.plain_target import Kernels, PlainTarget, over_prefix
from kvshot_lib.decoding.propose import Proposal
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.drafters.attention import prefix_mask
from kvshot_lib.errors import StudyError
from kvshot_lib.target.capture import capture

PROMPT = torch.randint(3, 512, (23,), generator=torch.Generator().manual_seed(0)).tolist()
PROPOSALS = {
    "one token": Proposal.chain([7]),
    "chain": Proposal.chain([7, 300, 41, 5]),
    "tree": Proposal([7, 300, 41, 5, 6, 9], [-1, 0, 0, 1, 1, 4]),
}


def both(name: str, proposal: Proposal):
    """Logits by transformers over its own cache, and by the plain forward over a copy of that cache."""
    model = target(name).model
    with torch.inference_mode(), capture(model) as taken:
        run = TargetRun(target(name), DynamicCache(config=model.config), taken)
        run.prefill(PROMPT)
        room = [
            layer.keys.new_zeros(*layer.keys.shape[:2], len(proposal.tokens), layer.keys.shape[3])
            for layer in run.cache.layers
        ]
        copies = [
            tuple(torch.cat([part, empty], 2) for part in (layer.keys, layer.values))
            for layer, empty in zip(run.cache.layers, room, strict=True)
        ]
        theirs = run.verify(proposal)
        positions = len(PROMPT) + torch.tensor(proposal.depths)
        ours = PlainTarget(model, copies, positions, proposal.sees, Kernels())(torch.tensor(proposal.tokens))
    return theirs, ours, run.cache, copies


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
@pytest.mark.parametrize("kind", PROPOSALS)
def test_logits_and_cache_are_those_of_transformers(name, kind):
    theirs, ours, cache, copies = both(name, PROPOSALS[kind])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for layer, (keys, values) in zip(cache.layers, copies, strict=True):
        torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values, layer.values, rtol=1e-4, atol=1e-5)


def test_a_tree_read_as_a_chain_would_be_seen():
    """The comparison above can fail: the same tokens with a chain's mask give other logits."""
    theirs, _, _, _ = both("tiny-qwen3", PROPOSALS["tree"])
    other, _, _, _ = both("tiny-qwen3", Proposal.chain(PROPOSALS["tree"].tokens))
    assert (theirs - other).abs().max() > 0.1


def test_attention_without_a_mask_is_attention_with_one_that_hides_nothing():
    from kvshot_lib.drafters import attention

    rows, keys, values = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 40, 40))
    mask = prefix_mask(torch.full((1, 6), 40), 40)
    expected = attention._prefix_attention(rows, keys, values, mask, 16**-0.5)
    for mine, theirs in zip(over_prefix(rows, keys, values), expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_target_with_biases_is_refused():
    with pytest.raises(StudyError, match="has biases"):
        both("tiny-qwen2", PROPOSALS["chain"])
