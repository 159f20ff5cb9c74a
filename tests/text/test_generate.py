"""The generator: turns end where they should, nothing depends on batching or on a kill, and nothing strays in."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvshot_lib.decoding.decode import decode
from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.load import load_target
from kvshot_lib.text import generate
from kvshot_lib.text.corpus import SPLITS, check_disjoint, load_corpus
from kvshot_lib.text.generate import GeneratorSettings, generate_batch, generate_corpus, write_answers
from kvshot_lib.text.prompts import encode_turn, load_prompts

SETTINGS = GeneratorSettings(max_length_tokens=60, max_user_tokens=24, batch_size=8, seed=0)
END, START, NEWLINE, USER, ASSISTANT = 2, 1, 3, 5, 6  # of the tiny tokenizer


@pytest.fixture(scope="module")
def target():
    """A tiny target that likes to end its turns: at random weights a turn would take hundreds of tokens."""
    target = load_target("tiny", device="cpu", dtype="float32")
    bias = torch.zeros(512)
    bias[END] = 6.0
    target.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return target


def tokens_of(folder, split):
    return [d.tokens.tolist() for d in load_corpus(folder, split, whole_answers=True).documents]


def script(target, monkeypatch, *calls):
    """Let ``model.generate`` return these new tokens, a list of rows a call, padded as transformers pads them."""
    rows = iter(calls)

    def continued(prompts, **_):
        new = next(rows)
        width = max(map(len, new))
        return torch.cat([prompts, torch.tensor([row + [END] * (width - len(row)) for row in new])], dim=1)

    monkeypatch.setattr(target.model, "generate", continued)


def test_turns_end_at_their_end_of_turn_token(target, monkeypatch):
    # A turn that ended, one that never did, one with a stray marker, an empty one, and another that ended.
    user = [[10, 11, END], [12] * 24, [13, START], [END], [14, END]]
    answers = [[20, 21, END], [22] * 47]  # ended; never ended
    script(target, monkeypatch, user, answers)
    documents = generate_batch(target, "train", 0, replace(SETTINGS, batch_size=5))
    assert [d.tokens.tolist() for d in documents] == [
        [START, USER, NEWLINE, 10, 11, END, NEWLINE, START, ASSISTANT, NEWLINE, 20, 21, END],
        [START, USER, NEWLINE, 14, END, NEWLINE, START, ASSISTANT, NEWLINE] + [22] * 47,
    ]
    assert [d.answer.tolist() for d in documents] == [[20, 21, END], [22] * 47]


def test_a_text_begins_with_the_start_token_and_a_prefix_of_the_length_asked_for(target, monkeypatch):
    # Prefixes: a whole one, one that ended early, one that ended just there, one with a marker, and a whole one.
    prefixes = [[10, 11, 12], [13, END], [14, 15, END], [16, START], [17, 18, 19]]
    script(target, monkeypatch, prefixes, [[20, 21, END], [22] * 56])
    documents = generate_batch(target, "train", 0, replace(SETTINGS, batch_size=5, text_prefix_tokens=3))
    assert [d.prompt.tolist() for d in documents] == [[START, 10, 11, 12], [START, 17, 18, 19]]
    assert [d.answer.tolist() for d in documents] == [[20, 21, END], [22] * 56]


def test_a_base_model_writes_texts_and_is_decoded_from_what_they_begin_with(tmp_path):
    """Text mode from end to end; in dialogue mode the same model is told of it."""
    base = load_target("tiny-gemma3", device="cpu", dtype="float32")
    base.tokenizer.chat_template = None
    settings, counts = replace(SETTINGS, text_prefix_tokens=5), {"train": 9, "evaluation": 3}
    with pytest.raises(
        StudyError, match="no chat template .*in text mode a base model writes plain text .text_prefix_tokens=32"
    ):
        generate_corpus(base, tmp_path / "dialogues", counts, SETTINGS)
    folder = generate_corpus(base, tmp_path / "texts", counts, settings)
    found = {split: load_corpus(folder, split).documents for split in counts}
    assert {(len(d.prompt), int(d.prompt[0])) for split in found.values() for d in split} == {(6, base.start_id)}
    whole = {len(d.answer) for d in found["train"]}
    live = LiveFeatures(base, found["evaluation"], feature_spec(base, 1))
    for prompt, document in zip(load_prompts(folder), found["evaluation"], strict=True):
        ids = encode_turn(base, prompt.turns)
        assert prompt.category == "held_out" and ids.tolist() == document.prompt.tolist()
        decoded = decode(base, None, ids, max_new_tokens=len(document.answer)).tokens
        assert decoded == document.answer.tolist()
    assert live.batch([0]).answer_mask[0, :7].tolist() == [False] * 6 + [True] and max(whole) == 54
    other = replace(base, tokenizer_hash="another")
    with pytest.raises(StudyError, match="written with the tokenizer of tiny-gemma3"):
        encode_turn(other, load_prompts(folder)[0].turns)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_prefix_tokens": -1}, "text_prefix_tokens=-1 must be 0 or more"),
        ({"text_prefix_tokens": 44}, "a prompt alone may take 45; raise it"),
        ({"text_prefix_tokens": 5, "user_turns": "turns.jsonl"}, "only dialogues of one turn take user_turns; leave"),
        ({"max_answer_tokens": 5, "user_turns": "turns.jsonl"}, "only dialogues of one turn take user_turns; leave"),
        ({"text_prefix_tokens": 5, "max_answer_tokens": 5}, "exclude each other; a text has no turns"),
    ],
)  # fmt: skip
def test_modes_that_do_not_go_together_are_refused(target, tmp_path, given, message):
    turns, given = given.get("user_turns", ""), {k: v for k, v in given.items() if k != "user_turns"}
    (tmp_path / "turns.jsonl").write_text('{"prompt": "w9"}\n')
    with pytest.raises(StudyError, match=message):
        settings = replace(SETTINGS, **given)
        generate_corpus(target, tmp_path / "made", {"train": 1}, settings, user_turns=turns and str(tmp_path / turns))


def test_an_answer_with_a_stray_marker_is_dropped_and_a_long_one_cut(target, monkeypatch):
    prompts = [
        np.array([7] * 50, dtype=np.int32),
        np.array([7] * 20, dtype=np.int32),
        np.array([7] * 20, dtype=np.int32),
    ]
    script(target, monkeypatch, [[30] * 20 + [END], [31, START], [32, END]])
    documents = write_answers(target, prompts, SETTINGS, greedy=True)
    assert [d.tokens.tolist() for d in documents] == [[7] * 50 + [30] * 10, [7] * 20 + [32, END]]
    assert [d.answer.tolist() for d in documents] == [[30] * 10, [32, END]]


def test_greedy_answers_are_the_targets_argmax_whatever_the_batch(target):
    documents = generate_batch(target, "evaluation", 0, SETTINGS)
    assert len({len(d.prompt) for d in documents}) > 1, "prompts of one length would not test the padding"
    for d in documents:
        with torch.no_grad():
            best = target.model(torch.from_numpy(d.tokens)[None].long()).logits[0].argmax(-1).numpy()
        start = len(d.prompt)
        assert (best[start - 1 : -1] == d.tokens[start:]).all()
        alone = write_answers(target, [d.prompt], SETTINGS, greedy=True)[0]
        assert alone.tokens.tolist() == d.tokens.tolist()


def test_batches_have_seeds_of_their_own_and_leave_the_global_one_alone(target):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate_batch(target, "train", 0, SETTINGS)
    assert (torch.get_rng_state() == before).all()
    torch.manual_seed(2)
    again, second, other_split = (
        generate_batch(target, *which, SETTINGS) for which in [("train", 0), ("train", 1), ("validation", 0)]
    )
    read = lambda documents: [d.tokens.tolist() for d in documents]
    assert read(first) == read(again)
    assert read(first) != read(second) and read(first) != read(other_split)


def test_sampling_follows_top_p_and_no_other_rule(target):
    """With top_p = 0.5 every sampled token has less than half of the probability above it, and often some."""
    settings = replace(SETTINGS, batch_size=16, top_p=0.5)
    above, best = [], []
    for d in generate_batch(target, "train", 0, settings):
        with torch.no_grad():
            p = target.model(torch.from_numpy(d.tokens)[None].long()).logits[0].softmax(-1)
        start = len(d.prompt)
        for t in range(start, len(d.tokens)):
            chosen = p[t - 1, d.tokens[t]]
            above.append(float(p[t - 1][p[t - 1] > chosen].sum()))
            best.append(above[-1] == 0)
    assert max(above) < 0.5 + 1e-4
    assert 0 < np.mean(best) < 1


def test_corpus_has_the_counts_asked_for_and_no_user_turn_twice(target, tmp_path):
    folder = generate_corpus(target, tmp_path / "made", {"train": 12, "validation": 3, "evaluation": 4}, SETTINGS)
    splits = {split: load_corpus(folder, split, whole_answers=True) for split in SPLITS}
    assert [len(corpus.documents) for corpus in splits.values()] == [12, 3, 4]
    check_disjoint({split: corpus.documents for split, corpus in splits.items()})
    facts = splits["train"].provenance
    assert facts["target_hash"] == target.hash and facts["seed"] == 0 and facts["dtype"] == "float32"
    assert facts["splits"]["evaluation"]["answers"] == "greedy" and facts["splits"]["train"]["answers"] == "sampled"
    for corpus in splits.values():
        for d in corpus.documents:
            assert d.prompt[-5:].tolist() == [END, NEWLINE, START, ASSISTANT, NEWLINE]
            assert d.answer_mask.tolist() == sorted(d.answer_mask.tolist())
            assert len(target.tokenizer.decode(d.tokens)) > 0


def test_a_split_takes_no_user_turn_of_the_one_before(target, tmp_path, monkeypatch):
    batches, real = [], generate.generate_batch

    def same_again(given, _split, number, *rest):  # every split is offered the same documents
        batches.append(number)
        return real(given, "train", number, *rest)

    monkeypatch.setattr(generate, "generate_batch", same_again)
    folder = generate_corpus(target, tmp_path / "made", {"train": 6, "validation": 6}, SETTINGS)
    assert not {*map(tuple, tokens_of(folder, "train"))} & {*map(tuple, tokens_of(folder, "validation"))}
    assert batches.count(0) == 2


def test_a_later_call_for_another_split_keeps_the_first(target, tmp_path):
    both = generate_corpus(target, tmp_path / "both", {"train": 9, "evaluation": 9}, SETTINGS)
    one = generate_corpus(target, tmp_path / "one", {"evaluation": 9}, SETTINGS)
    one = generate_corpus(target, one, {"train": 9}, SETTINGS)
    for split in ("train", "evaluation"):
        assert tokens_of(one, split) == tokens_of(both, split)
    assert tokens_of(generate_corpus(target, one, {"train": 20}, SETTINGS), "evaluation") == tokens_of(
        both, "evaluation"
    )


def test_a_killed_run_goes_on_and_makes_the_same_corpus(target, tmp_path, monkeypatch):
    counts = {"train": 20, "evaluation": 4}
    whole = generate_corpus(target, tmp_path / "whole", counts, SETTINGS)
    made, real = [], generate.generate_batch

    def dies_at_third_batch(target, split, number, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((split, number))
        return real(target, split, number, *rest)

    monkeypatch.setattr(generate, "generate_batch", dies_at_third_batch)
    with pytest.raises(KeyboardInterrupt):
        generate_corpus(target, tmp_path / "killed", counts, SETTINGS)
    assert not (tmp_path / "killed" / "provenance.json").exists()
    after = []
    monkeypatch.setattr(generate, "generate_batch", lambda *args: after.append(args[1:3]) or real(*args))
    killed = generate_corpus(target, tmp_path / "killed", counts, SETTINGS)
    assert not set(after) & set(made), "a finished batch was made again"
    for split in counts:
        assert tokens_of(killed, split) == tokens_of(whole, split)
        assert (killed / f"{split}.npz").read_bytes() == (whole / f"{split}.npz").read_bytes()


def test_larger_counts_add_to_what_is_there(target, tmp_path):
    few = tokens_of(generate_corpus(target, tmp_path / "corpus", {"train": 5}, SETTINGS), "train")
    more = tokens_of(generate_corpus(target, tmp_path / "corpus", {"train": 12}, SETTINGS), "train")
    assert more[:5] == few and len(more) == 12


def test_other_settings_in_the_same_folder_are_refused(target, tmp_path):
    generate_corpus(target, tmp_path, {"train": 2}, SETTINGS)
    with pytest.raises(StudyError, match="begun with seed=0, not 1"):
        generate_corpus(target, tmp_path, {"train": 2}, replace(SETTINGS, seed=1))


def test_a_finished_corpus_without_its_parts_is_never_written_over(target, tmp_path):
    """Tracked corpora are like this: their splits could not be made again from parts, and other settings not be seen."""
    folder = generate_corpus(target, tmp_path / "own", {"train": 2}, SETTINGS)
    before = (folder / "train.npz").read_bytes()
    shutil.rmtree(folder / "parts")
    with pytest.raises(StudyError, match="finished corpus without the parts .*; choose another folder"):
        generate_corpus(target, folder, {"validation": 2}, SETTINGS)
    assert (folder / "train.npz").read_bytes() == before and not (folder / "parts").exists()


def test_a_target_that_never_ends_its_turns_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "write_prompts", lambda *_: [])
    with pytest.raises(StudyError, match="20 batches in a row"):
        generate_corpus(target, tmp_path, {"train": 1}, SETTINGS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"top_p": 1.5}, "top_p at most 1"), ({"temperature": 0.0}, "above 0"), ({"batch_size": 0}, "above 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"), ({"seed": -1}, "seed=-1 must be 0"),
        ({"temperature": "1.0"}, "temperature='1.0' must be"), ({"batch_size": True}, "batch_size=True must be"),
        ({"max_user_tokens": 9.5}, "max_user_tokens=9.5 must be"), ({"thinking": "no"}, "thinking='no' must be True or"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(StudyError, match=message):
        GeneratorSettings(**bad)


@pytest.mark.parametrize("wrong", [-1, True, "9", 2.5, None])
def test_counts_that_mean_nothing_are_refused(target, tmp_path, wrong):
    with pytest.raises(StudyError, match="train=.* must be a whole number|-1 documents can't be written"):
        generate_corpus(target, tmp_path, {"train": wrong}, SETTINGS)


def test_greedy_answers_are_the_argmax_whatever_the_checkpoint_asks_for(monkeypatch, target):
    for rule, value in {"no_repeat_ngram_size": 2, "repetition_penalty": 5.0, "num_beams": 2, "top_k": 1}.items():
        monkeypatch.setattr(target.model.generation_config, rule, value)
    test_greedy_answers_are_the_targets_argmax_whatever_the_batch(target)


def test_answers_that_end_with_any_named_id_are_kept_and_headers_that_follow_users_end_their_turn(target, monkeypatch):
    monkeypatch.setattr(target.model.config, "eos_token_id", [0, END])
    user = [[10, 11, END], [12, 0], [13, START]]
    script(target, monkeypatch, user, [[20, 21, 0], [22, END]])
    documents = generate_batch(target, "train", 0, replace(SETTINGS, batch_size=3))
    assert [d.answer.tolist() for d in documents] == [[20, 21, 0], [22, END]]
    assert [d.prompt[3:-5].tolist() for d in documents] == [[10, 11], [12]]


def test_a_dialogue_too_short_for_its_prompt_and_an_unknown_split_are_refused(target, tmp_path):
    with pytest.raises(StudyError, match="a prompt alone may take 32; raise it"):
        generate_batch(target, "train", 0, replace(SETTINGS, max_length_tokens=40))
    with pytest.raises(StudyError, match="'test'; choose from train, validation, evaluation"):
        generate_corpus(target, tmp_path, {"test": 1}, SETTINGS)


def test_words_of_the_command_line_reach_the_generator(target, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "load_target", lambda name, **how: asked.append((name, how)) or target)
    folder = generate.generate(
        tmp_path / "made", target="tiny", device="cpu", dtype="float32", train=3, seed=5, max_length_tokens=60,
        max_user_tokens=24, batch_size=8,
    )  # fmt: skip
    assert asked == [("tiny", {"device": "cpu", "dtype": "float32"})]
    corpus = load_corpus(folder, "train", whole_answers=True)
    assert len(corpus.documents) == 3
    given = {
        "seed": 5,
        "max_length_tokens": 60,
        "max_user_tokens": 24,
        "batch_size": 8,
        "temperature": 1.0,
        "top_p": 0.95,
    }
    assert given.items() <= corpus.provenance.items() and corpus.provenance["thinking"] is False
