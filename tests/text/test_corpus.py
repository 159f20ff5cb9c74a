"""The corpus: format, split, masks, and where a greedy answer is cut."""

from itertools import chain

import examples
import numpy as np
import pytest
import torch

from kvshot_lib.errors import StudyError
from kvshot_lib.files import read_json, write_json
from kvshot_lib.text.corpus import (
    CORPORA,
    MIN_ANSWER_TOKENS,
    SPLITS,
    Document,
    check_disjoint,
    cut_repetition,
    load_corpus,
    repetition_start,
    save_corpus,
)

HEADER_TOKENS = 24  # <|im_start|>system … <|im_end|>\n<|im_start|>user\n
ASSISTANT_HEADER = [2, 198, 1, 520, 9531, 198]  # <|im_end|>\n<|im_start|>assistant\n


def document(prompt, answer):
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt))


@pytest.fixture(scope="module")
def selfgen():
    return {split: load_corpus("selfgen", split, whole_answers=True).documents for split in SPLITS}


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ([], 0),
        ([1, 2], 2),
        ([1, 2, 3, 4, 5, 6], 6),
        ([1, 2, 3, 4, 1, 2, 3, 5], 4),  # 1 2 3 comes back at position 4
        ([1, 2, 3, 1, 2, 4], 6),  # only two tokens come back
        ([9, 1, 2, 1, 2, 1, 2], 3),  # a loop of period 2: 1 2 1 comes back at position 3
        ([7, 7, 7, 7], 1),  # a loop of period 1
        ([7, 7, 7], 3),  # three tokens in a row, but no second three
        ([1, 2, 3, 4, 3, 2, 1], 7),  # the same tokens in another order
    ],
)
def test_an_answer_is_cut_where_three_tokens_come_back(answer, kept):
    assert repetition_start(np.array(answer, dtype=np.int32), repeat_tokens=3) == kept


def test_cut_repetition_keeps_the_prompt_and_cuts_mask_and_tokens_alike():
    # The prompt holds 1 2 3 too: only the answer's own repetitions count.
    cut = cut_repetition(document([1, 2, 3], [1, 2, 3, 8, 1, 2, 3, 9]), repeat_tokens=3)
    assert cut.tokens.tolist() == [1, 2, 3, 1, 2, 3, 8]
    assert cut.answer_mask.tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize("big", [9, 300, 151_000])
def test_save_and_load_give_back_the_same_documents(tmp_path, big):
    documents = [document([7, 7, 1], [2, big]), document([7, 7, 3, 3], [4]), document([7, 7, 5], [6, 6, 6, 2])]
    save_corpus(tmp_path, {"train": documents}, {"vocab_size": 152_000}, greedy=[])
    back = load_corpus(tmp_path, "train", whole_answers=True)
    assert [d.tokens.tolist() for d in back.documents] == [[7, 7, 1, 2, big], [7, 7, 3, 3, 4], [7, 7, 5, 6, 6, 6, 2]]
    assert [d.answer_mask.tolist() for d in back.documents] == [d.answer_mask.tolist() for d in documents]
    assert back.documents[0].tokens.dtype == np.int32 and back.documents[0].answer_mask.dtype == bool
    assert back.provenance["splits"]["train"]["documents"] == 3
    assert back.provenance["splits"]["train"]["answer_tokens"] == 7


def test_equal_documents_make_equal_files(tmp_path):
    documents = load_corpus("tiny", "train").documents
    for folder in ("a", "b"):
        save_corpus(tmp_path / folder, {"train": documents}, {}, greedy=[])
    assert (tmp_path / "a" / "train.npz").read_bytes() == (tmp_path / "b" / "train.npz").read_bytes()


def test_loading_cuts_greedy_answers_only_and_drops_short_ones(tmp_path):
    looping = document([1], [*range(100, 120), *range(100, 120)])  # 20 tokens, twice
    at_once = document([2], [3] * 40)  # one token is left: too short
    splits = {
        "train": [looping, at_once],
        "evaluation": [document([4], d.answer) for d in [looping]] + [document([5], at_once.answer)],
    }
    save_corpus(tmp_path, splits, {}, greedy=["evaluation"])
    lengths = lambda **how: [[len(d.answer) for d in load_corpus(tmp_path, s, **how).documents] for s in splits]
    assert lengths() == [[40, 40], [20]]
    assert lengths(whole_answers=True) == [[40, 40], [40, 40]]


def test_a_user_turn_in_two_splits_is_refused(tmp_path):
    first, second = document([1, 2], [3]), document([1, 2], [4])  # same user turn, other answer
    with pytest.raises(StudyError, match="in train and in evaluation"):
        save_corpus(tmp_path, {"train": [first], "evaluation": [second]}, {}, greedy=[])
    assert not (tmp_path / "provenance.json").exists()


def test_unknown_names_are_refused_with_the_valid_ones(tmp_path):
    with pytest.raises(StudyError, match="train, validation, evaluation"):
        load_corpus("selfgen", "test")
    with pytest.raises(StudyError, match="selfgen, .*tiny"):
        load_corpus("sharegpt", "train")
    with pytest.raises(StudyError, match="selfgen, .*tiny"):
        load_corpus(tmp_path, "train")


