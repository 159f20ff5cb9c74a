"""Text is text: every form of message is read alike, and what is no text is refused with file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshot_lib.errors import StudyError
from kvshot_lib.text.records import first_turn, read_records, text_of
from kvshot_lib.text.user_turns import read_user_turns

PART = {"type": "text", "text": "Hi"}


@pytest.mark.parametrize(
    ("record", "turn"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}, "Hi"),
        ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi "}]}, "Hi"),
        ({"messages": [{"role": "user", "content": [PART]}]}, "Hi"),
        ({"messages": [{"role": "user", "content": [PART, {"type": "text", "text": " you"}]}]}, "Hi you"),
        ({"messages": [{"role": "user", "content": ["Hi", " you"]}]}, "Hi you"),
        ({"messages": [{"role": "user", "content": None}]}, ""),
        ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, "Hello"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Hello"}]}, ""),
        ({"conversation": [{"role": "user", "content": "Hi"}]}, "Hi"),
        ({"conversation": [{"from": "human", "value": [PART]}]}, "Hi"),
        ({"prompt": " a "}, "a"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "chosen": []}, "Hi"),
        ({"prompt": [{"role": "user", "content": [PART]}]}, "Hi"),
        ({"messages": [], "prompt": "a"}, "a"),
        ({"text": "b"}, ""),
        ({}, ""),
    ],
)
def test_first_turns_of_every_form(record, turn):
    assert first_turn(record, "") == turn


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)


@given(
    st.lists(WORDS, min_size=1, max_size=3), st.sampled_from(["messages", "conversations", "conversation", "prompt"]),
    st.sampled_from([("role", "content", "user"), ("from", "value", "human")]), st.sampled_from(["text", "parts", "strings"]),
    st.booleans(),
)  # fmt: skip
def test_a_turn_is_the_same_in_whatever_form_it_is_written(words, name, keys, kind, system):
    parts = {"text": "".join(words), "parts": [{"type": "text", "text": w} for w in words], "strings": words}
    role, content, user = keys
    said = [{role: "system", content: "Be brief."}] if system else []
    said += [{role: user, content: parts[kind]}, {role: "assistant", content: "Yes."}]
    assert first_turn({name: said}, "") == "".join(words).strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([PART, {"type": "image_url", "image_url": {}}], "a part of type 'image_url'; only text can be answered"),
        ([{"type": "input_audio"}], "a part of type 'input_audio'"),
        ([{"type": "text"}], "what is said must be text, or a list of parts of text"),
        (7, "what is said must be text"),
        ([["Hi"]], "what is said must be text"),
        ({"a": "Hi"}, "what is said must be text"),
        ("cut \ud83d", r"\\ud83d is half a character; mend the text"),
        (["\udc00"], r"\\udc00 is half a character"),
    ],
)
def test_what_is_no_text_is_refused_with_file_and_line(tmp_path, content, message):
    with pytest.raises(StudyError, match=message):
        text_of(content, "")
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "fine"}, {"messages": [{"role": "user", "content": content}]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(StudyError, match=f"a.jsonl, line 2: .*{message}") as error:
        read_user_turns(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", [["Hi", "Yes?"], [{"speaker": "user", "text": "Hi"}], [PART]])
def test_messages_without_speakers_are_refused(said):
    with pytest.raises(StudyError, match="x, line 3: messages must have role and content, or from and value"):
        first_turn({"messages": said}, "x, line 3")


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n')
    listed.write_bytes(b'[{"prompt": "a"},\n{"prompt": "\xff"}]')
    for path, line, byte in ((lines, 3, "e9"), (listed, 2, "ff")):
        with pytest.raises(StudyError, match=f"{path.name}, line {line}: byte 0x{byte} is not UTF-8; save it as UTF-8"):
            list(read_records(path, ""))
    listed.write_text('[{"prompt": "a"},\n{"prompt": }]')
    with pytest.raises(StudyError, match="a.json, line 2: not JSON"):
        list(read_records(listed, ""))


def test_records_come_with_their_place_from_lines_and_lists_alike(tmp_path):
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}', encoding="utf-8")
    listed.write_text('\ufeff[{"prompt": "a\u2028b"}, {"prompt": "c"}]', encoding="utf-8")
    records = [{"prompt": "a\u2028b"}, {"prompt": "c"}]
    assert list(read_records(lines, "")) == list(zip([f"{lines}, line 1", f"{lines}, line 3"], records))
    assert list(read_records(listed, "")) == list(zip([f"{listed}, record 1", f"{listed}, record 2"], records))
