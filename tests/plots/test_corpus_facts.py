"""The tables of notebook 00, on documents small enough to count by hand."""

import numpy as np
import pytest

from kvshot_lib.plots.corpus_facts import coverage_table, length_table, readable, split_table
from kvshot_lib.target.load import load_target
from kvshot_lib.text.corpus import Corpus, Document


def document(prompt, answer):
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    return Document(tokens, np.arange(len(tokens)) >= len(prompt))


def test_split_table_counts_documents_answers_and_ends():
    documents = [document([5, 5], [1, 3, 2]), document([5], [7] * 20), document([5], [4])]
    row = split_table([Corpus("made", "train", documents, {})], eos_token_id=2).iloc[0]
    assert (row["documents"], row["tokens"], row["answer tokens"], row["median answer"]) == (3, 28, 24, 3)
    assert row["answers that ended"] == pytest.approx(1 / 3)
    assert row["answers that repeat"] == pytest.approx(1 / 3)
    assert row["their repeated tokens"] == pytest.approx(19 / 24)  # twenty 7s keep one


def test_length_table_is_the_share_of_answers_at_least_so_long():
    table = length_table({"made": [document([5], [1] * 16), document([5], [1] * 40)]})
    shares = table.set_index("answer_tokens")["share"]
    assert shares[[0, 16, 32, 48]].tolist() == [1.0, 1.0, 0.5, 0.0]


def test_coverage_counts_answer_tokens_only_and_ranks_by_training_answers():
    a, b, c, d = 3, 4, 5, 6
    train, held_out = [document([d] * 9, [a, a, b, c])], [document([a] * 9, [a, b, b, d])]
    table = coverage_table(train, {"held out": held_out}, [1, 2], vocab_size=8)
    assert table.set_index(["answers", "draft_vocab_size"])["coverage"].to_dict() == {
        ("train", 1): 0.5,
        ("train", 2): 0.75,
        ("held out", 1): 0.25,
        ("held out", 2): 0.75,
    }


def test_readable_shows_both_turns_and_the_cut():
    tokenizer = load_target("tiny").tokenizer
    header, assistant = [1, 5, 3], [2, 3, 1, 6, 3]
    dialogue = document([*header, 10, 11, *assistant], [*range(20, 36), *range(20, 36), 2])
    text = readable(dialogue, tokenizer, mark_repetition=True)
    assert text.startswith("USER\n") and "w10 w11" in text and "w35 ✂ w20" in text.replace("\n", " ")
    assert "✂" not in readable(dialogue, tokenizer)
