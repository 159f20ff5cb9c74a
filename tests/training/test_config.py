"""Schedules by hand, and what is refused."""

import math
from dataclasses import fields, replace

import examples
import pytest
from examples import VARIANTS
from hypothesis import given
from hypothesis import strategies as st

from kvshot_lib.drafters.drafter import DrafterConfig
from kvshot_lib.errors import StudyError
from kvshot_lib.features.spec import FeatureSpec
from kvshot_lib.training.config import TrainConfig, batch_plan, batches, configurations, learning_rate, total_steps
from kvshot_lib.training.loop import train


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


def test_names_of_what_can_differ_do_not_clash():
    names = [f.name for record in (DrafterConfig, FeatureSpec, TrainConfig) for f in fields(record)]
    names.remove("kv_layers")  # a number in DrafterConfig; the spec's own layers are told as kv_layer_indices
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("batch_documents", -1), ("learning_rate", 0), ("clip_norm", 0),
        ("ttt_steps", 0), ("step_decay", 0),
        ("branch_learning_rate_scale", 0), ("anchor_fraction", 0), ("anchor_fraction", -0.1),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(StudyError, match=f"{name}={value} must be above 0"):
        TrainConfig(**{name: value})


NOT_NEGATIVE = [
    "seed", "max_steps", "checkpoint_every_s", "validate_every", "weight_decay", "warmup_fraction", "branch_warmup_steps", "branch_loss_weight",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NOT_NEGATIVE, "kv_lag_augment_tokens"])
def test_negative_settings_are_refused_by_name(name):
    with pytest.raises(StudyError, match=f"{name}=-1 must be 0 or more"):
        TrainConfig(**{name: -1})


@pytest.mark.parametrize(("name", "value", "most"), [("anchor_fraction", 1.5, 1), ("warmup_fraction", 2, 1)])
def test_shares_are_at_most_one(name, value, most):
    with pytest.raises(StudyError, match=f"{name}={value} must be at most {most}"):
        TrainConfig(**{name: value})


KINDS = {f.name: f.type for f in fields(TrainConfig)}
ANYTHING = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.none(), st.lists(st.integers()))


@given(st.dictionaries(st.sampled_from([*KINDS]), ANYTHING, min_size=1, max_size=4))
def test_a_training_that_is_taken_has_numbers_of_the_right_kind_alone(values):
    """Whatever the fields are given: refused by the name of one of them, or all are finite numbers of their kind."""
    try:
        config = TrainConfig(**values)
    except StudyError as refused:
        assert str(refused).partition("=")[0] in values and "\n" not in str(refused)
        return
    for name, value in vars(config).items():
        assert type(value) in ((int,) if KINDS[name] is int else (int, float)) and math.isfinite(value) and value >= 0


BESIDE = [(name, value) for name in ("draft_vocab_size", "draft_length") for value in (True, 2.0, "8", None, math.nan)]
BESIDE += [("compile_steps", "False"), ("features_on_device", 1), ("init_from", None), ("dtype", 32), ("device", 0)]


@pytest.mark.parametrize(("name", "value"), BESIDE)
def test_what_else_notebooks_give_is_of_its_kind_too(name, value):
    with pytest.raises(StudyError, match=f"{name}=.* must be (a whole number|True or False|text)"):
        configurations({name: value})


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("hidden", {"branch_warmup_steps": 2}, "branch_warmup_steps=2 needs a hybrid with both branches"),
        ("kv_2", {"branch_loss_weight": 0.5}, "branch_loss_weight=0.5 needs a hybrid with both branches"),
        ("cross_only", {"branch_learning_rate_scale": 3.0}, "branch_learning_rate_scale=3.0 needs a hybrid with both"),
        ("hidden", {"kv_lag_augment_tokens": 4}, "kv_lag_augment_tokens=4 needs a kv or hybrid drafter over"),
        ("kv_2_lagged", {"kv_lag_augment_tokens": 4}, "not paradigm='kv' with kv_control='lagged'"),
    ],
)
def test_trainings_that_a_drafter_cannot_have_are_refused(tmp_path, variant, options, message):
    source = examples.live()
    with pytest.raises(StudyError, match=message):
        train(examples.drafter(variant), source, source, TrainConfig(**options), tmp_path)
    with pytest.raises(StudyError, match=message):
        configurations(vars(VARIANTS[variant]) | options)


def test_configurations_take_what_is_theirs_and_leave_the_rest():
    values = {"paradigm": "block", "block_size": 4, "ttt_steps": 3, "epochs": 5, "variant": "mine", "draft_length": 3}
    drafter, training = configurations(values)
    assert (drafter.paradigm, drafter.block_size, training.ttt_steps, training.epochs) == ("block", 4, 3, 5)
    for changed, message in {
        "ttt_steps": "ttt_steps=7 contradicts block_size=4",
        "draft_length": "draft_length=7 must be below block_size=4",
    }.items():
        with pytest.raises(StudyError, match=message):
            configurations(values | {changed: 7})
    for name in ("draft_length", "draft_vocab_size"):
        with pytest.raises(StudyError, match=f"{name}=0 must be 1 or more"):
            configurations({name: 0})
