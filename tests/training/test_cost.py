"""Drafting cost: arithmetic by hand and against PyTorch's own counter, and a time that is measured."""

import time
from dataclasses import fields

import examples
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvshot_lib.drafters import attention
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.training import cost
from kvshot_lib.training.ttt import draft_steps

N = 40
HEAD_DIM = 16  # of the tiny target: d = 64, 4 query heads and 2 KV heads of 16, MLP 128; 410 draft tokens


def drafter(variant: str):
    """The study's variant on the tiny target, whose four query heads can share the KV heads of two layers, not of three."""
    names = {field.name for field in fields(DrafterConfig)}
    values = {name: value for name, value in VARIANTS[variant].parameters.items() if name in names}
    config = DrafterConfig(**values | ({"kv_layers": 2} if variant == "kv_2_heads" else {}))
    target = examples.target()
    return build_drafter(config, target, feature_spec(target, config.kv_layers), examples.DRAFT_IDS)


def counted(action) -> int:
    """FLOPs of what ``action`` does; the fused attention is unknown to the counter, its plain twin isn't."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def test_flops_and_bytes_of_hidden_by_hand():
    """Columns of two vectors of 64 go through maps of 128 → 64 (q), 128 → 32 (k, v), 64 → 64 (o), an MLP, and the head."""
    query, own, output, mlp, head = 2 * 128 * 64, 2 * 2 * 128 * 32, 2 * 64 * 64, 3 * 2 * 64 * 128, 2 * 64 * 410
    found = drafter("hidden")
    assert cost.step_flops(found, N, 0) == query + output + mlp + head + 4 * 64 * N == 136_448
    assert cost.step_flops(found, N, 2) == query + own + output + mlp + head + 4 * 64 * (N + 2) == 153_344
    assert cost.prefix_flops_per_token(found) == 2 * (3 * 64) * 64 + own
    assert cost.prefix_bytes_per_token(found) == 2 * 2 * 16 * 2


def test_bytes_of_reused_kv_by_hand():
    """Keys and values of 2 heads of 16 in bfloat16, per layer of the drafter and per branch; `heads` reads two target layers' own."""
    layer = 2 * 2 * 16 * 2
    expected = {"kv_1": 1, "kv_2": 2, "kv_4": 4, "kv_2_4kv": 2, "kv_2_heads": 4, "hybrid": 2, "cross_only_warm": 1}
    assert {name: cost.prefix_bytes_per_token(drafter(name)) // layer for name in expected} == expected
    assert cost.prefix_flops_per_token(drafter("kv_2_heads")) == 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("block")])  # those: test_block
def test_flops_are_those_that_pytorch_counts(variant, monkeypatch):
    """RoPE's angles are matrix products to the counter (D a position); a product over one entry, at J = 1, is none to it."""
    monkeypatch.setattr(attention, "FUSED", ())
    found = drafter(variant)
    features, anchors = cost._zeros(found, N, 6)
    prefix = counted(lambda: found.prefix(features))
    assert prefix == N * cost.prefix_flops_per_token(found) + (N + 1) * HEAD_DIM
    ready, outputs = cost._WithPrefix(found, features), []
    steps = draft_steps(ready, features, anchors, 6)
    for k in range(6):
        flops = counted(lambda: outputs.append(next(steps)[2]))
        head = counted(lambda: found.norm(outputs[-1][0]) @ found.head.T)
        if k >= 2:
            assert flops + head == cost.step_flops(found, N, k) + HEAD_DIM


def test_the_columns_of_a_run():
    found = drafter("hybrid")
    columns = cost.drafting_cost(found, context_length_tokens=64, draft_length=3)
    assert list(columns) == [
        "drafting_flops",
        "prefix_flops_per_token",
        "prefix_bytes_per_token",
        "draft_context_tokens",
    ]
    assert columns["drafting_flops"] == round(sum(cost.step_flops(found, 64, k) for k in range(3)) / 3)
    assert columns["draft_context_tokens"] == 64


def test_a_draft_step_takes_part_of_the_time_that_measuring_it_takes():
    started = time.perf_counter()
    assert 0 < cost.draft_step_s(drafter("hybrid"), 64, 3) < time.perf_counter() - started


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
def test_measuring_a_cost_leaves_drafter_and_randomness_alone(variant):
    found = drafter(variant)
    before, random = {name: tensor.clone() for name, tensor in found.state_dict().items()}, torch.get_rng_state()
    cost.draft_step_s(found, 32, 2, dtype=torch.bfloat16, repeats=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.state_dict().items())
    assert found.training and torch.equal(torch.get_rng_state(), random)


def test_a_compiled_drafter_is_not_compiled_again(monkeypatch):
    """A batch of one would make torch.compile start over, for half a minute a run."""
    found = drafter("hidden")
    calls = []
    found.norm.forward = torch.compile(
        found.norm.forward, backend=lambda graph, _: calls.append(graph) or graph.forward
    )
    cost.draft_step_s(found, 32, 2, repeats=1)
    assert calls == []


def test_the_table_of_all_drafters(monkeypatch, capsys):
    """Each cost once: `hidden_continued` differs from `hidden` in its training alone."""
    monkeypatch.setattr(cost, "VARIANTS", {name: VARIANTS[name] for name in ("hidden", "hidden_continued", "kv_1")})
    assert cost.main(["--target", "tiny"]) == 0
    device, _, *rows = capsys.readouterr().out.splitlines()
    assert device.startswith("cpu") and [row.split()[0] for row in rows] == ["hidden", "kv_1"]
    monkeypatch.setattr(cost, "VARIANTS", {"kv_2_heads": VARIANTS["kv_2_heads"]})
    assert cost.main(["--target", "tiny"]) == 1 and "4 query heads can't share 6 KV heads" in capsys.readouterr().err
