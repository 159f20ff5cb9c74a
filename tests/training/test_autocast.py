"""Every kind of drafter computes in bfloat16 under autocast, as trainings on a GPU do, and comes to about the float32 loss."""

import pytest
import torch
from examples import DOCUMENTS, DRAFT_IDS, VARIANTS, target

from kvshot_lib.drafters.context import drafter_spec
from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.training.loss import ttt_loss


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_in_bfloat16_gives_about_the_loss_of_float32(name):
    model, config = target(), VARIANTS[name]
    spec = drafter_spec(config, model)
    drafter = build_drafter(config, model, spec, DRAFT_IDS)
    live = LiveFeatures(model, DOCUMENTS, spec)
    features = live.batch(range(len(DOCUMENTS)), (*drafter.reads, "final_hidden", "target_argmax"))
    exact = ttt_loss(drafter, features).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        result = ttt_loss(drafter, features.to("cpu", torch.bfloat16))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in drafter.parameters())
