"""Recording a training: its numbers are those of the optimiser step, no weight changes, killed runs record the same."""

import math
from dataclasses import replace
from functools import partial

import examples
import pandas as pd
import pytest
import torch
from examples import STEPS
from killed import Killed, die_before_step

from kvshot_lib.training import loop
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.config import TrainConfig
from kvshot_lib.training.loop import train
from kvshot_lib.training.loss import ttt_loss
from kvshot_lib.training.record import (
    adam_step,
    few_anchors,
    gate_rows,
    gradient_norms,
    matrices,
    matrix_rows,
    recorded,
    recorded_gradients,
)

SHORT = TrainConfig(epochs=2, batch_documents=2, ttt_steps=3, anchor_fraction=0.5, checkpoint_every_s=1e9, seed=1)


def loss(drafter, **given):
    return ttt_loss(drafter, examples.features(), ttt_steps=STEPS, **given).loss


def trained(folder, variant, config=SHORT):
    """Weights after a short training, and what it recorded."""
    drafter = examples.drafter(variant)
    train(drafter, examples.live(), examples.live(), config, folder)
    return drafter.state_dict(), recorded_gradients(folder / "checkpoint.pt", variant, 1)


def test_the_first_step_and_every_tenth_of_a_training_are_recorded():
    def steps(total):
        return [step for step in range(1, total + 1) if recorded(step, total)]

    assert steps(7) == list(range(1, 8))
    assert steps(430) == [1, *range(43, 431, 43)]
    assert steps(1300)[:4] == [1, 44, 87, 130] and len(steps(1300)) == 31  # thirty, and the first
    assert len(steps(100_000)) == 41


@pytest.mark.parametrize("variant", ["kv_2", "hybrid"])
def test_weights_are_the_same_bits_with_and_without_recording(tmp_path, monkeypatch, variant):
    weights, table = trained(tmp_path / "with", variant)
    assert set(table["step"]) == set(range(1, 7))
    monkeypatch.setattr(loop, "recorded", lambda *_: False)
    others, nothing = trained(tmp_path / "without", variant)
    assert nothing is None and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_killed_run_records_what_an_undisturbed_one_does(tmp_path, monkeypatch):
    _, wanted = trained(tmp_path / "undisturbed", "hybrid")
    with monkeypatch.context() as patched:
        die_before_step(patched, 4)
        with pytest.raises(Killed):
            trained(tmp_path / "killed", "hybrid", replace(SHORT, checkpoint_every_s=0.0))
    pd.testing.assert_frame_equal(trained(tmp_path / "killed", "hybrid")[1], wanted, check_exact=True)


def test_a_checkpoint_from_before_there_was_a_record_goes_on(tmp_path):
    trained(tmp_path, "hidden")
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path)
    del state["progress"]["gradients"]
    torch.save(state, path)
    assert recorded_gradients(path, "hidden", 1) is None
    history = train(examples.drafter("hidden"), examples.live(), examples.live(), SHORT, tmp_path)
    assert history.equals(pd.DataFrame(state["progress"]["history"]))


def test_every_parameter_is_in_one_matrix_and_norms_are_those_of_its_gradient():
    for variant in ("hidden", "hybrid", "kv_2_mlp", "states_2", "cross_only"):
        drafter = examples.drafter(variant)
        loss(drafter).backward()
        grouped = matrices(drafter)
        assert sorted(id(p) for own in grouped.values() for p in own) == sorted(map(id, drafter.parameters()))
        norms = gradient_norms(drafter)
        for key, own in grouped.items():
            naive = math.sqrt(sum(float((p.grad**2).sum()) for p in own))
            assert norms[key] == pytest.approx(naive, rel=1e-5), key
    named = matrices(drafter := examples.drafter("hybrid"))
    attention = drafter.layers[0]
    assert named[0, "self", "k_proj"][0] is attention.attention.k_proj.weight
    assert named[0, "cross", "k_proj"][0] is attention.cross.k_proj.weight
    assert named[0, "cross", "fusion.values"][0] is attention.fusion.values.weight


