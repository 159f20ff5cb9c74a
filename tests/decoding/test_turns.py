"""One turn decoded every way: ways take turns, dialogues go on, and transformers' own answers are the same."""

import torch
from examples import drafter, target

from kvshot_lib.decoding import turns
from kvshot_lib.decoding.clock import PARTS
from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.propose import ALONE, Chain
from kvshot_lib.drafters.drafter import in_dtype
from kvshot_lib.text.prompts import Prompt


def test_ways_take_turns():
    order = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}
    found = turns.take_turns(torch.device("cpu"), ways, 2)
    assert order == ["a", "b", "c"] * 2 and [len(seconds) for _, seconds in found.values()] == [2, 2, 2]


def test_a_dialogue_goes_on_from_the_targets_own_answer():
    first, second = turns.dialogue_turns(target(), [Prompt("b", "multi_turn", ("w10 w11", "w12"))], 5)
    answer = decode(target(), None, first.tokens, max_new_tokens=5).tokens
    begun = [*first.tokens, *(answer[:-1] if answer[-1] == target().eos_token_id else answer)]
    assert (first.turn, second.turn) == (0, 1) and [*second.tokens[: len(begun)]] == begun


def test_weights_in_another_dtype_keep_exact_frequencies():
    built = in_dtype(drafter("hidden"), torch.bfloat16)
    assert built.norm.weight.dtype == built.embedding.dtype == torch.bfloat16
    assert torch.equal(built.rotary.inv_freq, drafter("hidden").rotary.inv_freq)


def test_transformers_generate_gives_the_same_answers(monkeypatch):
    """Whatever rules stand in the target's own generation config."""
    monkeypatch.setattr(target().model.generation_config, "no_repeat_ngram_size", 2)
    monkeypatch.setattr(target().model.generation_config, "repetition_penalty", 5.0)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    alone = decode(target(), None, prompt, max_new_tokens=8).tokens
    for given in ({}, {"prompt_lookup_num_tokens": 3}):
        tokens, forwards = turns.generate(target(), prompt, 8, **given)
        assert tokens == alone and 1 <= forwards <= len(tokens)
    assert not target().model._forward_pre_hooks


def test_on_a_cpu_the_timed_pass_tells_its_parts(monkeypatch):
    """No further pass is made, and the parts of a pass take no longer than it."""
    plans, once = [], decode
    monkeypatch.setattr(turns, "decode", lambda *given, **named: plans.append(given[3]) or once(*given, **named))
    turn = turns.Turn("a", 0, "any", (5, 6, 7, 5, 6, 7))
    rows = turns.turn_rows(target(), drafter("hidden"), [Chain(2)], turn, 6, 1)
    assert plans == [ALONE, Chain(2)] and rows["mode"].tolist() == ["alone", "chain"]
    parts = rows[[f"{part}_s" for part in PARTS]].sum(axis=1)
    assert (parts > 0).all() and (parts <= rows["seconds"]).all() and rows["same_tokens"].eq(rows["new_tokens"]).all()
