"""Training: a killed run resumes to the same bits, equal seeds give equal tables, a lost loss is told."""

import math
from dataclasses import replace
from functools import cache

import examples
import pandas as pd
import pytest
import torch
from examples import DRAFT_IDS, VARIANTS
from killed import Killed, count_steps, die_before_step

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.resident import ResidentFeatures
from kvshot_lib.metrics.acceptance import count_document
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.training import loop as training
from kvshot_lib.training.config import TrainConfig, batches, learning_rate
from kvshot_lib.training.judging import match_documents
from kvshot_lib.training.loop import Training, branch_parameters, train
from kvshot_lib.training.loss import draw_lags, ttt_loss

SHORT = TrainConfig(
    epochs=3,
    batch_documents=2,
    ttt_steps=3,
    anchor_fraction=0.5,
    validate_every=4,
    checkpoint_every_s=1e9,
    learning_rate=3e-3,
)  # 5 documents: 3 steps a pass, 9 in all

OFTEN = replace(SHORT, checkpoint_every_s=0.0)  # a checkpoint after every step


def run(folder, config=SHORT, variant="hidden", source=None, dtype=torch.float32):
    """Train a fresh drafter; returns its weights and the history without the clock."""
    drafter, source = examples.drafter(variant), source or examples.live()
    history = train(drafter, source, source, config, folder, dtype=dtype)
    return {n: t.clone() for n, t in drafter.state_dict().items()}, history.drop(columns="seconds")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What `run` gives without a kill, by variant; each is trained once."""
    return cache(lambda variant="hidden": run(tmp_path_factory.mktemp("run"), variant=variant))


def assert_same(found, wanted):
    assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])
    pd.testing.assert_frame_equal(found[1], wanted[1], check_exact=True)


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
@pytest.mark.parametrize(("killed", "saved"), [(2, 0), (4, 4), (5, 5), (8, 6)])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, undisturbed, variant, killed, saved):
    """Killed before any checkpoint, right after one (with a report, and between two), and two steps after one."""
    with monkeypatch.context() as patched:
        die_before_step(patched, killed, saved)
        with pytest.raises(Killed):
            run(tmp_path / "killed", OFTEN, variant)
    assert (tmp_path / "killed" / "checkpoint.pt").exists() == (saved > 0)
    wanted, steps = undisturbed(variant), count_steps(monkeypatch)
    assert_same(run(tmp_path / "killed", variant=variant), wanted)
    assert steps == list(range(saved, 9))


def test_a_run_in_bfloat16_resumes_to_the_same_bits(tmp_path, monkeypatch):
    wanted = run(tmp_path / "undisturbed", dtype=torch.bfloat16)
    with monkeypatch.context() as patched:
        die_before_step(patched, 5, 4)
        with pytest.raises(Killed):
            run(tmp_path / "killed", OFTEN, dtype=torch.bfloat16)
    assert_same(run(tmp_path / "killed", dtype=torch.bfloat16), wanted)


def test_a_finished_run_is_not_trained_further(tmp_path, monkeypatch):
    first = run(tmp_path)
    steps = count_steps(monkeypatch)
    assert_same(run(tmp_path), first)
    assert steps == []


def test_equal_seeds_give_equal_tables_and_others_do_not(tmp_path, undisturbed):
    first = run(tmp_path / "a")
    assert_same(undisturbed(), first)
    other = run(tmp_path / "c", replace(SHORT, seed=1))
    assert not other[1]["loss"].equals(first[1]["loss"])


def test_ambient_randomness_changes_nothing(tmp_path):
    torch.manual_seed(1)
    first = run(tmp_path / "a")
    torch.manual_seed(2)
    assert_same(run(tmp_path / "b"), first)


def test_checkpoints_are_written_as_often_as_asked_for(tmp_path, monkeypatch):
    saved, save = [], Training.save
    monkeypatch.setattr(Training, "save", lambda own: saved.append(own.progress.step) or save(own))
    run(tmp_path / "a", OFTEN)
    run(tmp_path / "b", SHORT)
    assert saved == [*range(1, 10), 9]


def test_a_training_run_changes_no_weight_of_the_target(tmp_path):
    target = examples.target()
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    for variant in ("hidden", "kv_2", "hybrid"):
        drafter = examples.drafter(variant)
        frozen = drafter.embedding.clone(), drafter.head.clone()
        start = {name: p.clone() for name, p in drafter.named_parameters()}
        train(drafter, examples.live(), examples.live(), SHORT, tmp_path / variant)
        assert torch.equal(drafter.embedding, frozen[0]) and torch.equal(drafter.head, frozen[1])
        assert all(not torch.equal(p, start[name]) for name, p in drafter.named_parameters()), "a weight did not learn"
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in target.model.parameters())


def test_history_tells_what_was_trained(tmp_path):
    _, history = run(tmp_path)
    assert history["step"].unique().tolist() == [4, 8, 9]
    assert history.groupby(["step", "split"])["draft_step"].apply(list).tolist() == [[0, 1, 2]] * 6
    last = history[history["step"] == 9]
    assert (last["trained_tokens"] == 3 * sum(examples.live().lengths)).all()
    measured = history["acceptance"].dropna()  # a window may hold no pair of a late step
    assert len(measured) > 12 and measured.between(0, 1).all()
    assert history.loc[history["split"] == "train", "loss"].between(0, 20).all()


# What goes wrong


class Broken:
    """A source whose target state is NaN at one call of `batch`."""

    def __init__(self, source, call):
        self.source, self.left = source, call
        self.lengths, self.documents_hash = source.lengths, source.documents_hash

    def __len__(self):
        return len(self.source)

    def batch(self, indices, state):
        self.left -= 1
        batch = self.source.batch(indices, state)
        return replace(batch, hidden_states=batch.hidden_states * math.nan) if self.left == 0 else batch


def test_a_loss_that_is_not_finite_is_told_and_the_checkpoint_kept(tmp_path, undisturbed):
    """Training step 3 is the third call: nothing is validated before step 4."""
    with pytest.raises(
        StudyError, match="not finite at optimiser step 3; the last good checkpoint is .*lower learning_rate"
    ):
        run(tmp_path, OFTEN, source=Broken(examples.live(), 3))
    assert torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] == 2
    assert_same(run(tmp_path), undisturbed())
    with pytest.raises(StudyError, match="not finite at optimiser step 1; no checkpoint was written before; try"):
        run(tmp_path / "first", source=Broken(examples.live(), 1))


@pytest.mark.parametrize("call", [3, 4])
def test_what_is_found_late_has_changed_no_weight(tmp_path, call):
    """Nothing is saved or reported before the ninth step, so nobody looks; a later finite step changes none either."""
    drafter, source = examples.drafter("hidden"), Broken(examples.live(), call)
    with pytest.raises(StudyError, match=f"loss or gradient are not finite at optimiser step {call}; no checkpoint"):
        train(drafter, source, source, replace(SHORT, validate_every=0), tmp_path)
    assert source.left == call - 9 and not (tmp_path / "checkpoint.pt").exists()
    right = Training(examples.drafter("hidden"), source, source, SHORT, tmp_path, torch.float32)
    for indices in batches(source.lengths, SHORT, 0, call - 1):
        right.step(indices)
    assert len(same(weights_of(drafter), weights_of(right.drafter))) == len(weights_of(drafter))


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
def test_a_gradient_that_is_not_finite_stops_before_it_touches_a_weight_or_a_file(tmp_path, variant):
    """A finite loss, and one gradient that is NaN from the third step on."""
    drafter, seen = examples.drafter(variant), []

    def broken(gradient):
        seen.append(weights_of(drafter))
        return gradient * math.nan if len(seen) > 2 else gradient

    drafter.norm.weight.register_hook(broken)
    with pytest.raises(
        StudyError, match="loss or gradient are not finite at optimiser step 3; the last good checkpoint is"
    ):
        train(drafter, examples.live(), examples.live(), OFTEN, tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt")
    assert kept["progress"]["step"] == 2 and len(seen) == 3
    assert len(same(weights_of(drafter), seen[2])) == len(seen[2]), "a weight moved"
    assert all(torch.equal(kept["drafter"][name], tensor) for name, tensor in seen[2].items())
    states = [tensor for own in kept["optimiser"]["state"].values() for tensor in own.values()]
    assert all(tensor.isfinite().all() for tensor in states)


def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def overflowing(optimiser, *given):
        step(optimiser, *given)
        if (number := optimiser.state[first := optimiser.param_groups[0]["params"][0]]["step"]) == 2:
            first.data.fill_(math.inf)
        return number

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(StudyError, match="weights are not finite at optimiser step 2; the last good checkpoint is"):
        run(tmp_path, OFTEN)
    assert torch.load(tmp_path / "checkpoint.pt")["progress"]["step"] == 1


def test_a_checkpoint_that_holds_a_nan_is_refused(tmp_path):
    """One of older code, finished or not: nothing is made of it."""
    run(tmp_path)
    state = torch.load(path := tmp_path / "checkpoint.pt")
    state["drafter"]["norm.weight"][0] = math.nan
    torch.save(state, path)
    with pytest.raises(StudyError, match="holds weights that are not finite; delete it to train from the start"):
        run(tmp_path)


def test_half_precision_without_bfloat16s_range_is_refused(tmp_path):
    with pytest.raises(StudyError, match="dtype=torch.float16 is not trained in"):
        train(examples.drafter("hidden"), examples.live(), examples.live(), SHORT, tmp_path, dtype=torch.float16)


def other_set_ups():
    other_documents = examples.live_of(*examples.DOCUMENTS[:4], examples.document("011111111111111", seed=8))
    return {
        "learning_rate": {"config": replace(SHORT, learning_rate=1e-4)},
        "epochs": {"config": replace(SHORT, epochs=4)},
        "seed": {"config": replace(SHORT, seed=1)},
        "training_documents": {"source": other_documents},
        "dtype": {"dtype": torch.bfloat16},
        "feedback": {"variant": "hidden_post_norm"},
    }


@pytest.mark.parametrize("differs", other_set_ups())
def test_a_checkpoint_of_another_set_up_is_refused_by_name(tmp_path, monkeypatch, differs):
    with monkeypatch.context() as patched:
        die_before_step(patched, 2, 1)
        with pytest.raises(Killed):
            run(tmp_path, OFTEN)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        StudyError, match=rf"belongs to another run \(differs in {differs}\); delete it or choose another"
    ):
        run(tmp_path, **other_set_ups()[differs])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_vocabulary_or_start_is_refused(tmp_path):
    source = examples.live()
    train(examples.drafter("hidden"), source, source, replace(SHORT, max_steps=1), tmp_path)
    for differs, other in {
        "draft_vocabulary": examples.drafter("hidden", draft_ids=(examples.DRAFT_IDS + 1) % 512),
        "starting_weights": build_drafter(
            VARIANTS["hidden"], examples.target(), source.spec, examples.DRAFT_IDS, seed=5
        ),
    }.items():
        with pytest.raises(StudyError, match=rf"\(differs in {differs}\)"):
            train(other, source, source, replace(SHORT, max_steps=1), tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(StudyError, match="can't be read .*; delete it to train from the start"):
        run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
def test_every_paradigm_learns_four_documents_by_heart(tmp_path, variant):
    target = examples.target()
    live = LiveFeatures(target, load_corpus("tiny", "train").documents[:4], examples.live().spec)
    source = ResidentFeatures(live, "cpu")  # the target's forward once, not at each of 250 steps
    drafter = build_drafter(VARIANTS[variant], target, source.spec, torch.arange(512))
    config = TrainConfig(
        epochs=250,
        batch_documents=4,
        learning_rate=1e-2,
        clip_norm=5.0,
        ttt_steps=2,
        anchor_fraction=1.0,
        validate_every=0,
    )
    train(drafter, source, source, config, tmp_path)
    counts = sum(count_document(*document)[0] for document in match_documents(source, drafter, 2))
    assert (counts[:, 1] / counts[:, 0] > 0.95).all(), counts


# The cures for a hybrid's cross branch

CURED = TrainConfig(epochs=3, batch_documents=2, ttt_steps=3, anchor_fraction=0.5, validate_every=0, learning_rate=3e-3)
BRANCH = ("layers.0.cross.", "layers.0.fusion.")


def build(**options):
    config = DrafterConfig(**{"paradigm": "hybrid", **options})
    return examples.roughened(build_drafter(config, examples.target(), examples.live().spec, DRAFT_IDS, seed=1))


def weights_of(drafter):
    return {name: p.detach().clone() for name, p in drafter.named_parameters()}


def same(one: dict, other: dict) -> set[str]:
    return {name for name in one if torch.equal(one[name], other[name])}


def test_by_default_training_is_plain_ttt_to_the_last_bit(tmp_path):
    """Against a loop that knows of no cure: one AdamW group, `ttt_loss`, and the schedule."""
    drafter, source = build(), examples.live()
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step, indices in enumerate(batches(source.lengths, CURED, 0, 9)):
        generator = torch.Generator().manual_seed(step)
        ttt_loss(drafter, source.batch(indices), ttt_steps=3, anchor_fraction=0.5, generator=generator).loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = learning_rate(CURED, step, 9)
        optimiser.step()
        optimiser.zero_grad()
    trained = build()
    train(trained, source, source, CURED, tmp_path)
    assert len(same(weights_of(trained), weights_of(drafter))) == len(weights_of(drafter))


def test_the_self_branch_and_the_gate_wait_for_the_warm_up_to_end(tmp_path):
    drafter = build()
    start, source = weights_of(drafter), examples.live()
    waiting = {n for n in start if n.startswith(("layers.0.attention.", "layers.0.gate."))}
    steps, one_step = [], Training.step

    def watched(training, indices):
        one_step(training, indices)
        steps.append(same(weights_of(drafter), start))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Training, "step", watched)
        train(drafter, source, source, replace(CURED, branch_warmup_steps=4), tmp_path)
    assert len(waiting) == 6 and steps[:4] == [waiting] * 4 and steps[4:] == [set()] * 5
    with pytest.raises(StudyError, match="branch_warmup_steps=9 must be below the 9 optimiser steps"):
        train(build(), source, source, replace(CURED, branch_warmup_steps=9), tmp_path / "other")


ALL_CURES = replace(
    CURED, branch_warmup_steps=4, branch_loss_weight=0.5, branch_learning_rate_scale=3.0, kv_lag_augment_tokens=3
)  # fmt: skip


def run_cured(folder, config=ALL_CURES):
    drafter = build(gate_floor=0.2, kv_init="target")
    history = train(drafter, examples.live(), examples.live(), config, folder)
    return weights_of(drafter), history.drop(columns="seconds")


@pytest.fixture(scope="module")
def cured(tmp_path_factory):
    """What `run_cured` gives without a kill."""
    return run_cured(tmp_path_factory.mktemp("cured"))


@pytest.mark.parametrize("killed", [2, 4, 7])
def test_with_every_cure_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, cured, killed):
    weights, history = cured
    with monkeypatch.context() as patched:
        die_before_step(patched, killed)
        with pytest.raises(Killed):
            run_cured(tmp_path, replace(ALL_CURES, checkpoint_every_s=0.0))
    again, same_history = run_cured(tmp_path)
    assert len(same(again, weights)) == len(weights) and same_history.equals(history)


def test_the_branch_learns_at_its_own_rate(tmp_path):
    """Adam's first step is the learning rate times the gradient's sign: three times as far for the branch."""
    far, source = {}, examples.live()
    for scale in (1.0, 3.0):
        drafter = build()
        start = weights_of(drafter)
        config = replace(CURED, branch_learning_rate_scale=scale, weight_decay=0.0, max_steps=1, learning_rate=1e-3)
        history = train(drafter, source, source, config, tmp_path / str(scale))
        far[scale] = {n: (p - start[n]).abs().max().item() for n, p in weights_of(drafter).items()}
        assert history["learning_rate"].unique().tolist() == [1e-3]
    branch = {n for n, p in drafter.named_parameters() if any(p is q for q in branch_parameters(drafter))}
    assert branch == {n for n in far[1.0] if n.startswith(BRANCH)} and len(branch) == 6
    for name, distance in far[1.0].items():
        assert far[3.0][name] == pytest.approx(distance * (3 if name in branch else 1), rel=1e-2)


def test_lags_are_drawn_for_each_document_evenly_and_in_training_alone(tmp_path):
    assert draw_lags(4, 0, None, "cpu") is None  # nothing is drawn: the anchors stay those of before
    drawn = torch.cat([draw_lags(50, 4, torch.Generator().manual_seed(seed), "cpu") for seed in range(40)])
    shares = drawn.bincount(minlength=5) / 2000
    assert len(shares) == 5 and (shares - 0.2).abs().max() < 0.05
    source, config = examples.live(), replace(CURED, kv_lag_augment_tokens=4)
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
