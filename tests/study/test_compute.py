"""FLOPs of a training: counts by hand, against PyTorch's own counter, and against what recorded runs say of themselves."""

import examples
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvshot_lib.drafters import attention
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.metrics import tables
from kvshot_lib.study import compute
from kvshot_lib.study.compute import Work, document_work, run_work, training_flops
from kvshot_lib.training import cost
from kvshot_lib.training.loop import TrainConfig
from kvshot_lib.training.ttt import ttt_loss

HEAD = 2 * 64 * 410  # of the tiny target: d = 64, 4 query heads and 2 KV heads of 16, MLP 128; 410 draft tokens
KINDS = {
    "hidden": DrafterConfig("hidden"),
    "hidden_normed": DrafterConfig("hidden", hidden_norm=True),
    "kv_2": DrafterConfig("kv", 2),
    "kv_2_mlp": DrafterConfig("kv", 2, kv_fusion="mlp"),
    "states_2": DrafterConfig("kv", 2, kv_control="from_hidden"),
    "both_2": DrafterConfig("kv", 2, kv_rope="unrotate", kv_with_hidden=True),
    "hybrid": DrafterConfig("hybrid"),
    "block_kv_2": DrafterConfig("block", 2),
    "block_states_1": DrafterConfig("block", block_context="hidden"),
    "block_both_1": DrafterConfig("block", block_context="both"),
}


def drafter(name: str):
    target = examples.target()
    config = KINDS[name]
    return build_drafter(config, target, feature_spec(target, config.kv_layers), examples.DRAFT_IDS)


def mask(digits: str) -> np.ndarray:
    return np.array([digit == "1" for digit in digits])


def test_the_work_of_one_document_by_hand():
    """Six answer tokens after three: anchors 2 … 6 see 3, 4, 5, 6, 7 entries; 5, 4 and 3 of them have a pair at steps 0, 1, 2."""
    answer = mask("000111111")
    assert document_work(answer, 3, 1.0).tolist() == [[5, 5, 5], [25, 25, 25], [5, 4, 3]]
    assert document_work(answer, 3, 0.2) == pytest.approx(np.array([[5, 1, 1], [25, 5, 5], [5, 0.8, 0.6]]))
    assert document_work(answer, 3, 0.2, dense_first=False) == pytest.approx(
        np.array([[1] * 3, [5] * 3, [1, 0.8, 0.6]])
    )
    assert document_work(mask("0000"), 3, 0.2).tolist() == [[0] * 3] * 3


def test_the_work_of_a_run_counts_every_pass():
    documents = [examples.document("000111111"), examples.document("0011111111")]
    once, three = (
        run_work(documents, TrainConfig(epochs=n, batch_documents=1, ttt_steps=3, anchor_fraction=1.0)) for n in (1, 3)
    )
    assert (once.tokens, once.columns, once.steps) == (19, 17, 2) and once.rows.tolist() == [12, 12, 12]
    assert (three.tokens, three.columns) == (57, 51) and three.scored.tolist() == [36, 30, 24]


def test_the_flops_of_kv_1_by_hand():
    """q and o: 64 → 64, k and v: 64 → 32, MLP of 128, fusion of three layers' 32 → 32; one anchor, one step, 5 entries and its own."""
    target = examples.target()
    kv_1 = build_drafter(DrafterConfig("kv"), target, feature_spec(target, 3), examples.DRAFT_IDS)
    layer = 2 * (64 * 64 * 2 + 64 * 32 * 2) + 3 * 2 * 64 * 128 + 4 * 64 * (5 + 1)
    fusion = 2 * 2 * 96 * 32
    work = Work(tokens=9, columns=8, rows=np.array([1.0]), entries=np.array([5.0]), scored=np.array([1.0]), steps=1)
    assert training_flops(kv_1, work) == 3 * layer + 2 * 8 * fusion + 2 * HEAD + 9 * HEAD


