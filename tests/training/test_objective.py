"""The cures for the hybrid's cross branch: each alone changes what it says, and by default nothing."""

from dataclasses import replace

import examples
import pytest
import torch
from examples import DRAFT_IDS, STEPS

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.training import loop as training
from kvshot_lib.training.judging import match_documents
from kvshot_lib.training.loop import TrainConfig, batches, learning_rate, train
from kvshot_lib.training.objective import branch_parameters, draw_lags, training_loss
from kvshot_lib.training.ttt import draft_steps, find_anchors, ttt_loss

SHORT = TrainConfig(epochs=3, batch_documents=2, ttt_steps=3, anchor_fraction=0.5, validate_every=0, learning_rate=3e-3)
BRANCH = ("layers.0.cross.", "layers.0.fusion.")


def build(**options):
    config = DrafterConfig(**{"paradigm": "hybrid", **options})
    return examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))


def weights_of(drafter):
    return {name: p.detach().clone() for name, p in drafter.named_parameters()}


def logits_of(drafter, features, **options):
    with torch.no_grad():
        steps = draft_steps(drafter, features, find_anchors(features.answer_mask, STEPS), STEPS, **options)
        return torch.stack([drafter.norm(output) @ drafter.head.T for *_, output in steps], 2)


def gradients(drafter, loss):
    drafter.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in drafter.named_parameters()}


def same(one: dict, other: dict) -> set[str]:
    return {name for name in one if torch.equal(one[name], other[name])}


def test_by_default_training_is_plain_ttt_to_the_last_bit(tmp_path):
    """Against a loop that knows of no cure: one AdamW group, `ttt_loss`, and the schedule."""
    drafter, source = build(), examples.live()
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step, indices in enumerate(batches(source.lengths, SHORT, 0, 9)):
        generator = torch.Generator().manual_seed(step)
        ttt_loss(drafter, source.batch(indices), ttt_steps=3, anchor_fraction=0.5, generator=generator).loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = learning_rate(SHORT, step, 9)
        optimiser.step()
        optimiser.zero_grad()
    trained = build()
    train(trained, source, source, SHORT, tmp_path)
    assert len(same(weights_of(trained), weights_of(drafter))) == len(weights_of(drafter))


# Gate floor


def test_a_gate_floor_of_zero_changes_nothing_and_one_of_a_half_halves_what_is_left():
    plain, floored, features = build(), build(gate_floor=0.5), examples.features()
    layer, generator = plain.layers[0], torch.Generator().manual_seed(0)
    inputs, own, cross = (torch.randn(1, 4, width, generator=generator) for width in (128, 64, 64))
    gate = torch.sigmoid(layer.gate(inputs))
    assert torch.equal(layer.mix(inputs, own, cross), own + gate * (cross - own))
    expected = own + (0.5 + 0.5 * gate) * (cross - own)
    assert torch.allclose(floored.layers[0].mix(inputs, own, cross), expected, atol=1e-6)
    with torch.no_grad():
        for drafter in (plain, floored):
            drafter.layers[0].gate.bias.fill_(-1e4)  # shut, as far as it goes
    assert torch.equal(plain.layers[0].mix(inputs, own, cross), own)
    assert torch.allclose(floored.layers[0].mix(inputs, own, cross), (own + cross) / 2, atol=1e-6)
    for drafter, starves in ((plain, True), (floored, False)):
        found = gradients(drafter, ttt_loss(drafter, features).loss)
        assert all(found[name].any() != starves for name in found if name.startswith(BRANCH))


# The branch first


def test_while_the_branch_warms_up_the_hybrid_is_its_cross_only_twin():
    drafter, twin, features = build(), build(cross_only=True), examples.features()
    twin.load_state_dict({n: t for n, t in drafter.state_dict().items() if n in twin.state_dict()})
    assert torch.equal(logits_of(drafter, features, cross_alone=True), logits_of(twin, features))
    assert not torch.allclose(logits_of(drafter, features), logits_of(twin, features), atol=0.1)
    config = replace(SHORT, branch_warmup_steps=2)
    at = lambda built, given, step: training_loss(built, features, given, step, torch.Generator().manual_seed(0)).loss
    assert at(drafter, config, 1) == at(twin, SHORT, 1) and at(drafter, config, 2) == at(drafter, SHORT, 2)


