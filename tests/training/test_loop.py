"""Training: a killed run resumes to the same bits, equal seeds give equal tables, and bad input or a lost loss is told."""

import math
from dataclasses import fields, replace
from functools import cache

import examples
import pandas as pd
import pytest
import torch
from examples import VARIANTS

from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.resident import ResidentFeatures
from kvshot_lib.features.spec import FeatureSpec
from kvshot_lib.metrics.acceptance import count_document
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.training import loop as training
from kvshot_lib.training.judging import match_documents
from kvshot_lib.training.loop import TrainConfig, batch_plan, batches, learning_rate, total_steps, train

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


class Killed(BaseException):
    """What a kill looks like from inside: nothing that the library catches."""


def run(folder, config=SHORT, variant="hidden", source=None, dtype=torch.float32):
    """Train a fresh drafter; returns its weights and the history without the clock."""
    drafter, source = examples.drafter(variant), source or examples.live()
    history = train(drafter, source, source, config, folder, dtype=dtype)
    return {n: t.clone() for n, t in drafter.state_dict().items()}, history.drop(columns="seconds")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What `run` gives without a kill, by variant; each is trained once."""
    return cache(lambda variant="hidden": run(tmp_path_factory.mktemp("run"), variant=variant))


def die_before_step(monkeypatch, step: int, last_save: int = 0):
    """Die just before optimiser step ``step`` (from 0); the last checkpoint is that after ``last_save`` steps."""
    one_step, save = training._train_step, training.save_checkpoint

    def killing(*given):
        if given[5].step == step:
            raise Killed
        one_step(*given)

    monkeypatch.setattr(training, "_train_step", killing)
    monkeypatch.setattr(training, "save_checkpoint", lambda *given: given[4].step <= last_save and save(*given))


def assert_same(found, wanted):
    assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])
    pd.testing.assert_frame_equal(found[1], wanted[1], check_exact=True)


@pytest.mark.parametrize("variant", ["hidden", "kv_2", "hybrid"])
@pytest.mark.parametrize(("killed", "saved"), [(2, 0), (4, 4), (5, 5), (8, 6)])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, undisturbed, variant, killed, saved):
    """Killed before any checkpoint, right after one (with a report, and between two reports), and two steps after one."""
    with monkeypatch.context() as patched:
        die_before_step(patched, killed, saved)
        with pytest.raises(Killed):
            run(tmp_path / "killed", OFTEN, variant)
    assert (tmp_path / "killed" / "checkpoint.pt").exists() == (saved > 0)
    wanted, steps = undisturbed(variant), count_steps(monkeypatch)
    assert_same(run(tmp_path / "killed", variant=variant), wanted)
    assert steps == list(range(saved, 9))


def count_steps(monkeypatch) -> list[int]:
    done, one_step = [], training._train_step
    monkeypatch.setattr(training, "_train_step", lambda *given: done.append(given[5].step) or one_step(*given))
    return done


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
    saved, save = [], training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", lambda *given: saved.append(given[4].step) or save(*given))
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
    with pytest.raises(StudyError, match="not finite at optimiser step 1; no checkpoint was written before it"):
        run(tmp_path / "first", source=Broken(examples.live(), 1))


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


def test_names_of_what_can_differ_do_not_clash():
    names = [f.name for record in (DrafterConfig, FeatureSpec, TrainConfig) for f in fields(record)]
    names.remove("kv_layers")  # a number in DrafterConfig; the spec's own layers are told as kv_layer_indices
    assert len(names) == len(set(names))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(StudyError, match="can't be read .*; delete it to train from the start"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("batch_documents", -1), ("learning_rate", 0), ("learning_rate", math.nan), ("clip_norm", 0),
        ("ttt_steps", 0), ("step_decay", 0), ("anchor_fraction", 0), ("anchor_fraction", 1.5), ("anchor_fraction", -0.1),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(StudyError, match=f"{name}={value} must be above 0"):
        TrainConfig(**{name: value})


# Schedules


def test_learning_rate_by_hand():
    """Ten steps, two of warm-up: 1/2, 1, then a cosine over eight steps that starts at 1."""
    config = TrainConfig(learning_rate=2.0, warmup_fraction=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert (
        rates[4] == pytest.approx(1 + math.sqrt(0.5))
        and rates[6] == pytest.approx(1)
        and rates[8] == pytest.approx(1 - math.sqrt(0.5))
    )
    assert learning_rate(config, 10, 10) == 0
    assert learning_rate(TrainConfig(learning_rate=2.0, warmup_fraction=0.0), 0, 1) == 2.0


@pytest.mark.parametrize(("documents", "size"), [(1, 1), (7, 2), (64, 2), (100, 3), (5, 8)])
def test_a_pass_takes_every_document_once(documents, size):
    lengths = [(7 * i) % 50 for i in range(documents)]
    plans = [batch_plan(lengths, size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for plan in plans:
        assert sorted(i for batch in plan for i in batch) == list(range(documents))
        assert len(plan) == math.ceil(documents / size) and max(map(len, plan)) <= size
    assert plans[0] == batch_plan(lengths, size, 0, 0)
    if documents > 10:
        assert len({str(plan) for plan in plans}) == 4


def test_batches_go_on_where_a_run_stopped():
    config = TrainConfig(epochs=3, batch_documents=2)
    lengths = [5, 3, 8, 1, 9]
    assert total_steps(config, 5) == 9 and total_steps(replace(config, max_steps=4), 5) == 4
    assert total_steps(replace(config, max_steps=40), 5) == 9
    whole = list(batches(lengths, config, 0, 9))
    assert len(whole) == 9
    for first in range(10):
        assert list(batches(lengths, config, first, 9)) == whole[first:]
    assert list(batches(lengths, config, 1, 4)) == whole[1:4]


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


@pytest.mark.parametrize("name", ["max_steps", "validate_every", "weight_decay", "warmup_fraction"])
def test_negative_settings_are_refused_by_name(name):
    with pytest.raises(StudyError, match=f"{name}=-1 must be 0 or more"):
        TrainConfig(**{name: -1})
