"""Dialogues of many turns: what a step makes is what a plain loop makes, and only what the target chose is its answer."""

from functools import cache

import numpy as np
import pytest
import torch
from static_shapes import nothing_waits

from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.chat import chat_headers, dialogue_ids, next_turn_ids, turn_header
from kvshot_lib.target.load import load_target
from kvshot_lib.text import rows
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.text.generate import GeneratorSettings, generate_corpus
from kvshot_lib.text.multi_turn import DialogueWriter, write_dialogues
from kvshot_lib.training.judging import anchor_places

LENGTH, MOST = 90, (5, 9)


@cache
def on(device: str):
    return load_target("tiny", device=device, dtype="float32")


def by_hand(target, most) -> tuple[list[int], list[bool]]:
    """Greedy, token by token, without a cache."""
    opening, after_user = (part.tolist() for part in chat_headers(target.tokenizer))
    frames, text = (after_user, turn_header(target.tokenizer).tolist()), opening
    own, speaker, spent = [False] * len(text), 0, 0
    while len(text) < LENGTH:
        logits = target.model(torch.tensor([text], device=target.device)).logits[0, -1].clone()
        if not spent:
            logits[sorted(target.special_ids)] = float("-inf")
        token = int(logits.argmax())
        if spent < most[speaker] and token not in target.special_ids:
            text, own, spent = [*text, token], [*own, speaker == 1], spent + 1
            continue
        chosen = spent < most[speaker] and token == frames[speaker][0]
        text, own = [*text, *frames[speaker]], [*own, chosen and speaker == 1, *[False] * (len(frames[speaker]) - 1)]
        speaker, spent = 1 - speaker, 0
    return text[:LENGTH], own[:LENGTH]


@pytest.mark.parametrize("most", [MOST, (40, 60)])
@torch.inference_mode()
def test_a_dialogue_is_what_a_plain_loop_writes(most, device):
    target = on(device)
    written = write_dialogues(target, 2, LENGTH, most, temperature=0.0, top_p=1.0)
    text, own = by_hand(target, most)
    for document in written:
        assert document.tokens.tolist() == text
        assert document.answer_mask.tolist() == own


def test_turns_are_framed_as_the_chat_template_frames_them_and_end_in_time(device):
    target = on(device)
    torch.manual_seed(1)
    first, second = write_dialogues(target, 2, 200, MOST, temperature=1.0, top_p=0.95)
    assert first.tokens.tolist() != second.tokens.tolist()
    (opening, after_user), again = chat_headers(target.tokenizer), turn_header(target.tokenizer)
    rest, answers = first.tokens[len(opening) :].tolist(), []
    assert first.tokens[: len(opening)].tolist() == opening.tolist()
    for speaker in [0, 1] * 3:
        frame = (after_user, again)[speaker].tolist()
        turn = next(n for n in range(MOST[speaker] + 1) if rest[n : n + len(frame)] == frame)
        assert 1 <= turn <= MOST[speaker] and not target.special_ids & {*rest[:turn]}
        answers += rest[:turn] if speaker else []
        rest = rest[turn + len(frame) :]
    words = [token for token in first.answer.tolist() if token not in target.special_ids]
    assert words[: len(answers)] == answers
    torch.manual_seed(1)
    assert (
        write_dialogues(target, 2, 200, MOST, temperature=1.0, top_p=0.95)[0].tokens.tolist() == first.tokens.tolist()
    )


@pytest.mark.parametrize("most_rows", [1024, 2])
def test_dialogues_follow_the_seed_and_nothing_that_was_written_before(device, most_rows, monkeypatch):
    monkeypatch.setattr(rows, "ROWS", most_rows)

    def again(seed, count=3):
        torch.manual_seed(seed)
        written = write_dialogues(on(device), count, LENGTH, MOST, temperature=1.0, top_p=0.95)
        return [(document.tokens.tolist(), document.answer_mask.tolist()) for document in written]

    first = again(1)
    assert len(first) == 3 and again(2) != first
    assert again(1) == first


def test_a_corpus_of_them_is_written_read_and_judged_like_any_other(tmp_path):
    settings = GeneratorSettings(96, *MOST[:1], batch_size=4, max_answer_tokens=MOST[1])
    folder = generate_corpus(on("cpu"), tmp_path / "many", {"train": 5, "evaluation": 2}, settings)
    corpus = load_corpus(folder, "evaluation")
    assert corpus.provenance["splits"]["evaluation"]["answers"] == "sampled"
    assert [len(document.tokens) for document in corpus.documents] == [96, 96]
    first = corpus.documents[0]
    spans = np.diff(np.flatnonzero(np.diff(np.r_[0, first.answer_mask, 0])))[::2]
    assert len(spans) > 3 and max(spans) <= MOST[1] + 1
    assert first.prompt.tolist() == first.tokens[: first.answer_mask.argmax()].tolist()
    live = LiveFeatures(on("cpu"), corpus.documents, feature_spec(on("cpu"), 1))
    lengths = anchor_places(live, 0)[:, 1]
    assert (np.diff(lengths) > 0).all() and lengths.max() > 80


def test_texts_without_room_for_an_answer_and_thoughts_are_refused(tmp_path):
    with pytest.raises(StudyError, match="max_length_tokens=24; a prompt alone may take"):
        generate_corpus(on("cpu"), tmp_path / "short", {"train": 2}, GeneratorSettings(24, 96, max_answer_tokens=8))
    with pytest.raises(StudyError, match="thinking and max_answer_tokens exclude each other"):
        GeneratorSettings(thinking=True, max_answer_tokens=8)


def test_headers_between_turns_are_those_of_the_template():
    tokenizer = on("cpu").tokenizer
    between, after_user = turn_header(tokenizer), chat_headers(tokenizer)[1]
    turn = next_turn_ids(tokenizer, "Hello there")
    assert np.array_equal(turn[: len(between)], between) and np.array_equal(turn[-len(after_user) :], after_user)
    whole = dialogue_ids(tokenizer, ["Hi", "Yes", "Hello there"])
    assert np.array_equal(whole[-len(turn) :], turn)


@torch.inference_mode()
def test_nothing_in_a_step_waits_for_the_device():
    writer = DialogueWriter(on("cpu"), 4, LENGTH, 1.0, 0.9, MOST)
    writer.begin({0: writer.opening}, LENGTH)
    writer.forward()
    with nothing_waits():
        writer.forward()
