"""The merged attention against one softmax written out query by query, numbers and gradients."""

import math

import pytest
import torch

from kvshot_lib.drafters import attention as attentions
from kvshot_lib.drafters.attention import _plain_attention, chain_attention, prefix_mask

B, H, G, M, N, D = 2, 4, 2, 5, 7, 8
VISIBLE = torch.tensor([[1, 2, 7, 7, 4], [3, 1, 1, 5, 6]])


def example(chain_entries: int, dtype=torch.float32, device="cpu"):
    """Query, prefix keys and values, chain keys and values: leaves that take gradients."""
    generator = torch.Generator().manual_seed(chain_entries)
    shapes = [(B, H, M, D), (B, G, N, D), (B, G, N, D), (B, G, M, chain_entries, D), (B, G, M, chain_entries, D)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def exact(leaves):
    """The same as float64 leaves on the CPU."""
    return [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]


def naive(query, keys, values, chain_keys, chain_values, prefix: bool = True):
    """One softmax over the visible prefix and the anchor's own chain, for one query at a time."""
    out = torch.zeros(query.shape, dtype=query.dtype)
    for b, h, m in ((b, h, m) for b in range(B) for h in range(H) for m in range(M)):
        g, seen = h // (H // G), int(VISIBLE[b, m]) if prefix else 0
        every_key = torch.cat([keys[b, g, :seen], chain_keys[b, g, m]])
        every_value = torch.cat([values[b, g, :seen], chain_values[b, g, m]])
        out[b, h, m] = torch.softmax(every_key @ query[b, h, m] / math.sqrt(D), 0) @ every_value
    return out


def plain(query, prefix, mask, chain):
    """The path of devices without the fused kernel."""
    groups = (prefix or chain)[0].shape[1]
    return _plain_attention(query.unflatten(1, (groups, -1)), prefix, mask, chain).flatten(1, 2)


def run(attention, leaves, weight):
    query, keys, values, chain_keys, chain_values = leaves
    chain = (chain_keys, chain_values) if chain_keys.shape[3] else None
    out = attention(query, (keys, values), prefix_mask(VISIBLE.to(query.device), N), chain)
    used = leaves if chain else leaves[:3]
    return out, torch.autograd.grad((out * weight.to(out)).sum(), used)


@pytest.fixture
def merged_as_on_a_gpu(monkeypatch):
    """The chain's sums as products, each of the two functions one graph."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda work: whole(work, backend="aot_eager", fullgraph=True))
    both = attentions._compiled_merging.__wrapped__()
    monkeypatch.setattr(attentions, "_merging", lambda _device: both)


@pytest.mark.parametrize("chain_entries", [1, 2, 7])
def test_a_gpus_way_of_merging_gives_the_same(chain_entries, merged_as_on_a_gpu):
    test_numbers_and_gradients_equal_one_softmax_a_query(chain_attention, chain_entries, "cpu")


@pytest.mark.parametrize("attention", [chain_attention, plain])
@pytest.mark.parametrize("chain_entries", [0, 1, 3, 7])
def test_numbers_and_gradients_equal_one_softmax_a_query(attention, chain_entries, device):
    leaves = example(chain_entries, device=device)
    weight = torch.randn(B, H, M, D, generator=torch.Generator().manual_seed(1))
    out, gradients = run(attention, leaves, weight)
    leaves = exact(leaves)
    reference = naive(*leaves)
    assert torch.allclose(out.cpu().double(), reference, atol=1e-6 if device == "cpu" else 1e-5)
    wanted = torch.autograd.grad((reference * weight).sum(), leaves if chain_entries else leaves[:3])
    for got, expected in zip(gradients, wanted, strict=True):
        assert torch.allclose(got.cpu().double(), expected, atol=2e-6 if device == "cpu" else 2e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_both_paths_agree_in_bfloat16(device, autocast):
    weight = torch.randn(B, H, M, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaves = exact(example(3, torch.bfloat16))
    reference = naive(*leaves)
    wanted = torch.autograd.grad((reference * weight).sum(), leaves)
    for attention in (chain_attention, plain):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):  # a GPU's sums in float32
            out, gradients = run(attention, example(3, torch.bfloat16, device), weight)
        assert out.dtype == torch.bfloat16
        assert torch.allclose(out.cpu().double(), reference, atol=0.03)
        for got, expected in zip(gradients, wanted, strict=True):
            assert torch.allclose(got.cpu().double(), expected, atol=0.1)


def test_a_drafter_without_target_state_sees_its_chain_alone():
    query, keys, values, chain_keys, chain_values = example(3)
    out = chain_attention(query, None, None, (chain_keys, chain_values))
    assert torch.allclose(out, naive(query, keys, values, chain_keys, chain_values, prefix=False), atol=1e-6)


@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_scores_far_apart_neither_overflow_nor_lose_the_larger_part(shift):
    """The chain's scores are e^±60 times the prefix's: all the weight on one side."""
    query, keys, values, chain_keys, chain_values = (x.detach() for x in example(1))
    direction = torch.ones(D)
    query[:] = direction
    keys[:], chain_keys[:] = 0.0, direction * shift / math.sqrt(D)
    out = chain_attention(query, (keys, values), prefix_mask(VISIBLE, N), (chain_keys, chain_values))
    assert torch.allclose(out, naive(query, keys, values, chain_keys, chain_values), atol=1e-6)


def test_mask_shows_as_many_entries_as_it_is_told():
    mask = prefix_mask(torch.tensor([[1, 3], [2, 1]]), 3)
    assert mask.shape == (2, 1, 2, 3)
    assert (mask == 0).tolist() == [[[[1, 0, 0], [1, 1, 1]]], [[[1, 1, 0], [1, 0, 0]]]]
    assert set(mask.flatten().tolist()) == {0.0, -math.inf}


def test_a_masked_entry_gets_no_gradient():
    leaves = example(2)
    _, (_, keys, values, *_) = run(chain_attention, leaves, torch.ones(B, H, M, D))
    assert keys[0].abs().sum((0, 2)).all() and values[0].abs().sum((0, 2)).all()  # an anchor sees all 7
    assert not keys[1, :, 6].any() and not values[1, :, 6].any()  # no anchor of document 1 sees entry 6
