"""Latencies at an architecture's scale, tried out with a tiny one on the CPU."""

import pytest
import torch

from kvshot_lib.decoding import latency
from kvshot_lib.decoding.latency import over_prefix
from kvshot_lib.drafters import attention
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables

VARIANTS = ("hidden", "cross_only_warm", "block_kv_1")
CPU = torch.device("cpu")


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
        ({}, "qwen3-8b needs a GPU, and there is none here; --architecture tiny tries it out"),
        ({"architecture": "huge"}, "architecture='huge': there are qwen3-8b, tiny"),
        ({"architecture": "tiny", "drafters": ["kv_9"], "prefixes": []}, "there is no variant 'kv_9'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, told):
    with pytest.raises(StudyError) as caught:
        latency.measure_latency(tmp_path, device="cpu", **given)
    assert str(caught.value) == told


def test_grouped_heads_attend_as_repeated_ones_do():
    """Query heads of one KV head as rows of one product: the attention of the target, each KV head repeated."""
    query, keys, values = (torch.randn(1, heads, n, 16, generator=torch.Generator().manual_seed(n)) for heads, n in ((6, 5), (2, 40), (2, 41)))
    values = values[:, :, :40]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *(x.repeat_interleave(3, 1) for x in (keys, values)))
    torch.testing.assert_close(latency.grouped(None, query, keys, values, None)[0], wanted.transpose(1, 2))


def test_attention_without_a_mask_is_attention_with_one_that_hides_nothing():
    rows, keys, values = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 40, 40))
    mask = attention.prefix_mask(torch.full((1, 6), 40), 40)
    expected = attention._prefix_attention(rows, keys, values, mask, 16**-0.5)
    for mine, theirs in zip(over_prefix(rows, keys, values)[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs)
