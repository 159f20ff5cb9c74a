"""User turns from public dialogues: both forms, splits without overlap, and the target's own answers to them."""

import json
import sys
from types import SimpleNamespace

import pytest
from test_generate import ASSISTANT, END, NEWLINE, START, USER, target  # noqa: F401 - a fixture

from kvshot_lib.errors import StudyError
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.text.generate import GeneratorSettings, generate_corpus
from kvshot_lib.text.user_turns import by_split, read_user_turns, turns_hash

SETTINGS = GeneratorSettings(max_length_tokens=60, max_user_tokens=6, batch_size=4)


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(path)


def test_files_are_joined_and_turns_occur_once(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "one"}, {"prompt": ""}])
    second = tmp_path / "b.json"
    second.write_text(json.dumps([{"conversations": [{"from": "human", "value": "three"}]}, {"prompt": "two"}]))
    assert read_user_turns(f"{first}, {second}") == ["one", "two", "three"]


def test_splits_share_no_turn_and_leave_none_out(tmp_path):
    turns = [f"turn {number}" for number in range(100)]
    splits = by_split(write(tmp_path / "a.jsonl", [{"prompt": turn} for turn in turns]))
    assert {name: len(found) for name, found in splits.items()} == {"train": 90, "validation": 5, "evaluation": 5}
    assert sorted(turn for found in splits.values() for turn in found) == sorted(turns)
    assert splits["validation"][:2] == ["turn 0", "turn 20"] and splits["evaluation"][:2] == ["turn 1", "turn 21"]
    assert turns_hash(["a", "b"]) != turns_hash(["ab"])


def test_the_target_answers_given_turns(target, tmp_path):  # noqa: F811
    """Words w7 … of the tiny tokenizer; turns of more than six tokens are dropped."""
    records = [{"prompt": " ".join(f"w{10 + n % 50 + k}" for k in range(3 + n % 5))} for n in range(60)]
    source = write(tmp_path / "a.jsonl", records)
    folder = generate_corpus(target, tmp_path / "made", {"train": 12, "evaluation": 2}, SETTINGS, user_turns=source)
    documents = load_corpus(folder, "train", whole_answers=True).documents
    wanted = [turn for turn in by_split(source)["train"] if len(turn.split()) <= 6][:12]
    header, assistant_header = [START, USER, NEWLINE], [END, NEWLINE, START, ASSISTANT, NEWLINE]
    for document, turn in zip(documents, wanted, strict=True):
        assert document.prompt.tolist() == [*header, *(int(word[1:]) for word in turn.split()), *assistant_header]
    facts = load_corpus(folder, "train", whole_answers=True).provenance
    assert facts["user_turns"] == source and facts["thinking"] is False
    with pytest.raises(StudyError, match="begun with user_turns=.*choose another folder"):
        generate_corpus(target, tmp_path / "made", {"train": 2}, SETTINGS)
    with pytest.raises(
        StudyError, match=r"the 3 user turns of the evaluation split gave \d dialogues, not 40; ask for fewer"
    ):
        generate_corpus(target, tmp_path / "more", {"evaluation": 40}, SETTINGS, user_turns=source)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("none.jsonl", None, "could not read .*none.jsonl .No such file.*a record holds"),
        ("bad.jsonl", "{", "bad.jsonl, line 1: not JSON"),
        ("flat.json", '{"a": 1}', "flat.json: not a list of records; a record holds messages, conversation"),
        ("other.jsonl", '{"text": "a"}', "no user turns in .*other.jsonl; a record holds"),
    ],
)
def test_files_that_hold_no_dialogues_are_refused_in_one_line(tmp_path, source, content, message):
    if content:
        (tmp_path / source).write_text(content)
    with pytest.raises(StudyError, match=message) as error:
        read_user_turns(str(tmp_path / source))
    assert "\n" not in str(error.value)


def test_data_sets_need_their_package_and_say_what_failed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(StudyError, match="some/set:train needs pip install datasets; a local"):
        read_user_turns("some/set:train")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "gone":
            raise ValueError("no such set\nand more")
        return [{"prompt": "one"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_user_turns("some/set:train_sft, other/set") == ["one"]
    assert asked == [("some/set", "train_sft"), ("other/set", "train")]
    with pytest.raises(StudyError, match="could not load gone: no such set; give a name:split") as error:
        read_user_turns("gone")
    assert "\n" not in str(error.value)
