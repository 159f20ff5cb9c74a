"""Trained drafters on disk: the same drafts after a round trip, and nothing loaded that doesn't belong together."""

import json
from dataclasses import asdict

import examples
import pytest
import torch
from examples import STEPS, VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvshot_lib.drafters.checkpoint import (
    WEIGHTS,
    draft_vocabulary,
    load_drafter,
    save_drafter,
    warm_start,
)
from kvshot_lib.drafters.config import DrafterConfig
from kvshot_lib.drafters.runs import DESCRIPTION
from kvshot_lib.errors import StudyError
from kvshot_lib.files import sha256, write_json
from kvshot_lib.training.anchors import find_anchors
from kvshot_lib.training.judging import predict


def drafts(drafter):
    features = examples.features()
    return predict(drafter, features, find_anchors(features.answer_mask, STEPS), STEPS)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_drafter_is_the_same_after_a_round_trip(tmp_path, variant):
    drafter = examples.drafter(variant)
    save_drafter(drafter, tmp_path, variant=variant, seed=3)
    again = load_drafter(tmp_path, examples.target())
    assert again.config == drafter.config and again.spec == drafter.spec and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), drafter.parameters(), strict=True))
    assert torch.equal(again.draft_ids, drafter.draft_ids) and torch.equal(drafts(again), drafts(drafter))
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    assert described["variant"] == variant and described["seed"] == 3


def test_a_description_from_before_a_parameter_existed_is_read(tmp_path):
    drafter = examples.drafter("kv_2")
    save_drafter(drafter, tmp_path)
    described = {
        key: value for key, value in json.loads((tmp_path / DESCRIPTION).read_text()).items() if key != "sha256"
    }
    newer = {"kv_norm", "state_layers", "qk_norm"}
    described["config"] = {name: value for name, value in asdict(drafter.config).items() if name not in newer}
    write_json(tmp_path / DESCRIPTION, described)
    again = load_drafter(tmp_path, examples.target())
    assert again.config == DrafterConfig("kv", 2) and torch.equal(drafts(again), drafts(drafter))


def test_a_missing_altered_or_foreign_drafter_is_refused(tmp_path):
    with pytest.raises(StudyError, match="no trained drafter in .*; train it with notebooks/03_train_drafter.ipynb"):
        load_drafter(tmp_path, examples.target())
    save_drafter(examples.drafter("hidden"), tmp_path)
    with pytest.raises(
        StudyError, match="trained for target tiny-llama .* not for tiny-qwen3 .*make it anew for this one"
    ):
        load_drafter(tmp_path, examples.target("tiny-qwen3"))
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(StudyError, match="missing or altered; delete that folder and train the drafter again"):
        load_drafter(tmp_path, examples.target())
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(StudyError, match="missing or altered"):
        load_drafter(tmp_path, examples.target())