def test_the_self_branch_and_the_gate_wait_for_the_warm_up_to_end(tmp_path):
    drafter = build()
    start, source = weights_of(drafter), examples.live()
    waiting = {n for n in start if n.startswith(("layers.0.attention.", "layers.0.gate."))}
    steps = []
    one_step = training._train_step

    def watched(*given):
        one_step(*given)
        steps.append(same(weights_of(drafter), start))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "_train_step", watched)
        train(drafter, source, source, replace(SHORT, branch_warmup_steps=4), tmp_path)
    assert len(waiting) == 6 and steps[:4] == [waiting] * 4 and steps[4:] == [set()] * 5
    with pytest.raises(StudyError, match="branch_warmup_steps=9 must be below the 9 optimiser steps"):
        train(build(), source, source, replace(SHORT, branch_warmup_steps=9), tmp_path / "other")


ALL_CURES = replace(
    SHORT, branch_warmup_steps=4, branch_loss_weight=0.5, branch_learning_rate_scale=3.0, kv_lag_augment_tokens=3
)  # fmt: skip


@pytest.mark.parametrize("killed", [2, 4, 7])
def test_with_every_cure_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, killed):
    class Killed(BaseException):
        pass

    def run(folder, config=ALL_CURES):
        drafter = build(gate_floor=0.2, kv_init="target")
        history = train(drafter, examples.live(), examples.live(), config, folder)
        return weights_of(drafter), history.drop(columns="seconds")

    weights, history = run(tmp_path / "whole")
    one_step = training._train_step
    with monkeypatch.context() as patched:

        def killing(*given):
            if given[5].step == killed:
                raise Killed
            one_step(*given)

        patched.setattr(training, "_train_step", killing)
        with pytest.raises(Killed):
            run(tmp_path / "killed", replace(ALL_CURES, checkpoint_every_s=0.0))
    again, same_history = run(tmp_path / "killed")
    assert len(same(again, weights)) == len(weights) and same_history.equals(history)


# Auxiliary loss, learning rate


def test_the_auxiliary_loss_is_the_branchs_own_on_the_same_kind_of_chain():
    drafter, features = build(), examples.features()
    config = replace(SHORT, branch_loss_weight=0.25, anchor_fraction=1.0)
    result = training_loss(drafter, features, config, 0, torch.Generator())
    found = gradients(drafter, result.loss)
    whole, branch = (ttt_loss(drafter, features, ttt_steps=3, cross_alone=alone) for alone in (False, True))
    assert result.loss.item() == pytest.approx(whole.loss.item() + 0.25 * branch.loss.item())
    assert torch.equal(result.step_loss, whole.step_loss)
    parts = [gradients(drafter, part.loss) for part in (whole, branch)]
    for name, gradient in found.items():
        assert torch.allclose(gradient, parts[0][name] + 0.25 * parts[1][name], atol=1e-5)
    assert not any(parts[1][n].any() for n in found if n.startswith(("layers.0.attention.", "layers.0.gate.")))
    assert all(parts[1][n].any() for n in found if n.startswith(BRANCH))


