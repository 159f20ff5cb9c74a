"""Latencies at an architecture's scale, tried out with a tiny one on the CPU; the plain forward they time is the target's own."""

import pytest
import torch
from examples import target
from transformers import DynamicCache

from kvshot_lib.decoding import latency
from kvshot_lib.decoding.latency import PlainTarget, over_prefix
from kvshot_lib.decoding.propose import Proposal
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.drafters import attention
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.target.capture import capture

VARIANTS = ("hidden", "cross_only_warm", "block_kv_1")
CPU = torch.device("cpu")
PROMPT = torch.randint(3, 512, (23,), generator=torch.Generator().manual_seed(0)).tolist()
PROPOSALS = {
    "one token": Proposal.chain([7]),
    "chain": Proposal.chain([7, 300, 41, 5]),
    "tree": Proposal([7, 300, 41, 5, 6, 9], [-1, 0, 0, 1, 1, 4]),
}


def test_every_cost_is_a_row_and_the_method_is_told(tmp_path, capsys):
    given = {"architecture": "tiny", "drafters": VARIANTS, "prefixes": (16, 40), "vocabulary": 300, "device": "cpu"}
    latency.measure_latency(tmp_path, **given)
    table = tables.read(tmp_path, "step_latency")
    costs = {(what, tokens) for what, tokens, *_ in table.itertuples(index=False)}
    verified = {("verify", tokens) for tokens in latency.VERIFIED}
    drafted = {(f"draft {v}", n) for v in VARIANTS[:2] for n in (1, latency.LEVEL)} | {("block block_kv_1", 7)}
    assert costs == verified | drafted | {(f"project {v}", latency.ACCEPTED) for v in VARIANTS}
    assert set(table["prefix_tokens"]) == {0, 16, 40} and set(table["method"]) == {"eager"}
    assert (table["milliseconds"] > 0).all() and (table["fastest_ms"] <= table["slowest_ms"]).all()
    assert "draft hidden" in capsys.readouterr().out


def test_drafters_have_the_architectures_sizes_and_its_dtype():
    built_for = latency.random_target("tiny", CPU)
    drafter = latency.random_drafter("hybrid", built_for, torch.arange(300))
    assert drafter.layers[0].mlp.gate_proj.weight.shape == (128, 64) and drafter.head.shape == (300, 64)
    assert drafter.head.dtype == drafter.norm.weight.dtype == built_for.dtype
    sizes = latency.ARCHITECTURES["qwen3-8b"]
    assert (sizes["num_hidden_layers"], sizes["hidden_size"], sizes["num_attention_heads"]) == (36, 4096, 32)
    assert (sizes["num_key_value_heads"], sizes["head_dim"], sizes["intermediate_size"]) == (8, 128, 12288)


@torch.inference_mode()
def test_without_a_mask_a_draft_step_is_the_same_and_attention_is_put_back():
    before = attention._prefix_attention, attention._mask_rows
    built_for = latency.random_target("tiny", CPU)
    drafter = latency.random_drafter("hybrid", built_for, torch.arange(300))
    torch.manual_seed(0)
    for work, _ in latency.draft_calls(drafter, latency.accepted_features(built_for, drafter, 3), 24).values():
        plain = work()
        with latency.unmasked_attention():
            assert torch.equal(work(), plain)
    assert (attention._prefix_attention, attention._mask_rows) == before


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, "qwen3-8b needs a GPU, and there is none here; --architecture tiny tries the command out"),
        ({"architecture": "huge"}, "architecture='huge': there are qwen3-8b, tiny"),
        ({"architecture": "tiny", "drafters": ["kv_9"], "prefixes": []}, "there is no variant 'kv_9'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, told):
    with pytest.raises(StudyError) as caught:
        latency.measure_latency(tmp_path, device="cpu", **given)
    assert str(caught.value) == told


def both(name: str, proposal: Proposal):
    """Logits by transformers over its own cache, and by the plain forward over a copy of that cache."""
    model = target(name).model
    with torch.inference_mode(), capture(model) as taken:
        run = TargetRun(target(name), DynamicCache(config=model.config), taken)
        run.prefill(PROMPT)
        longer = lambda part: torch.cat([part, part.new_zeros(*part.shape[:2], len(proposal.tokens), part.shape[3])], 2)
        copies = [(longer(layer.keys), longer(layer.values)) for layer in run.cache.layers]
        theirs = run.verify(proposal)
        positions = len(PROMPT) + torch.tensor(proposal.depths)
        ours = PlainTarget(model, copies, positions, proposal.sees)(torch.tensor(proposal.tokens))
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
    rows, keys, values = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 40, 40))
    mask = attention.prefix_mask(torch.full((1, 6), 40), 40)
    expected = attention._prefix_attention(rows, keys, values, mask, 16**-0.5)
    for mine, theirs in zip(over_prefix(rows, keys, values), expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_target_with_biases_is_refused():
    with pytest.raises(StudyError, match="has biases"):
        both("tiny-qwen2", PROPOSALS["chain"])