def test_texts_that_are_not_tracked_are_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(CORPORA, "gemma-sealed", tmp_path)
    with pytest.raises(
        StudyError, match="gemma-sealed aren't in .*; data/experiments has the command that writes them"
    ):
        load_corpus("gemma-sealed", "evaluation")


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    save_corpus(tmp_path, {"train": load_corpus("tiny", "train").documents}, {}, greedy=[])
    path = tmp_path / "train.npz"
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[:-10] if damage == "truncated" else content)
    if damage == "missing":
        path.unlink()
    with pytest.raises(StudyError, match="train.npz is missing or is not the file"):
        load_corpus(tmp_path, "train")


def test_a_corpus_without_the_split_or_of_another_format_is_refused(tmp_path):
    save_corpus(tmp_path, {"train": load_corpus("tiny", "train").documents}, {}, greedy=[])
    with pytest.raises(StudyError, match="'evaluation' split in format 1"):
        load_corpus(tmp_path, "evaluation")
    facts = read_json(tmp_path / "provenance.json", "")
    write_json(tmp_path / "provenance.json", {**facts, "schema_version": 99})
    with pytest.raises(StudyError, match="format 1"):
        load_corpus(tmp_path, "train")


def test_the_tiny_corpus_is_small_seeded_and_disjoint():
    splits = {split: load_corpus("tiny", split).documents for split in SPLITS}
    assert [len(documents) for documents in splits.values()] == [64, 8, 16]
    check_disjoint(splits)
    for d in chain(*splits.values()):
        assert 20 <= len(d.tokens) <= 60 and d.tokens.max() < 512
        assert d.prompt[-1] == 2 and d.answer[-1] == 2 and len(d.answer) > MIN_ANSWER_TOKENS
        assert repetition_start(d.answer) == len(d.answer)
    again = load_corpus("tiny", "train")
    assert (again.documents[5].tokens == splits["train"][5].tokens).all()


def test_tracked_corpus_has_the_promised_size(selfgen):
    assert [len(selfgen[split]) for split in SPLITS] == [10000, 128, 512]
    assert len(load_corpus("selfgen", "evaluation").documents) == 508
    sizes = [path.stat().st_size for path in CORPORA["selfgen"].iterdir()]
    assert max(sizes) < 4_000_000 and sum(sizes) < 8_000_000
    assert max(len(d.tokens) for documents in selfgen.values() for d in documents) == 512


def test_tracked_corpus_has_no_user_turn_twice(selfgen):
    check_disjoint(selfgen)
    whole = [d.tokens.tobytes() for documents in selfgen.values() for d in documents]
    assert len(set(whole)) == len(whole)


def test_tracked_masks_mark_exactly_the_answer(selfgen):
    header = selfgen["train"][0].tokens[:HEADER_TOKENS]
    for d in chain(*selfgen.values()):
        start = int(d.answer_mask.argmax())
        assert d.answer_mask[start:].all()
        assert d.tokens[start - len(ASSISTANT_HEADER) : start].tolist() == ASSISTANT_HEADER
        assert (d.tokens[:HEADER_TOKENS] == header).all()
        user_turn = d.tokens[HEADER_TOKENS : start - len(ASSISTANT_HEADER)]
        assert len(user_turn) > 0 and user_turn.min() > 16  # ids 0 to 16 are chat and file markers
        assert d.answer[:-1].min() > 16
        assert d.answer[-1] == 2 or len(d.tokens) == 512  # an answer ends with its end-of-turn token or at the limit


def test_tracked_evaluation_answers_no_longer_repeat_themselves():
    for d in load_corpus("selfgen", "evaluation").documents:
        assert repetition_start(d.answer) == len(d.answer) >= MIN_ANSWER_TOKENS


@pytest.mark.needs_target
def test_tracked_corpus_belongs_to_the_default_target_and_decodes(selfgen):
    target = examples.default_target()
    facts = load_corpus("selfgen", "train").provenance
    assert (facts["target_hash"], facts["tokenizer_hash"]) == (target.hash, target.tokenizer_hash)
    texts = target.tokenizer.batch_decode([d.tokens for documents in selfgen.values() for d in documents[:500]])
    assert all(text.startswith("<|im_start|>system\nYou are a helpful AI assistant") for text in texts)
    assert all("<|im_end|>\n<|im_start|>assistant\n" in text for text in texts)


@pytest.mark.needs_target
def test_tracked_evaluation_answers_are_the_targets_argmax():
    """Ground truth = argmax, so chain statistics are exact; two equal logits may fall either way on another machine."""
    target = examples.default_target()
    same = []
    for d in load_corpus("selfgen", "evaluation").documents[:2]:
        with torch.no_grad():
            best = target.model(torch.from_numpy(d.tokens)[None].long()).logits[0].argmax(-1).numpy()
        same.extend(best[len(d.prompt) - 1 : -1] == d.answer)
    assert len(same) > 100 and np.mean(same) > 0.995