def test_the_branch_learns_at_its_own_rate(tmp_path):
    """Adam's first step is the learning rate times the gradient's sign: three times as far for the branch."""
    far, source = {}, examples.live()
    for scale in (1.0, 3.0):
        drafter = build()
        start = weights_of(drafter)
        config = replace(SHORT, branch_learning_rate_scale=scale, weight_decay=0.0, max_steps=1, learning_rate=1e-3)
        history = train(drafter, source, source, config, tmp_path / str(scale))
        far[scale] = {n: (p - start[n]).abs().max().item() for n, p in weights_of(drafter).items()}
        assert history["learning_rate"].unique().tolist() == [1e-3]
    branch = {n for n, p in drafter.named_parameters() if any(p is q for q in branch_parameters(drafter))}
    assert branch == {n for n in far[1.0] if n.startswith(BRANCH)} and len(branch) == 6
    for name, distance in far[1.0].items():
        assert far[3.0][name] == pytest.approx(distance * (3 if name in branch else 1), rel=1e-2)


# Lagged KV


def test_a_lag_of_two_is_what_the_lagged_control_sees():
    features = examples.features()
    config = DrafterConfig("kv", 2, kv_control="lagged", kv_lag_tokens=2)
    lagged = examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))
    lag = torch.full((len(features.tokens),), 2)
    assert torch.equal(logits_of(examples.drafter("kv_2"), features, kv_lag=lag), logits_of(lagged, features))


@pytest.mark.parametrize("name", ["keys", "hidden_states"])
def test_a_lag_hides_new_kv_from_a_hybrid_and_no_hidden_state(name):
    drafter, features, lag = build(), examples.features(documents=(0, 1), length=12), torch.tensor([0, 3])
    anchors = find_anchors(features.answer_mask, 1)
    last = int(anchors.index[1][anchors.valid[1, :, 0]].max())
    state = getattr(features, name).clone()
    state[:, last - 2 : last + 1] += 1
    before, after = (logits_of(drafter, part, kv_lag=lag) for part in (features, replace(features, **{name: state})))
    row = int((anchors.index[1] == last).nonzero()[-1])
    assert torch.equal(before[1, row], after[1, row]) == (name == "keys")
    assert not torch.equal(before[0], after[0])


def test_lags_are_drawn_for_each_document_evenly_and_in_training_alone(tmp_path):
    assert draw_lags(4, 0, None, "cpu") is None  # nothing is drawn: the anchors stay those of before
    drawn = torch.cat([draw_lags(50, 4, torch.Generator().manual_seed(seed), "cpu") for seed in range(40)])
    shares = drawn.bincount(minlength=5) / 2000
    assert len(shares) == 5 and (shares - 0.2).abs().max() < 0.05
    source, config = examples.live(), replace(SHORT, kv_lag_augment_tokens=4)
    with pytest.MonkeyPatch.context() as patched:
        seen, loss = [], training.training_loss
        patched.setattr(
            training, "training_loss", lambda *given: seen.append(given[2].kv_lag_augment_tokens) or loss(*given)
        )
        drafter = examples.drafter("kv_2")
        history = train(drafter, source, source, config, tmp_path)
    assert seen == [4] * 9
    right, total = 0, 0
    for match, valid in match_documents(source, drafter, 3):
        right, total = right + match[:, 0].sum(), total + valid[:, 0].sum()
    last = history[(history["split"] == "validation") & (history["draft_step"] == 0)]["acceptance"].iloc[-1]
    assert last == pytest.approx(right / total)


# Draft-side keys and values started from the target's projections


