"""Latencies at an architecture's scale: tried out with a tiny one on the CPU, where nothing is captured and it says so."""

import pandas as pd
import pytest
import torch

from kvshot_lib.decoding import latency
from kvshot_lib.drafters import attention
from kvshot_lib.metrics import tables

VARIANTS = ("hidden", "cross_only_warm", "block_kv_1")


@pytest.fixture(scope="module")
def machine():
    return latency.machine_for(torch.device("cpu"), replays=2, graphs=True, compiled=True)


@pytest.fixture(scope="module")
def rows(machine):
    return list(latency.measure("tiny", machine, (16, 40), VARIANTS, vocabulary=300))


def test_every_cost_is_a_row_and_the_method_is_told(rows):
    table = tables.check(pd.DataFrame(rows), "step_latency", "here")
    costs = {(what, tokens) for what, tokens, *_ in table.itertuples(index=False)}
    verified = {("verify", tokens) for tokens in latency.VERIFIED}
    drafted = {(f"draft {v}", n) for v in VARIANTS[:2] for n in (1, latency.LEVEL)} | {("block block_kv_1", 7)}
    assert costs == verified | drafted | {(f"project {v}", latency.ACCEPTED) for v in VARIANTS}
    assert set(table["prefix_tokens"]) == {0, 16, 40} and set(table["method"]) == {"eager"}
    assert (table["milliseconds"] > 0).all() and (table["fastest_ms"] <= table["slowest_ms"]).all()


def test_drafters_have_the_architectures_sizes_and_its_dtype(machine):
    target = latency.random_target("tiny", machine)
    drafter = latency.random_drafter("hybrid", target, torch.arange(300))
    assert drafter.layers[0].mlp.gate_proj.weight.shape == (128, 64) and drafter.head.shape == (300, 64)
    assert drafter.head.dtype == drafter.norm.weight.dtype == target.dtype
    sizes = latency.ARCHITECTURES["qwen3-8b"]
    assert (sizes["num_hidden_layers"], sizes["hidden_size"], sizes["num_attention_heads"]) == (36, 4096, 32)
    assert (sizes["num_key_value_heads"], sizes["head_dim"], sizes["intermediate_size"]) == (8, 128, 12288)


def test_the_drafters_attention_is_put_back(machine):
    before = attention._prefix_attention, attention._mask_rows
    with pytest.raises(ZeroDivisionError), latency.unmasked_attention():
        1 / 0  # noqa: B018
    assert (attention._prefix_attention, attention._mask_rows) == before


def test_without_a_mask_a_draft_step_is_the_same(machine):
    target = latency.random_target("tiny", machine)
    drafter = latency.random_drafter("hybrid", target, torch.arange(300))
    torch.manual_seed(0)
    with torch.inference_mode():
        calls = latency.draft_calls(drafter, latency.accepted_features(target, drafter, 3), 24)
        for work, _ in calls.values():
            plain = work()
            with latency.unmasked_attention():
                assert torch.equal(work(), plain)


def test_what_fails_compiled_is_measured_as_it_is(machine, monkeypatch, capsys):
    """A machine whose compiled kernels break: those rows come from the plain ones, and say so."""
    broken = latency.replace(machine, compiled=True)
    monkeypatch.setattr(latency.Kernels, "compiled", lambda self: latency.replace(self, merged=_broken))
    monkeypatch.setattr(latency.Drafter, "compile_steps", lambda self: self)
    rows = list(latency.measure("tiny", broken, (16,), ("hidden",), vocabulary=300))
    methods = {row["what"]: row["method"] for row in rows}
    assert methods == {"project hidden": "eager, compiled", "draft hidden": "eager, compiled", "verify": "eager"}
    assert "no such kernel" in capsys.readouterr().out


def _broken(*_):
    raise RuntimeError("no such kernel")


def test_command_line(tmp_path, capsys):
    words = [
        "--keep",
        str(tmp_path),
        "--architecture",
        "tiny",
        "--prefix",
        "16",
        "--drafters",
        "kv_1",
        "--replays",
        "2",
    ]
    assert latency.main([*words, "--vocabulary", "300", "--device", "cpu"]) == 0
    assert "verify" in capsys.readouterr().out and len(tables.read(tmp_path, "step_latency")) == 8
    assert latency.main(["--keep", str(tmp_path), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == (
        "error: qwen3-8b needs a GPU, and there is none here; --architecture tiny tries the command out\n"
    )