def changed(folder, tensors=(), **described):
    """The drafter in ``folder`` with other tensors or another description, whole by its hashes."""
    found = load_file(folder / WEIGHTS) | dict(tensors)
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / WEIGHTS)
    read = {
        key: value
        for key, value in json.loads((folder / DESCRIPTION).read_text()).items()
        if key != "sha256_of_the_rest"
    }
    parts = {key: read[key] | value for key, value in described.items()}
    write_json(folder / DESCRIPTION, read | parts | {"weights_sha256": sha256(folder / WEIGHTS)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": {"norm.weight": torch.full((64,), torch.nan)}}, r"not finite \(norm.weight\)"),
        ({"tensors": {"norm.weight": None}}, "is not what drafter.json describes .*norm.weight"),
        ({"tensors": {"norm.weight": torch.ones(65)}}, "is not what drafter.json describes"),
        ({"tensors": {"other.weight": torch.ones(65)}}, "is not what drafter.json describes .*other.weight"),
        ({"tensors": {"draft_ids": None}}, "can't be read .'draft_ids'.; delete that folder"),
        (
            {"tensors": {"draft_ids": torch.tensor([3, 3])}},
            "draft vocabulary in .* is not made of tokens of tiny-llama",
        ),
        ({"tensors": {"draft_ids": torch.tensor([3, 512])}}, "draft vocabulary in .* is not made of tokens"),
        ({"tensors": {"draft_ids": torch.tensor([-1, 3])}}, "draft vocabulary in .* is not made of tokens"),
        (
            {"tensors": {"draft_ids": torch.tensor([], dtype=torch.long)}},
            "draft vocabulary in .* is not made of tokens",
        ),
        ({"config": {"depth": 2}}, "can't be read .*'depth'"),
        ({"config": {"hidden_norm": "False"}}, "can't be read .hidden_norm='False' must be True or False"),
        ({"config": {"num_layers": 2}}, "is not what drafter.json describes"),
        ({"spec": {"layers": [1]}}, "can't be read .*'layers'"),
        ({"spec": {"hidden_layers": [0, 2, 9]}}, "not what drafter.json describes.*layer 9 is out of range"),
        (
            {"spec": {"tokenizer_hash": "f" * 64}},
            r"was trained for the tokenizer of tiny-llama \(ffffffff…\), not for tiny-llama",
        ),
        ({"spec": {"target_hash": "f" * 64}}, r"was trained for target tiny-llama \(ffffffff…\), not for tiny-llama"),
    ],
)
def test_what_does_not_belong_together_is_one_line(tmp_path, change, message):
    save_drafter(examples.drafter("hidden"), tmp_path)
    changed(tmp_path, **change)
    with pytest.raises(StudyError, match=message) as refused:
        load_drafter(tmp_path, examples.target())
    assert "\n" not in str(refused.value)


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=3), st.lists(st.integers(-1, 3))
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    save_drafter(examples.drafter("hybrid"), folder)
    described = json.loads((folder / DESCRIPTION).read_text())
    return folder, {name: value for name, value in described.items() if name != "sha256_of_the_rest"}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_description_is_the_drafters_or_one_line(kept, data):
    """One or two fields at any depth left out, or something else: nothing but a refusal, or the same drafter."""
    folder, described = kept
    described = {**described, "config": dict(described["config"]), "spec": dict(described["spec"])}
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(["", "config", "spec"]))
        inner = described[place] if place and isinstance(described.get(place), dict) else described
        name = data.draw(st.sampled_from(sorted(inner))) if inner else ""
        inner.pop(name, None)
        if data.draw(st.booleans()):
            inner[name] = data.draw(JSON)
    write_json(folder / DESCRIPTION, described)
    try:
        found = load_drafter(folder, examples.target())
    except StudyError as refused:
        assert "\n" not in str(refused)
    else:
        own = examples.drafter("hybrid").state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in found.state_dict().items())


def test_a_damaged_description_is_refused(tmp_path):
    save_drafter(examples.drafter("hidden"), tmp_path)
    for text in ("{", "{}"):
        (tmp_path / DESCRIPTION).write_text(text)
        with pytest.raises(StudyError, match="delete that folder"):
            load_drafter(tmp_path, examples.target())


def test_a_warm_start_takes_what_is_shared(tmp_path):
    """A hybrid started from a hidden drafter: the cross branch and the gate are what stays fresh."""
    hidden, hybrid, untouched = (examples.drafter(variant) for variant in ("hidden", "hybrid", "hybrid"))
    with torch.no_grad():
        hidden.fuse_hidden.weight += 1
    save_drafter(hidden, tmp_path)
    fresh = warm_start(hybrid, tmp_path)
    assert {name.split(".")[2] for name in fresh} == {"fusion", "cross", "gate"}
    taken, source, before = hybrid.state_dict(), hidden.state_dict(), untouched.state_dict()
    assert all(torch.equal(taken[name], source[name]) for name in source)
    assert all(torch.equal(taken[name], before[name]) for name in fresh)
    assert sorted([*source, *fresh]) == sorted(taken)


def test_a_warm_start_from_elsewhere_is_refused(tmp_path):
    hybrid = examples.drafter("hybrid")
    with pytest.raises(StudyError, match="no trained drafter in .*; train it with"):
        warm_start(hybrid, tmp_path)
    save_drafter(examples.drafter("hidden", "tiny-qwen3"), tmp_path)
    with pytest.raises(
        StudyError, match=r"it was trained for target tiny-qwen3 \(\w{8}…\), not for tiny-llama \(\w{8}…\)"
    ):
        warm_start(hybrid, tmp_path)
    save_drafter(examples.drafter("hidden", draft_ids=torch.arange(99)), tmp_path)
    with pytest.raises(StudyError, match=r"another vocabulary \(99 tokens, \w{8}…, not 410 tokens, \w{8}…\)"):
        warm_start(hybrid, tmp_path)


def test_draft_vocabulary_by_hand():
    counts = torch.tensor([5, 0, 7, 5, 1, 0])
    assert draft_vocabulary(counts, 1).tolist() == [2]
    assert draft_vocabulary(counts, 2).tolist() == [0, 2]  # a tie: the lower id
    assert draft_vocabulary(counts, 5).tolist() == [0, 1, 2, 3, 4]
    for size in (0, 7):
        with pytest.raises(StudyError, match=f"draft_vocab_size={size} must be from 1 to the target's 6 tokens"):
            draft_vocabulary(counts, size)
