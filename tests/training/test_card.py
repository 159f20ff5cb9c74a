"""A card trains as the processor does: the same state of the target, the same gradients, the same losses."""

import sys
from dataclasses import replace

import pytest
import torch
from blocks import BLOCKS
from examples import DOCUMENTS, DRAFT_IDS, VARIANTS, roughened

from kvshot_lib.drafters.context import drafter_spec
from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.resident import ResidentFeatures
from kvshot_lib.target.load import load_target
from kvshot_lib.training.config import TrainConfig, batches
from kvshot_lib.training.loop import Training, train
from kvshot_lib.training.loss import ttt_loss

pytestmark = pytest.mark.gpu
CONFIG = TrainConfig(epochs=4, batch_documents=3, anchor_fraction=0.5, validate_every=4, learning_rate=1e-3)
DEVICES = ("cuda", "cpu")
MADE = ("hidden", "hidden_31_3", "kv_2", "kv_2_normed", "hybrid", "states_2", "block_kv_2")


def parts(device, variant, name="tiny-qwen3"):
    """A drafter with the same weights everywhere, and the documents' features."""
    target, config = load_target(name, device=device, dtype="float32"), (VARIANTS | BLOCKS)[variant]
    spec = drafter_spec(config, target)
    built = roughened(build_drafter(config, target, spec, DRAFT_IDS, seed=1).cpu()).to(device)
    return built, LiveFeatures(target, DOCUMENTS, spec)


def losses(device, variant, folder, dtype=torch.float32, compiled=False):
    """Of eight steps, by report and draft step."""
    built, source = parts(device, variant)
    history = train(built.compile_steps() if compiled else built, source, source, CONFIG, folder / device, dtype=dtype)
    return history["loss"].dropna().to_numpy()


def close(found, wanted, tolerance):
    """By the largest value there is."""
    return float((found.cpu() - wanted.cpu()).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", MADE)
def test_gradients_are_the_processors(variant, compiled):
    if compiled and variant not in ("hidden", "kv_2"):
        pytest.skip("compiling takes half a minute")
    results = []
    for device in DEVICES:
        built, source = parts(device, variant)
        if compiled and device == "cuda":
            built.compile_steps()
        loss = ttt_loss(built, source.batch(range(len(DOCUMENTS))).to(device))
        loss.loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in built.named_parameters()}))
    (loss, found), (exact, wanted) = results
    assert loss.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4)
    assert loss.matches.tolist() == exact.matches.tolist()
    assert not [n for n in wanted if wanted[n] is not None and not close(found[n], wanted[n], 1e-3)]


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "block_kv_2"])
def test_eight_steps_have_the_processors_losses(variant, tmp_path):
    found, wanted = (losses(device, variant, tmp_path) for device in DEVICES)
    assert found == pytest.approx(wanted, rel=5e-3)


@pytest.mark.parametrize("variant", ["hidden", "kv_2"])
def test_recorded_steps_learn_as_others_do(variant, tmp_path, monkeypatch):
    """The compiled drafter's steps are CUDA graphs. Anchors are all taken: padded batches draw others."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", replace(CONFIG, anchor_fraction=1.0))
    found, wanted = losses("cuda", variant, tmp_path / "graphs", compiled=True), losses("cuda", variant, tmp_path)
    assert found == pytest.approx(wanted, rel=5e-3)


def test_recorded_steps_never_wait_for_the_card(tmp_path):
    """The first compile, the second record."""
    built, source = parts("cuda", "kv_2")
    resident = ResidentFeatures(source, "cuda")
    config = replace(CONFIG, batch_documents=8, epochs=40)  # step 3 is none of those that record gradients
    one = Training(built.compile_steps(), resident, resident, config, tmp_path, torch.float32)
    for number, indices in zip(range(3), batches(source.lengths, config, 0, one.total)):
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            one.step(indices)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    one.check()


def test_bfloat16_trains_about_as_well(tmp_path):
    assert losses("cuda", "hidden", tmp_path, torch.bfloat16) == pytest.approx(
        losses("cpu", "hidden", tmp_path), rel=0.05
    )


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3"])
def test_captured_state_is_the_processors(name):
    found, wanted = (parts(device, "both_2", name)[1].batch(range(len(DOCUMENTS))) for device in DEVICES)
    for field in ("hidden_states", "keys", "values", "final_hidden"):
        assert close(getattr(found, field), getattr(wanted, field), 1e-4)
    assert torch.equal(found.target_argmax.cpu()[wanted.answer_mask], wanted.target_argmax[wanted.answer_mask])