@pytest.mark.parametrize("name", KINDS)
def test_flops_are_those_that_pytorch_counts(name, monkeypatch):
    """The plain attention computes what it masks, so every anchor counts all N entries here. RoPE's angles and products over a single
    entry are what is left: less than one in a hundred. Without the frozen head's and target state's exceptions it would be off by more.
    """
    monkeypatch.setattr(attention, "FUSED", ())
    built, documents = drafter(name), [examples.document("0001111111111"), examples.document("0111111111111")]
    features, steps = examples.live_of(*documents).batch([0, 1]), 7
    wanted = built.to_draft[features.target_argmax]
    with FlopCounterMode(display=False) as counter:
        ttt_loss(built, features, ttt_steps=steps).loss.backward()
    each = np.stack(
        [document_work(d.answer_mask, steps, 1.0, dense_first=built.config.paradigm != "block") for d in documents]
    )
    rows, _, _ = each.sum(0)
    most = max(each[:, 0, 0])
    rows = np.full(steps, 2 * most)  # padded to the longer document's anchors
    scored = _scored(features, wanted, steps)
    work = Work(26, 24, rows, rows * 12, scored, 1)
    assert training_flops(built, work) == pytest.approx(counter.get_total_flops(), rel=0.01)


def _scored(features, wanted, steps) -> np.ndarray:
    """Pairs whose target argmax is in the draft vocabulary: the head runs on these alone."""
    found = np.zeros(steps)
    for row, answers in enumerate(features.answer_mask):
        for t in range(len(answers)):
            for k in range(steps):
                span = answers[t + 1 : t + 3 + k]
                found[k] += bool(len(span) == k + 2 and span.all() and wanted[row, t + 1 + k] >= 0)
    return found


def test_bytes_of_a_step_and_of_a_block_by_hand():
    """2 bytes a weight; entries of 2 heads of 16, keys and values. `hidden` makes no key and value at step 0."""
    maps, own, entry = 2 * (128 * 64 + 64 * 64 + 3 * 64 * 128), 2 * 2 * 128 * 32, 2 * 2 * 16 * 2
    assert cost.step_bytes(drafter("hidden"), 40, 0) == HEAD + maps + 40 * entry
    assert cost.step_bytes(drafter("hidden"), 40, 2) == HEAD + maps + own + 42 * entry
    layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert cost.block_bytes(drafter("block_kv_2"), 40) == HEAD + 2 * (layer + 48 * entry)
    assert cost.block_bytes(drafter("block_both_1"), 40) == HEAD + layer + (80 + 8) * entry


def test_the_target_by_hand():
    """Four linear maps of attention and three of the MLP a layer, and the head."""
    target, found = examples.target(), compute.target_cost(examples.target())
    layers, vocabulary = target.num_layers, target.vocab_size
    weights = layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64 * vocabulary
    assert found == {
        "target_flops": 2 * weights + layers * 4 * 64 * compute.CONTEXT,
        "target_bytes": 2 * weights + layers * 2 * 2 * 32 * compute.CONTEXT,
    }


def test_a_run_that_cannot_be_walked_again_is_told_and_left_out(monkeypatch):
    """Recorded runs name a profile; one that it does not train, or that saw other tokens, is not guessed at."""
    runs = tables.read("data/recorded/laptop", "runs").head(1)
    target = examples.target()
    monkeypatch.setattr(compute, "load_target", lambda *_, **__: target)
    runs = runs.assign(target_hash=target.hash)
    documents = [examples.document("000" + "1" * 30) for _ in range(144)]
    monkeypatch.setattr(compute, "_documents", lambda *_: (documents, runs["corpus"].iloc[0]))
    found, untold = compute.compute_table(pd.concat([runs, runs.assign(variant="mine")]))
    assert found.empty and len(untold) == 2
    assert "it saw" in untold[0] and "its profile now gives 14,256" in untold[0]
    assert "does not train it" in untold[1]
    walked = runs.assign(trained_tokens=3 * 144 * 33, draft_vocab_size=410, init_from="")
    found, untold = compute.compute_table(walked)
    assert not untold and found["start_flops"].tolist() == [0.0] and found["training_flops"].iloc[0] > 0


def test_every_recorded_run_is_counted():
    """The walk ended at each run's own number of tokens; a warm start has its start's FLOPs beside it."""
    runs, counted = (tables.read("data/recorded/full", name) for name in ("runs", "compute"))
    keys = ["variant", "seed"]
    both = runs.merge(counted, on=keys)
    assert len(both) == len(runs) and (both["tokens"] == both["trained_tokens"]).all()
    by_name = counted.set_index(keys)
    assert by_name.loc[("hybrid_warm", 0), "start_flops"] == by_name.loc[("hidden", 0), "training_flops"]
    assert torch.isfinite(torch.tensor(counted["training_flops"].to_numpy())).all()
