"""Latencies at an architecture's scale, tried out with a tiny one on the CPU."""

import pytest
import torch

from kvshot_lib.decoding import latency
from kvshot_lib.decoding.latency import over_prefix
from kvshot_lib.decoding.propose import Frontier, run_frontier
from kvshot_lib.drafters import attention
from kvshot_lib.drafters.layers import View
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.target.load import load_target

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
    build = latency.Untrained("tiny", 300, CPU)
    drafter = build.drafter("hybrid")
    assert drafter.layers[0].mlp.gate_proj.weight.shape == (128, 64) and drafter.head.shape == (300, 64)
    assert drafter.head.dtype == drafter.norm.weight.dtype == build.dtype
    sizes = latency.ARCHITECTURES["qwen3-8b"]
    assert (sizes["num_hidden_layers"], sizes["hidden_size"], sizes["num_attention_heads"]) == (36, 4096, 32)
    assert (sizes["num_key_value_heads"], sizes["head_dim"], sizes["intermediate_size"]) == (8, 128, 12288)


@torch.inference_mode()
def test_what_stands_for_the_target_computes_what_the_target_does():
    """With the weights of a Qwen3 and entries of its cache, a step through the layers gives its logits."""
    theirs = load_target("tiny-qwen3", device="cpu", dtype="float32").model
    config, ids = theirs.config, torch.tensor([[7, 80, 9, 300, 11, 12]])
    build = latency.Untrained("tiny", 300, CPU)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert [getattr(build.target.config, name) for name in names] == [getattr(config, name) for name in names]
    build.target.model.config.update({"rope_parameters": config.rope_parameters, "rms_norm_eps": config.rms_norm_eps})
    build.embedding = theirs.get_input_embeddings().weight
    build.head = theirs.get_output_embeddings().weight
    stack = build.layers()
    words = {"self_attn.": "attention.", "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    own = {name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()}
    for old, new in words.items():
        own = {name.replace(old, new): weight for name, weight in own.items()}
    known = stack.state_dict()
    assert {*known} <= {*own} and {*own} - {*known} == {"embed_tokens.weight", "lm_head.weight"}
    stack.load_state_dict({name: own[name] for name in known})
    cache = theirs(input_ids=ids[:, :5], use_cache=True).past_key_values
    views = [View({"cross": (layer.keys, layer.values)}, torch.zeros(1, 1, 1, 5), {}, True) for layer in cache.layers]
    found = run_frontier(stack, Frontier(ids[0, 5:], 5, None, views))
    torch.testing.assert_close(found, theirs(input_ids=ids).logits[0, -1:])


@torch.inference_mode()
def test_without_a_mask_a_draft_step_is_the_same_and_attention_is_put_back():
    before = attention._prefix_attention, attention._mask_rows
    drafter = latency.Untrained("tiny", 300, CPU).drafter("hybrid")
    torch.manual_seed(0)
    frontier = latency.after_prefix(drafter, latency.accepted_features(drafter, 3), 24)
    for width in (1, latency.LEVEL):
        plain = latency.steps(drafter, frontier, width, latency.CHAIN)
        with latency.unmasked_attention():
            assert torch.equal(latency.steps(drafter, frontier, width, latency.CHAIN), plain)
    assert (attention._prefix_attention, attention._mask_rows) == before


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, "qwen3-8b needs a GPU, and there is none here; --architecture tiny tries it out"),
        ({"architecture": "huge"}, "architecture='huge': there are qwen3-8b, tiny"),
        ({"architecture": "tiny", "drafters": ["kv_9"], "prefixes": []}, "there is no variant 'kv_9'"),
        ({"architecture": "tiny", "vocabulary": 0}, "--vocabulary is too small: it starts at 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, given, told):
    with pytest.raises(StudyError) as caught:
        latency.measure_latency(tmp_path, device="cpu", **given)
    assert str(caught.value) == told


def test_attention_without_a_mask_is_attention_with_one_that_hides_nothing():
    rows, keys, values = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 40, 40))
    mask = attention.prefix_mask(torch.full((1, 6), 40), 40)
    expected = attention._prefix_attention(rows, keys, values, mask, 16**-0.5)
    for mine, theirs in zip(over_prefix(rows, keys, values)[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs)