@pytest.mark.parametrize("fusion", ["linear", "heads"])
def test_a_draft_entry_starts_as_what_the_fusion_makes_of_the_targets_own(fusion):
    """Layer 0 of the target reads the embedding, as the drafter does: there the entry of token x_s is that of the prefix at s."""
    target, rope = examples.target(), "unrotate" if fusion == "linear" else "raw"
    source = LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, [0]))
    config = DrafterConfig("kv", kv_layers=1, kv_fusion=fusion, kv_rope=rope, kv_init="target")
    drafter, features = build_drafter(config, target, source.spec, DRAFT_IDS), source.batch([0, 4])
    layer, last = drafter.layers[0], features.tokens.shape[1] - 1
    with torch.no_grad():
        prefix = drafter.prefix(features)[0][0]["cross"]
        embedded = drafter.embed(features.tokens[:, :last])
        rotary = drafter.rotary(embedded, torch.arange(last)[None])
        own = layer.attention.project(layer.attention_norm(embedded), rotary, "k", "v")
    for ours, theirs in zip(own, prefix, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("options", [{"paradigm": "kv", "num_layers": 2}, {}, {"paradigm": "block", "num_layers": 2}])
def test_nothing_else_starts_differently(options):
    spec = examples.live().spec
    random, started = (
        build_drafter(
            DrafterConfig(**{"paradigm": "hybrid", **options, "kv_init": init}), examples.target(), spec, DRAFT_IDS
        )
        for init in ("random", "target")
    )
    differ = {name for name, p in random.named_parameters() if not torch.equal(p, started.state_dict()[name])}
    part = "attention" if options else "cross"
    assert differ == {f"layers.{i}.{part}.{name}_proj.weight" for i in range(len(random.layers)) for name in "kv"}
    if not options:  # reads [embedding; state]: the state's half starts at zero, and learns
        own = started.layers[0].cross.k_proj.weight
        assert own[:, :64].any() and not own[:, 64:].any()
        assert gradients(started, ttt_loss(started, examples.features()).loss)["layers.0.cross.k_proj.weight"][
            :, 64:
        ].any()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_floor": 1.0}, "gate_floor=1.0 must be 0 or more and below 1"),
        ({"gate_floor": -0.1}, "gate_floor=-0.1 must be 0 or more"),
        ({"gate_floor": 0.1, "cross_only": True}, "cross_only=True contradicts gate_floor=0.1"),
        ({"gate_floor": 0.1, "paradigm": "kv"}, "gate_floor=0.1 means nothing to a kv drafter"),
        ({"kv_init": "targets"}, "kv_init='targets' is not known; choose from 'random', 'target'"),
        ({"kv_init": "target", "paradigm": "hidden"}, "kv_init='target' means nothing to a hidden drafter"),
        ({"kv_init": "target", "kv_fusion": "mlp"}, "kv_init='target' contradicts kv_fusion='mlp'"),
        ({"kv_init": "target", "paradigm": "kv", "kv_control": "from_hidden"}, "contradicts kv_control='from_hidden'"),
        (
            {"kv_init": "target", "paradigm": "block", "block_context": "hidden"},
            "block_context='hidden' contradicts kv_init='target'",
        ),
    ],
)
def test_drafters_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(StudyError, match=message):
        DrafterConfig(**{"paradigm": "hybrid", **options})


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("hidden", {"branch_warmup_steps": 2}, "branch_warmup_steps=2 needs a hybrid with both branches"),
        ("kv_2", {"branch_loss_weight": 0.5}, "branch_loss_weight=0.5 needs a hybrid with both branches"),
        ("cross_only", {"branch_learning_rate_scale": 3.0}, "branch_learning_rate_scale=3.0 needs a hybrid with both"),
        (
            "hidden",
            {"kv_lag_augment_tokens": 4},
            "kv_lag_augment_tokens=4 needs a kv or hybrid drafter over the target",
        ),
        ("kv_2_lagged", {"kv_lag_augment_tokens": 4}, "not paradigm='kv' with kv_control='lagged'"),
    ],
)
def test_trainings_that_a_drafter_cannot_have_are_refused(tmp_path, variant, options, message):
    with pytest.raises(StudyError, match=message):
        train(examples.drafter(variant), examples.live(), examples.live(), replace(SHORT, **options), tmp_path)


@pytest.mark.parametrize("name", ["branch_warmup_steps", "branch_loss_weight", "kv_lag_augment_tokens"])
def test_bad_values_are_refused_by_name(name):
    with pytest.raises(StudyError, match=f"{name}=-1 must be 0 or more"):
        TrainConfig(**{name: -1})
    with pytest.raises(StudyError, match="branch_learning_rate_scale=0 must be above 0"):
        TrainConfig(branch_learning_rate_scale=0)
