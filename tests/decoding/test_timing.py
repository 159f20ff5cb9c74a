"""Measuring decoding: whole tables, parts that survive a kill, runs without anything but weights, and the duel on other prompts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from examples import drafter, target

from kvshot_lib.decoding import timing
from kvshot_lib.decoding.propose import Chain, Tree
from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.decoding import decoding_table, fastest
from kvshot_lib.text.prompts import Prompt

SMALL = {"new_tokens": 6, "device": "cpu", "dtype": "float32"}
SPEED = SMALL | {"repeats": 2, "prompts_per_category": 1, "chains": [2, 3], "tree": [1, 2, 5]}
QUICK = SPEED | {"repeats": 1, "chains": [2], "tree": []}  # where what is measured matters, not how
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
    monkeypatch.setattr(timing, "load_prompts", lambda name: PROMPTS)
    monkeypatch.setattr(timing, "load_target", lambda *_, **__: target())
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """The prompts that were measured, a name a turn and drafter."""
    names, slow = [], timing.turn_rows
    monkeypatch.setattr(timing, "turn_rows", lambda *given: names.append(given[3].prompt) or slow(*given))
    return names


def test_tables_of_a_whole_run(results):
    timing.measure_speed(results, **SPEED)
    rows, found = (tables.read(results / "tables", name) for name in ("decode_prompts", "decoding"))
    assert list(dict.fromkeys(rows["variant"])) == ["hidden", "kv_1", "transformers"]
    plans = {("alone", "-"), ("chain", "2"), ("chain", "3"), ("tree", "1/2/5")}
    for variant in ("hidden", "kv_1"):
        own = rows[rows["variant"] == variant]
        assert set(zip(own["mode"], own["plan"])) == plans and len(own) == 3 * len(
            plans
        )  # an answer, a dialogue of two
        assert (own["same_tokens"] == own["new_tokens"]).all()  # greedy, float32: the target's own answers
        full = own["new_tokens"] == 1 + own["forwards"] + own["accepted"]
        assert full.mean() > 0.5  # but where an answer ends on a draft
    assert (rows["fastest_s"] <= rows["seconds"]).all() and (rows["seconds"] <= rows["slowest_s"]).all()
    assert set(found["category"]) == {"all", "coding", "multi_turn"}
    assert np.allclose(found[found["mode"] == "alone"]["speedup"], 1)


def test_a_killed_run_goes_on_and_a_retrained_drafter_starts_anew(results, measured, monkeypatch):
    counted = timing.turn_rows

    def killed(*given):
        if len(measured) == 3:
            raise KeyboardInterrupt
        return counted(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(timing, "turn_rows", killed)
        timing.measure_speed(results, **QUICK)
    kept = {path: pd.read_parquet(path) for path in results.glob("decode/*/hidden.seed0.*turn*.parquet")}
    timing.measure_speed(results, **QUICK)
    assert len(measured) == 6 and kept  # three turns of two drafters, none twice
    rows = tables.read(results / "tables", "decode_prompts")
    for part in kept.values():
        assert np.isin(part["seconds"].map("{:.6g}".format).astype(float), rows["seconds"]).all()
    built = drafter("hidden")
    torch.nn.init.zeros_(built.norm.weight)
    save_drafter(built, results / "runs/hidden/seed0", variant="hidden", seed=0)
    timing.measure_speed(results, **QUICK)
    assert len(measured) == 9
    timing.measure_speed(results, **QUICK, fingerprint="other code")
    assert len(measured) == 15


@pytest.mark.parametrize(
    "given, told",
    [
        ({"runs": ["kv_9/seed0"]}, "kv_9/seed0"),
        ({"tree": [8, 10]}, "--tree takes depth,top_k,total"),
        ({"chains": [0]}, "--chains is too small"),
        ({"repeats": 0}, "--repeats is too small"),
        ({"new_tokens": 1}, "--new-tokens is too small: it starts at 2"),
    ],
)
def test_bad_input_is_one_line(results, given, told):
    with pytest.raises(StudyError, match=told) as caught:
        timing.measure_speed(results, **SPEED | given)
    assert "\n" not in str(caught.value)


def test_what_can_not_decode_is_left_out_and_named(results, capsys):
    built = drafter("kv_1")
    built.config = replace(built.config, query_from="constant")
    save_drafter(built, results / "runs/kv_1_constant_query/seed0", variant="kv_1_constant_query", seed=0)
    found = timing.load_runs(results, [], "cpu", "float32")
    assert [*found.drafters] == ["hidden/seed0", "kv_1/seed0"]
    assert "kv_1_constant_query/seed0: left out, a control" in capsys.readouterr().out


def test_the_two_fastest_meet_on_the_other_prompts(results, monkeypatch, measured):
    monkeypatch.setattr(timing, "load_prompts", lambda name: PROMPTS[:1])
    timing.measure_speed(results, **QUICK | {"chains": [2, 3]})
    with pytest.raises(StudyError, match="every prompt of study was used to choose"):
        timing.duel(results, **SMALL)
    monkeypatch.setattr(timing, "load_prompts", lambda name: PROMPTS)
    known = tables.read(results / "tables", "decode_prompts")
    best = fastest(decoding_table(known, 1)).query("mode == 'chain'").nlargest(2, "speedup")
    measured.clear()
    for _ in range(2):  # the second finds everything measured
        timing.duel(results, **SMALL, repeats=1)
    assert len(measured) == 6
    rows = tables.read(results / "tables", "decode_duel")
    assert set(zip(rows["prompt"], rows["turn"])) == {("b", 0), ("b", 1), ("c", 0)}
    chains = rows[rows["mode"] == "chain"]
    assert (
        set(zip(chains["variant"], chains["plan"])) == set(zip(best["variant"], best["plan"]))
        and len(rows) == 2 * 2 * 3
    )
    assert (rows["same_tokens"] == rows["new_tokens"]).all()
    pd.testing.assert_frame_equal(tables.read(results / "tables", "decode_prompts"), known)


def test_a_duel_needs_something_to_choose_by(results):
    with pytest.raises(StudyError, match="no decode_prompts to choose by: run `kvshot decode speed` first"):
        timing.duel(results, **SMALL)
    with pytest.raises(StudyError, match="--new-tokens is too small"):
        timing.duel(results, **SMALL | {"new_tokens": 1})


def test_c14s_pair_decodes_with_the_longest_chain_and_the_tree():
    rows = []
    for variant in ("hybrid_warm", "hidden_continued", "kv_1"):
        first = 5.0 if variant != "hybrid_warm" else 6.0
        plans = (("alone", "-", 10.0), ("chain", "2", first), ("chain", "10", 8.0), ("tree", "2/3/8", 9.0))
        rows += [
            dict.fromkeys(tables.SCHEMAS["decode_prompts"], 0.0)
            | {"variant": variant, "seed": 2, "prompt": "a", "turn": 0, "category": "any", "dtype": "x", "device": "x"}
            | {"mode": mode, "plan": plan, "seconds": seconds, "new_tokens": 10, "forwards": 5}
            for mode, plan, seconds in plans
        ]
    known = pd.DataFrame(rows)
    found = timing.pairs(known)
    assert found["hybrid_warm/seed2"] == [Chain(10), Tree(2, 3, 8)]
    assert found["hidden_continued/seed2"] == [Chain(2), Chain(10), Tree(2, 3, 8)]
    assert found["kv_1/seed2"] == [Chain(2)] and len(found) == 3
    with pytest.raises(StudyError, match="chains of 1 drafters, a duel takes two: run"):
        timing.pairs(known[known["variant"] == "hidden_continued"])
