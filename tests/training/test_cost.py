"""What drafting and training cost: counts by hand, and against PyTorch's own counter."""

from dataclasses import fields, replace

import examples
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvshot_lib.drafters import attention
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.metrics import tables
from kvshot_lib.training import cost
from kvshot_lib.training.anchors import Anchors
from kvshot_lib.training.config import TrainConfig
from kvshot_lib.training.cost import Work, document_work, run_work, training_flops
from kvshot_lib.training.loss import ttt_loss
from kvshot_lib.training.ttt import draft_steps

N = 40
HEAD_DIM = 16  # of the tiny target: d = 64, 4 query heads and 2 KV heads of 16, MLP 128; 410 draft tokens
HEAD = 2 * 64 * 410


def config_of(variant: str) -> DrafterConfig:
    names = {field.name for field in fields(DrafterConfig)}
    return DrafterConfig(**{name: value for name, value in VARIANTS[variant].parameters.items() if name in names})


BUILT = list({config_of(variant): variant for variant in reversed(VARIANTS)}.values())[::-1]
"""One variant of each form: others are the same drafters, trained otherwise."""


def drafter(variant: str):
    """A variant on the tiny target, whose four query heads can share the KV heads of two layers, not of three."""
    config = replace(config_of(variant), **({"kv_layers": 2} if variant == "kv_2_heads" else {}))
    target = examples.target()
    return build_drafter(config, target, feature_spec(target, config.kv_layers), examples.DRAFT_IDS)


