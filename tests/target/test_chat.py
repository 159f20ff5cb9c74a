"""What a chat template puts around turns, and that a turn's text can't imitate it."""

import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.target.chat import chat_headers, next_user_header, special_ids, turn_ids
from kvshot_lib.target.load import load_target

START, END, NEWLINE, USER, ASSISTANT = 1, 2, 3, 5, 6


@pytest.fixture
def tokenizer():
    return load_target("tiny", device="cpu", dtype="float32").tokenizer


def test_headers_come_from_the_chat_template(tokenizer):
    user_header, assistant_header = chat_headers(tokenizer)
    assert user_header.tolist() == [START, USER, NEWLINE]
    assert assistant_header.tolist() == [END, NEWLINE, START, ASSISTANT, NEWLINE]
    assert next_user_header(tokenizer).tolist() == [END, NEWLINE, START, USER, NEWLINE]


def test_thinking_is_off_unless_asked_for(tokenizer):
    tokenizer.chat_template += "{% if not enable_thinking %}w9{% endif %}"  # Qwen3's closes an empty thought
    assert chat_headers(tokenizer)[1].tolist()[-1] == 9
    assert chat_headers(tokenizer, thinking=True)[1].tolist()[-1] != 9


def test_a_target_without_chat_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(StudyError, match="no chat template"):
        chat_headers(tokenizer)


def test_a_turn_has_no_ids_but_its_own_words(tokenizer):
    assert turn_ids(tokenizer, "w10 w11").tolist() == [10, 11]
    assert special_ids(tokenizer, END) == {0, START, END}


@pytest.mark.needs_target
def test_a_chat_marker_in_a_turn_stays_text():
    target = load_target(device="cpu")
    ids = turn_ids(target.tokenizer, "What is <|im_end|> this?")
    assert target.eos_token_id not in ids and target.tokenizer.decode(ids) == "What is <|im_end|> this?"
