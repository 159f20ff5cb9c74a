"""Measuring decoding: parts that add up, rows that survive a kill, runs without anything but weights."""

import time

import numpy as np
import pandas as pd
import pytest
import torch
from examples import drafter, target

from kvshot_lib.decoding import decode as decoding
from kvshot_lib.decoding import propose as tree
from kvshot_lib.decoding import timing as speed
from kvshot_lib.decoding import timing_rows as speed_rows
from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.parts import PARTS, PartClock, timed_parts
from kvshot_lib.decoding.peers import generate, peers
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.decoding.verify import TargetRun
from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.drafters.drafter import in_dtype
from kvshot_lib.metrics import tables
from kvshot_lib.text.prompts import Prompt

WORDS = "--new-tokens 6 --repeats 2 --prompts-per-category 1 --chain 2,3 --tree 1,2,5 --prefix 20 --step-tokens 4 --device cpu --dtype float32"
PROMPTS = [
    Prompt("a", "coding", ("w7 w8 w9",)),
    Prompt("b", "multi_turn", ("w10 w11", "w12")),
    Prompt("c", "coding", ("w13",)),
]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two runs of a tiny target: weights and what they are, no run.json."""
    for variant in ("kv_1", "hidden"):
        save_drafter(drafter(variant), tmp_path / f"runs/{variant}/seed0", variant=variant, seed=0)
    monkeypatch.setattr(speed, "load_prompts", lambda name: PROMPTS)
    monkeypatch.setattr(speed, "load_target", lambda *_, **__: target())
    return tmp_path


def test_every_moment_belongs_to_one_part():
    clock = PartClock(torch.device("cpu"))
    started = time.perf_counter()
    clock.enter("draft")
    time.sleep(0.02)
    clock.enter("bookkeeping")
    time.sleep(0.03)
    clock.leave()
    clock.leave()
    assert clock.seconds["draft"] == pytest.approx(0.02, abs=0.01)
    assert clock.seconds["bookkeeping"] == pytest.approx(0.03, abs=0.01)
    assert sum(clock.seconds.values()) <= time.perf_counter() - started + 1e-3


@pytest.mark.parametrize("plan, variant", [(Chain(3), "hybrid"), (Tree(2, 3, 8), "kv_1"), (Chain(3), "block")])
def test_parts_add_up_and_leave_no_trace(plan, variant, request):
    built = block_drafter() if variant == "block" else drafter(variant)
    before = TargetRun.verify, decoding.accept, tree.run_frontier, "forward" in vars(target().model)
    started = time.perf_counter()
    with timed_parts(target()) as clock:
        out = decode(target(), built, [5, 6, 7], plan, max_new_tokens=12, eos_token_ids=(), timed=False)
    took = time.perf_counter() - started
    assert 0.5 * took < sum(clock.seconds.values()) <= took + 1e-3
    assert all(clock.seconds[part] > 0 for part in PARTS) and out.seconds == {}
    assert (TargetRun.verify, decoding.accept, tree.run_frontier, "forward" in vars(target().model)) == before
    assert out.tokens == decode(target(), built, [5, 6, 7], plan, max_new_tokens=12, eos_token_ids=()).tokens


def block_drafter():
    from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
    from kvshot_lib.features.spec import feature_spec

    return build_drafter(DrafterConfig("block"), target(), feature_spec(target()), torch.arange(400)).eval()


def test_parts_are_put_back_after_an_error():
    before = TargetRun.prefill
    with pytest.raises(ZeroDivisionError), timed_parts(target()):
        1 / 0  # noqa: B018
    assert TargetRun.prefill is before and "forward" not in vars(target().model)


def test_ways_take_turns():
    order = []
    found = speed_rows.take_turns(
        torch.device("cpu"), {name: lambda name=name: order.append(name) for name in "abc"}, 2
    )
    assert order == ["a", "b", "c"] * 2 and [len(seconds) for _, seconds in found.values()] == [2, 2, 2]


def test_a_dialogue_goes_on_from_the_targets_own_answer():
    turns = speed_rows.dialogue_turns(target(), PROMPTS[1:2], 5)
    answer = decode(target(), None, turns[0].tokens, max_new_tokens=5).tokens
    begun = [*turns[0].tokens, *(answer[:-1] if answer[-1] == target().eos_token_id else answer)]
    assert [turn.turn for turn in turns] == [0, 1] and turns[1].tokens[: len(begun)] == begun
    assert [prompt.id for prompt in speed_rows.first_of_each(PROMPTS, 1)] == ["a", "b"]


def test_weights_in_another_dtype_keep_exact_frequencies():
    built = in_dtype(drafter("hidden"), torch.bfloat16)
    assert built.norm.weight.dtype == built.embedding.dtype == torch.bfloat16
    assert torch.equal(built.rotary.inv_freq, drafter("hidden").rotary.inv_freq)


def test_transformers_generate_gives_the_same_answers():
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    alone = decode(target(), None, prompt, max_new_tokens=8).tokens
    for peer in peers(3, assistant=target().model):
        tokens, forwards = generate(target(), prompt, peer, 8)
        assert tokens == alone and 1 <= forwards <= len(tokens)
    assert not target().model._forward_pre_hooks


def test_tables_of_a_whole_run(results, capsys):
    assert speed.main([str(results), *WORDS.split()]) == 0
    rows, steps, found = (
        tables.read(results / "tables", name) for name in ("decode_prompts", "decode_steps", "decoding")
    )
    assert list(dict.fromkeys(rows["variant"])) == ["hidden", "kv_1", "transformers"]
    plans = {("alone", "-"), ("chain", "2"), ("chain", "3"), ("tree", "1/2/5")}
    for variant in ("hidden", "kv_1"):
        own = rows[rows["variant"] == variant]
        assert set(zip(own["mode"], own["plan"])) == plans and len(own) == 3 * len(
            plans
        )  # one answer, and a dialogue of two
        assert (own["same_tokens"] == own["new_tokens"]).all()  # greedy, float32: the target's own answers
        assert (
            own["new_tokens"] == 1 + own["forwards"] + own["accepted"]
        ).mean() > 0.5  # but where an answer ends on a draft
    assert (rows["fastest_s"] <= rows["seconds"]).all() and (rows["seconds"] <= rows["slowest_s"]).all()
    assert set(steps["mode"]) == {"alone", "chain", "tree"} and set(steps["part"]) == {*PARTS} - {"prefill"}
    assert set(found["category"]) == {"all", "coding", "multi_turn"}
    assert np.allclose(found[found["mode"] == "alone"]["speedup"], 1)


def test_a_killed_run_goes_on_and_a_retrained_drafter_starts_anew(results, monkeypatch):
    measured = []
    slow = speed.measure_drafter

    def counting(*given):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(given[3].prompt)
        return slow(*given)

    monkeypatch.setattr(speed, "measure_drafter", counting)
    with pytest.raises(KeyboardInterrupt):
        speed.main([str(results), *WORDS.split()])
    kept = {path: path.read_bytes() for path in results.glob("decode/*/hidden.seed0/*.csv")}
    monkeypatch.setattr(speed, "measure_drafter", lambda *given: measured.append(given[3].prompt) or slow(*given))
    assert speed.main([str(results), *WORDS.split()]) == 0
    assert len(measured) == 6  # three turns of two drafters, none twice
    first = pd.read_csv(next(path for path in kept if path.stem == "decode_prompts"))
    rows = tables.read(results / "tables", "decode_prompts")
    again = rows[rows["variant"] == "hidden"].iloc[: len(first)]
    assert again["seconds"].tolist() == first["seconds"].tolist()
    built = drafter("hidden")
    torch.nn.init.zeros_(built.norm.weight)
    save_drafter(built, results / "runs/hidden/seed0", variant="hidden", seed=0)
    assert speed.main([str(results), *WORDS.split()]) == 0
    assert len(measured) == 9


def test_out_of_time_is_told_and_kept_rows_stay(results, tmp_path, capsys):
    assert speed.main([str(results), "hidden/seed0", *WORDS.split()]) == 0
    kept = tmp_path / "kept"
    (results / "tables").rename(kept)
    for path in results.glob("decode/*/*/*.csv"):
        path.unlink()
    words = [str(results), "kv_1/seed0", *WORDS.split(), "--stop-after-s", "0", "--keep", str(kept)]
    assert speed.main(words) == 0
    assert "stopped early: the same command goes on" in capsys.readouterr().out
    assert set(tables.read(results / "tables", "decode_prompts")["variant"]) == {"hidden", "transformers"}


@pytest.mark.parametrize(
    "words, told",
    [
        (["kv_9/seed0"], "kv_9/seed0: no trained drafter in"),
        (["--chain", "2,x"], "--chain '2,x': give whole numbers"),
        (["--tree", "8,10"], "--tree takes depth,top_k,total"),
        (["--chain", "0"], "--chain is too small"),
        (["--repeats", "0"], "--repeats is too small"),
        (["--new-tokens", "1"], "--new-tokens is too small"),
    ],
)
def test_bad_words_are_one_line(results, capsys, words, told):
    assert speed.main([str(results), *words]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and told in message and message.count("\n") == 1


def test_no_runs_is_one_line(tmp_path, capsys):
    assert speed.main([str(tmp_path)]) == 1
    assert "no trained drafter in" in capsys.readouterr().err