def counted(action) -> int:
    """FLOPs of what ``action`` does; the fused attention is unknown to the counter, its plain twin isn't."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def test_a_step_of_hidden_by_hand():
    """Two vectors of 64 go through maps of 128 → 64 (q), 128 → 32 (k, v), 64 → 64 (o), an MLP, and the head."""
    query, own, output, mlp = 2 * 128 * 64, 2 * 2 * 128 * 32, 2 * 64 * 64, 3 * 2 * 64 * 128
    found, maps, entry = drafter("hidden"), query + output + mlp + HEAD, 2 * 2 * 16 * 2
    first, third = cost.pass_cost(found, N, 0), cost.pass_cost(found, N, 2)
    assert first.flops == maps + 4 * 64 * N == 136_448
    assert third.flops == maps + own + 4 * 64 * (N + 2) == 153_344
    assert first.bytes == maps + N * entry and third.bytes == maps + own + (N + 2) * entry
    assert cost.prefix_cost(found) == cost.Cost(2 * (3 * 64) * 64 + own, entry)


def test_a_block_by_hand():
    """Eight slots: every weight is read once, the head is used for seven of them, the layers for all."""
    layer, entry = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2 * 2 * 16 * 2
    two, both = cost.pass_cost(drafter("block_kv_2"), N), cost.pass_cost(drafter("block_both_2"), N)
    assert two.bytes == HEAD + 2 * (layer + (N + 8) * entry)
    assert both.bytes == HEAD + 2 * (layer + (2 * N + 8) * entry)
    assert two.flops == 7 * HEAD + 2 * 8 * (layer + 4 * 64 * (N + 8))


def test_bytes_of_reused_kv_by_hand():
    """Keys and values of 2 heads of 16 in bfloat16, per layer and branch; `heads` reads two layers' own."""
    layer = 2 * 2 * 16 * 2
    expected = {
        "kv_1": 1, "kv_2": 2, "kv_4": 4, "kv_2_4kv": 2, "kv_2_heads": 4, "hybrid": 2, "cross_only_warm": 1,
        "block_kv_2": 2, "block_both_2": 4,
    }  # fmt: skip
    assert {name: cost.prefix_cost(drafter(name)).bytes // layer for name in expected} == expected
    assert cost.prefix_cost(drafter("kv_2_heads")).flops == 0


@pytest.mark.parametrize("variant", BUILT)
@torch.no_grad()
def test_drafting_flops_are_those_that_pytorch_counts(variant, monkeypatch):
    """RoPE's angles are matrix products to the counter (D a position); a product over one entry is none to it."""
    monkeypatch.setattr(attention, "FUSED", ())
    found = drafter(variant)
    block = found.config.paradigm == "block"
    steps = found.config.block_size - 1 if block else 6
    features = examples.live_of(examples.document("0" * N + "1")).with_layers(found.spec.kv_layers).batch([0])
    anchors = Anchors(torch.tensor([[N - 1]]), torch.ones(1, 1, steps, dtype=torch.bool), torch.ones(1, 1))
    prefix, entries = found.prefix(features), counted(lambda: found.prefix(features))
    assert entries == N * cost.prefix_cost(found, N).flops + (N + 1) * HEAD_DIM
    monkeypatch.setattr(found, "prefix", lambda _: prefix)
    runs, outputs = draft_steps(found, features, anchors, steps), []
    if block:
        flops = counted(lambda: outputs.extend(output for *_, output in runs))
        head = counted(lambda: found.norm(torch.cat(outputs, 1)[0]) @ found.head.T)
        assert flops + head == cost.pass_cost(found, N).flops + found.config.block_size * HEAD_DIM
        return
    for k in range(steps):
        flops = counted(lambda: outputs.append(next(runs)[2]))
        head = counted(lambda: found.norm(outputs[-1][0]) @ found.head.T)
        if k >= 2:
            assert flops + head == cost.pass_cost(found, N, k).flops + HEAD_DIM


def test_the_target_by_hand():
    """Four linear maps of attention and three of the MLP a layer, and the head."""
    target, found = examples.target(), cost.target_cost(examples.target())
    layers, vocabulary = target.num_layers, target.vocab_size
    weights = layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * vocabulary
    attended, read = layers * 4 * 64 * cost.CONTEXT, layers * 2 * 2 * 32 * cost.CONTEXT
    assert found == cost.Cost(2 * weights + attended, 2 * weights + read)


# Training


def mask(digits: str) -> np.ndarray:
    return np.array([digit == "1" for digit in digits])


def test_the_work_of_one_document_by_hand():
    """Six answer tokens after three: anchors 2 … 6 see 3 … 7 entries; 5, 4, 3 have a pair at steps 0, 1, 2."""
    answer = mask("000111111")
    assert document_work(answer, 3, 1.0).tolist() == [[5, 5, 5], [25, 25, 25], [5, 4, 3]]
    assert document_work(answer, 3, 0.2) == pytest.approx(np.array([[5, 1, 1], [25, 5, 5], [5, 0.8, 0.6]]))
    expected = np.array([[1] * 3, [5] * 3, [1, 0.8, 0.6]])
    assert document_work(answer, 3, 0.2, dense_first=False) == pytest.approx(expected)
    assert document_work(mask("0000"), 3, 0.2).tolist() == [[0] * 3] * 3


def test_the_work_of_a_run_counts_every_pass():
    documents = [examples.document("000111111"), examples.document("0011111111")]
    plan = TrainConfig(epochs=1, batch_documents=1, ttt_steps=3, anchor_fraction=1.0)
    once, three = run_work(documents, plan), run_work(documents, replace(plan, epochs=3))
    assert (once.tokens, once.columns, once.steps) == (19, 17, 2) and once.rows.tolist() == [12, 12, 12]
    assert (three.tokens, three.columns) == (57, 51) and three.scored.tolist() == [36, 30, 24]


def test_the_flops_of_training_kv_1_by_hand():
    """q, o: 64 → 64; k, v: 64 → 32; MLP of 128; three layers' 32 → 32; one anchor, one step, 5 + 1 entries."""
    layer = 2 * (64 * 64 * 2 + 64 * 32 * 2) + 3 * 2 * 64 * 128 + 4 * 64 * (5 + 1)
    fusion = 2 * 2 * 96 * 32
    work = Work(tokens=9, columns=8, rows=np.array([1.0]), entries=np.array([5.0]), scored=np.array([1.0]), steps=1)
    assert training_flops(drafter("kv_1"), work) == 3 * layer + 2 * 8 * fusion + 2 * HEAD + 9 * HEAD


def test_a_branch_that_is_trained_alone_is_counted_so():
    """For a fourth of its four steps; or beside the whole, for all of them."""
    documents, found = [examples.document("000111111")] * 4, drafter("hybrid")
    plan = TrainConfig(epochs=1, batch_documents=1, ttt_steps=3)
    given = {"target": examples.target(), "documents": documents}
    whole, branch = (cost.run_cost(one, plan, **given)["training_flops"] for one in (found, drafter("cross_only_warm")))
    warm, beside = (
        cost.run_cost(found, replace(plan, **cure), **given)["training_flops"]
        for cure in ({"branch_warmup_steps": 1}, {"branch_loss_weight": 0.5})
    )
    assert warm == pytest.approx(0.75 * whole + 0.25 * branch) and beside == pytest.approx(whole + branch)
    both = replace(plan, branch_warmup_steps=1, branch_loss_weight=0.5)  # alone for a step, beside it for the others
    assert cost.run_cost(found, both, **given)["training_flops"] == pytest.approx(0.75 * whole + branch)


def test_a_branch_of_a_gate_with_a_floor_is_counted_too():
    config = replace(drafter("hybrid").config, gate_floor=0.3, gate_bias=-1.0)
    built = build_drafter(config, examples.target(), drafter("hybrid").spec, examples.DRAFT_IDS)
    plan = TrainConfig(epochs=1, batch_documents=1, ttt_steps=3, branch_loss_weight=0.5)
    given = {"target": examples.target(), "documents": [examples.document("000111111")]}
    assert cost.run_cost(built, plan, **given)["training_flops"] > 0


def test_every_recorded_run_is_counted():
    """At its own number of tokens."""
    runs, counted = (tables.read("data/recorded/full", name) for name in ("runs", "compute"))
    both = runs.merge(counted, on=["variant", "seed"])
    assert len(both) == len(runs) and (both["tokens"] == both["trained_tokens"]).all()
    assert np.isfinite(counted["training_flops"]).all()


TRAINED = ["hidden", "hidden_normed", "kv_2", "kv_2_mlp", "states_2", "both_2", "hybrid"]


@pytest.mark.parametrize("variant", [*TRAINED, "block_kv_2", "block_states_1", "block_both_2"])
def test_training_flops_are_those_that_pytorch_counts(variant, monkeypatch):
    """The plain attention computes what it masks, so every anchor counts all N entries here.

    RoPE's angles and products over a single entry are left: less than one in a hundred. Without the exceptions for the
    frozen head and target state it would be more.
    """
    monkeypatch.setattr(attention, "FUSED", ())
    built, documents = drafter(variant), [examples.document("0001111111111"), examples.document("0111111111111")]
    features, steps = examples.live_of(*documents).batch([0, 1]), 7
    flops = counted(lambda: ttt_loss(built, features, ttt_steps=steps).loss.backward())
    dense = built.config.paradigm != "block"
    most = max(document_work(d.answer_mask, steps, 1.0, dense)[0, 0] for d in documents)
    rows = np.full(steps, 2 * most)  # padded to the longer document's anchors
    work = Work(26, 24, rows, rows * 12, _scored(built, features, steps), 1)
    assert training_flops(built, work) == pytest.approx(flops, rel=0.01)


def _scored(built, features, steps) -> np.ndarray:
    """Pairs whose target argmax is in the draft vocabulary: the head runs on these alone."""
    wanted, found = built.to_draft[features.target_argmax], np.zeros(steps)
    for row, answers in enumerate(features.answer_mask):
        for t in range(len(answers)):
            for k in range(steps):
                span = answers[t + 1 : t + 3 + k]
                found[k] += bool(len(span) == k + 2 and span.all() and wanted[row, t + 1 + k] >= 0)
    return found