def test_the_effective_step_is_what_moved_the_weights():
    """Without weight decay a parameter changes by just that, and a gradient 50 times as large changes nothing."""
    moved = {}
    for scale in (1.0, 50.0):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))
        optimiser = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True)
        for step in range(5):
            before = weight.detach().clone()
            weight.grad = scale * torch.sin(torch.arange(6.0, dtype=torch.float64) + step).view(2, 3)
            optimiser.step()
            moved[scale, step] = before - weight.detach()
            torch.testing.assert_close(adam_step(optimiser, weight), moved[scale, step], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(moved[1.0, 4], moved[50.0, 4], rtol=1e-8, atol=1e-10)


def test_rows_tell_the_step_of_a_whole_drafter():
    drafter = examples.drafter("kv_1")
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    before = {key: [p.detach().clone() for p in own] for key, own in matrices(drafter).items()}
    loss(drafter).backward()
    norms = gradient_norms(drafter)
    optimiser.step()
    rows = matrix_rows(drafter, optimiser, norms)
    found = {(*(row[c] for c in ("layer", "branch", "matrix")), row["quantity"]): row["value"] for row in rows}
    for key, own in matrices(drafter).items():
        change = math.sqrt(sum(float(((p.detach() - b) ** 2).sum()) for p, b in zip(own, before[key], strict=True)))
        assert found[(*key, "adam_step_norm")] == pytest.approx(change, rel=2e-3)
        assert found[(*key, "grad_norm")] == norms[key]


def test_the_gate_is_that_of_every_draft_step():
    """sigmoid(ln 1/3) = 1/4."""
    drafter = examples.drafter("hybrid")
    layer = drafter.layers[0]
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(math.log(1 / 3))
    gates = pd.DataFrame(gate_rows(drafter, examples.live(), STEPS))
    assert gates["value"].tolist() == pytest.approx([0.25] * len(gates))
    assert sorted(set(gates["draft_step"])) == list(range(STEPS)) and "mix" not in vars(layer)
    assert gate_rows(examples.drafter("hidden"), examples.live(), STEPS) == []


def test_the_gate_of_a_document_does_not_depend_on_the_others():
    drafter = examples.drafter("hybrid")
    alone = pd.DataFrame(gate_rows(drafter, examples.live_of(examples.DOCUMENTS[1]), STEPS))
    together = pd.DataFrame(gate_rows(drafter, examples.live_of(*examples.DOCUMENTS[:2]), STEPS))
    second = together[together["document"] == 1].reset_index(drop=True).assign(document=0)
    pd.testing.assert_frame_equal(second, alone, rtol=1e-4)


def test_few_anchors_are_every_eighth_of_those_with_all_steps():
    mask = torch.tensor([[0] * 3 + [1] * 40, [0] * 3 + [1] * 12 + [0] * 28]).bool()
    found = few_anchors(find_anchors(mask, 3))
    assert found.index[0].tolist() == [2, 10, 18, 26] and found.valid[0].all()
    assert found.index[1].tolist() == [2, 10, 0, 0] and found.valid[1, :, 0].tolist() == [True, True, False, False]


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of PyTorch
def test_compiled_steps_are_recorded_alike(monkeypatch):
    """With torch.compile's tracing (not its code generator, which takes minutes): it ignores hooks on modules."""
    compiled, plain = examples.drafter("hybrid"), examples.drafter("hybrid")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled.compile_steps()
    found = []
    for drafter in (plain, compiled):
        ttt_loss(drafter, examples.features(), ttt_steps=2).loss.backward()  # traced before anything is watched
        found.append(pd.DataFrame(gate_rows(drafter, examples.live(), STEPS)))
    pd.testing.assert_frame_equal(found[1], found[0], rtol=1e-4)
    assert len(found[0]) >= STEPS and (found[0]["value"] > 0).all()
