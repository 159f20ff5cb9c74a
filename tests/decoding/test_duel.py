"""The duel of B2: who meets, on which prompts, and that a killed one goes on."""

import pandas as pd
import pytest
from examples import drafter, target

from kvshot_lib.decoding import duel
from kvshot_lib.decoding import timing as speed
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import goals, tables
from kvshot_lib.text.prompts import Prompt

PROMPTS = [
    Prompt("a", "coding", ("w7 w8 w9",)),
    Prompt("b", "coding", ("w13",)),
    Prompt("c", "multi_turn", ("w10 w11", "w12")),
]
WORDS = "--new-tokens 6 --repeats 1 --device cpu --dtype float32"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Three drafters of a tiny target, timed on the prompt ``a``."""
    for variant in ("kv_1", "hidden", "hybrid"):
        save_drafter(drafter(variant), tmp_path / f"runs/{variant}/seed0", variant=variant, seed=0)
    for module in (speed, duel):
        monkeypatch.setattr(module, "load_prompts", lambda name: PROMPTS)
    monkeypatch.setattr(speed, "load_target", lambda *_, **__: target())
    few = ["--prompts-per-category", "1", "--chain", "2,3", "--tree", "none", "--prefix", "none"]
    monkeypatch.setattr(speed, "load_prompts", lambda name: PROMPTS[:1])
    assert speed.main([str(tmp_path), *WORDS.split(), *few]) == 0
    return tmp_path


def test_the_fastest_of_each_side_meet_on_the_other_prompts(results, capsys):
    known = tables.read(results / "tables", "decode_prompts")
    chosen = goals.fastest_chains(known, ["a"])
    assert duel.main([str(results), *WORDS.split()]) == 0
    rows = tables.read(results / "tables", "decode_duel")
    assert set(zip(rows["prompt"], rows["turn"])) == {("b", 0), ("c", 0), ("c", 1)}
    chains = rows[rows["mode"] == "chain"]
    assert set(zip(chains["variant"], chains["plan"])) == set(chosen.values()) and len(rows) == 2 * 2 * 3
    assert (rows["same_tokens"] == rows["new_tokens"]).all()
    claim, draws = goals.speed_goal(known, rows, samples=20)
    assert draws.keys["prompts"].tolist() == [2, 2] and chosen["kv"][0] in claim.statement
    pd.testing.assert_frame_equal(tables.read(results / "tables", "decode_prompts"), known)


def test_a_stopped_duel_goes_on(results, monkeypatch, capsys):
    measured, slow = [], duel.measure_drafter
    monkeypatch.setattr(duel, "measure_drafter", lambda *given: measured.append(given[3].prompt) or slow(*given))
    assert duel.main([str(results), *WORDS.split(), "--stop-after-s", "0"]) == 0
    assert not measured and "stopped early: the same command goes on" in capsys.readouterr().out
    assert duel.main([str(results), *WORDS.split()]) == duel.main([str(results), *WORDS.split()]) == 0
    assert len(measured) == 6


@pytest.mark.parametrize(
    "words, told",
    [
        ("--tables nowhere", "nowhere has no decode_prompts to choose by: run `python -m kvshot_lib.decoding.timing` first"),
        ("--new-tokens 1", "--new-tokens starts at 2"),
    ],
)
def test_bad_input_is_one_line(results, words, told, capsys):
    assert duel.main([str(results), *WORDS.split(), *words.split()]) == 1
    assert told in capsys.readouterr().err


def test_c14s_pair_decodes_with_the_longest_chain_and_the_tree():
    rows = []
    for variant in ("hybrid_warm", "hidden_continued", "kv_1"):
        plans = (("alone", "-", 10.0), ("chain", "2", 5.0), ("chain", "10", 8.0), ("tree", "2/3/8", 9.0))
        rows += [
            dict.fromkeys(tables.SCHEMAS["decode_prompts"], 0.0)
            | {"variant": variant, "seed": 2, "prompt": "a", "turn": 0, "category": "any", "dtype": "x", "device": "x"}
            | {"mode": mode, "plan": plan, "seconds": seconds, "new_tokens": 10, "forwards": 5}
            for mode, plan, seconds in plans
        ]
    known = pd.DataFrame(rows)
    found = duel.pairs(known)
    assert found["hybrid_warm/seed2"][-2:] == [("chain", "10"), ("tree", "2/3/8")]
    assert ("chain", "2") in found["hidden_continued/seed2"] and len(found["hidden_continued/seed2"]) == 3
    assert found["kv_1/seed2"] == [("chain", "2")] and len(found) == 3
    with pytest.raises(StudyError, match="no chain of a drafter over hidden: time one"):
        duel.pairs(known[known["variant"] != "hidden_continued"])
    assert (duel.as_plan("chain", "4"), duel.as_plan("tree", "2/3/8")) == (Chain(4), Tree(2, 3, 8))


def test_no_prompt_left_is_told(results, monkeypatch):
    monkeypatch.setattr(duel, "load_prompts", lambda name: PROMPTS[:1])
    with pytest.raises(StudyError, match="every prompt of study was used to choose"):
        duel.duel(results, results / "tables", duel.Settings(6, 1), device="cpu", dtype="float32")
