"""What comes of single answers: ratios of sums that a person can compute, intervals over prompts, costs and claim C14."""

import math

import numpy as np
import pandas as pd
import pytest
from decoded import PARTS, alone, answer, answers, latency_rows

from kvshot_lib.metrics import tables
from kvshot_lib.metrics.claims import stated
from kvshot_lib.metrics.decoding import (
    ALL,
    break_even,
    decode_draws,
    decoding_table,
    drawn,
    fastest,
    paper_scale,
    parts_table,
)  # fmt: skip
from kvshot_lib.metrics.scorecard import read_paper, scorecard


def summarised(*rows) -> pd.DataFrame:
    table = tables.check(pd.DataFrame(rows), "decode_prompts", "here")
    return tables.check(decoding_table(table, samples=200)[list(tables.SCHEMAS["decoding"])], "decoding", "here")


def pick(table, **wanted) -> pd.Series:
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_ratios_are_of_sums_over_prompts():
    """9 and 21 tokens after prefill tokens: (8 + 20) / (4 + 10) per forward; 30 tokens in 1 + 4 s against 30 in 2 + 8."""
    found = summarised(
        alone(), answer(),
        alone("2", "rag", 21, 8.0), answer(prompt="2", category="rag", tokens=21, forwards=10, seconds=4.0, same_tokens=20, draft_s=0.5, rest_s=0.25),
    )  # fmt: skip
    row = pick(found, category=ALL, mode="chain")
    assert row["decoded_mat"] == pytest.approx(28 / 14) and row["tokens_per_s"] == pytest.approx(6)
    assert row["target_tokens_per_s"] == pytest.approx(3) and row["speedup"] == pytest.approx(2)
    assert (row["answers"], row["same_answers"], row["prompts"], row["new_tokens"]) == (2, 1, 2, 30)
    assert (row["draft_s"], row["other_s"]) == (0.5, 0.25)
    coding = pick(found, category="coding", mode="chain")
    assert coding["decoded_mat"] == pytest.approx(2) and coding["speedup"] == pytest.approx(2)
    same = pick(found, category=ALL, mode="alone")
    assert same["decoded_mat"] == same["speedup"] == same["speedup_low"] == same["speedup_high"] == 1


def test_an_answer_without_the_target_alone_beside_it_does_not_count():
    found = summarised(alone(), answer(), answer(prompt="2", forwards=1, seconds=0.01))
    assert pick(found, category=ALL, mode="chain")["speedup"] == pytest.approx(2)


def test_intervals_are_over_prompts_and_turns_stay_together():
    """Ten dialogues of two equal turns vary as ten prompts do: the interval is that of the dialogues, not of twenty answers."""
    generator = np.random.default_rng(0)
    forwards = generator.integers(3, 9, 10)

    def rows(turns):
        for prompt, count in enumerate(forwards):
            for turn in range(turns):
                yield alone(str(prompt), turn=turn)
                yield answer(prompt=str(prompt), turn=turn, forwards=int(count))

    once, twice = (pick(summarised(*rows(turns)), category=ALL, mode="chain") for turns in (1, 2))
    for name in ("decoded_mat", "decoded_mat_low", "decoded_mat_high"):
        assert once[name] == pytest.approx(twice[name])
    assert once["decoded_mat_low"] < once["decoded_mat"] < once["decoded_mat_high"]


def test_peers_have_no_parts():
    found = summarised(
        *(row | dict.fromkeys(PARTS) for row in (alone(variant="transformers"), answer(variant="transformers")))
    )
    assert pick(found, category=ALL, mode="chain")[list(PARTS)].isna().all()


def test_the_cost_model_by_hand():
    """Three tokens a forward; a forward of 0.12 s costs 1.5 of the target alone, drafting half of it, the rest a quarter."""
    row = answer(
        tokens=13,
        forwards=4,
        verify_s=0.48,
        draft_s=0.20,
        project_s=0.04,
        bookkeeping_s=0.06,
        sampling_s=0.04,
        rest_s=0.02,
        drafted=16,
    )
    table = tables.check(pd.DataFrame([alone(tokens=13, verify_s=12 * 0.08), row]), "decode_prompts", "here")
    found = next({name: row[0] for name, row in ratio.items()} for *_, ratio in drawn(table[::-1], 5, 0))
    assert found["decoded_mat"] == pytest.approx(3) and found["draft_cost"] == pytest.approx(0.5)
    assert found["verify_cost"] == pytest.approx(1.5) and found["other_cost"] == pytest.approx(0.25)
    assert found["draft_step_s"] == pytest.approx(0.20 / 16)


def test_the_fastest_chain_is_chosen_and_peers_are_no_drafters():
    decoding = decoding_table(tables.check(pd.DataFrame(answers()), "decode_prompts", "here"), samples=50)
    chosen = fastest(decoding)
    assert list(dict.fromkeys(chosen["variant"])) == ["hidden", "kv_2", "hybrid_warm", "block_kv_2"]
    own = decoding[(decoding["variant"] == "kv_2") & (decoding["category"] == ALL) & (decoding["mode"] == "chain")]
    best = own.loc[own["speedup"].idxmax(), "plan"]
    assert chosen[(chosen["variant"] == "kv_2") & (chosen["mode"] == "chain")]["plan"].tolist() == [best]
    assert len(chosen) == 3 * 4  # the target alone, a chain and a tree of each
    parts = parts_table(chosen)
    assert parts.groupby(["variant", "mode"])["share"].sum().to_numpy() == pytest.approx(1)
    row = parts[(parts["variant"] == "kv_2") & (parts["mode"] == "alone") & (parts["part"] == "verify")].iloc[0]
    assert row["milliseconds"] == pytest.approx(1000 * 1.5 / 41) and row["share"] == pytest.approx(1.5 / 1.6)


def test_of_several_seeds_the_first_counts():
    seeds = [alone(), answer(), alone(seed=1), answer(seed=1)]
    decoding = decoding_table(tables.check(pd.DataFrame(seeds), "decode_prompts", "here"), samples=50)
    assert fastest(decoding)["seed"].tolist() == [0, 0]


def test_what_a_pass_may_cost_by_hand():
    """Two tokens a forward: a chain of 4 may cost 1/4 a pass, a tree of 9 levels 1/9, a block 1; with verifications of 1.25,
    0.6 / 4 and so on."""
    plans = (("v", "chain", "4"), ("v", "tree", "8/10/60"), ("block_kv_1", "chain", "7"))
    cost = {"tokens": 9, "forwards": 4, "verify_s": 4 * 1.25 * 0.1, "draft_s": 0.2, "drafted": 1}
    rows = [alone(variant=variant, tokens=9, verify_s=8 * 0.1) for variant in ("v", "block_kv_1")]
    rows += [answer(variant=variant, mode=mode, plan=plan, **cost) for variant, mode, plan in plans]
    rows += [row | {"variant": "transformers"} | dict.fromkeys(PARTS) for row in (alone(), answer())]
    found = break_even(tables.check(pd.DataFrame(rows), "decode_prompts", "here"))
    assert found["passes"].tolist() == [4, 9, 1] and break_even(tables.empty("decode_prompts")).empty
    assert found["affordable"].tolist() == pytest.approx([1 / 4, 1 / 9, 1])
    assert found["affordable_here"].tolist() == pytest.approx([0.6 / 4, 0.6 / 9, 0.6])
    assert found["cost"].tolist() == pytest.approx([0.1, 0.4 / 9, 0.4])


def test_costs_at_the_papers_scale_by_hand():
    """A forward of one token takes 10 ms, of 8 11 ms; a draft step 1 ms, a block of 7 3 ms; prefix entries .5 ms."""
    found = paper_scale(tables.check(pd.DataFrame(latency_rows()), "step_latency", "here")).set_index("variant")
    assert found.loc["hidden", "break_even_mat"] == pytest.approx((11 + 7 * 1 + 0.5) / 10)
    assert found.loc["block_kv_2", "break_even_mat"] == pytest.approx((11 + 3 + 0.5) / 10)
    assert found["kind"].tolist() == ["draft", "draft", "block"] and (found["alone_ms"] == 10).all()


def judged(rows, claim="C14", duel=()) -> pd.DataFrame:
    """The scorecard of C14 or B2 from rows of decode_prompts and of decode_duel."""
    made = [
        tables.check(pd.DataFrame(part), name, "here") if len(part) else tables.empty(name)
        for name, part in (("decode_prompts", rows), ("decode_duel", duel))
    ]
    return scorecard(decode_draws(*made, samples=50), read_paper(), stated(claim)).set_index("claim")


def test_c14_by_hand():
    """hidden_continued: 8 / 4 tokens a forward by chain and tree; hybrid_warm 8 / 2; its draft step takes a third longer."""
    rows = []
    for prompt in "ab":
        for variant, forwards, draft in (("hidden", 4, 0.3), ("hidden_continued", 4, 0.3), ("hybrid_warm", 2, 0.4)):
            rows.append(alone(prompt, variant=variant))
            for mode, plan in (("chain", "2"), ("chain", "8"), ("tree", "8/10/60")):
                more = {"draft_s": draft, "forwards": forwards if plan != "2" else 8}
                row = answer(prompt=prompt, variant=variant, mode=mode, plan=plan, verify_s=1.0, drafted=10, **more)
                rows.append(row)
    card = judged(rows)
    assert card.loc["C14a", "value"] == card.loc["C14b", "value"] == pytest.approx(2)
    assert card.loc["C14c", "value"] == pytest.approx(math.log(4 / 3))
    assert card["verdict"].tolist() == ["not reproduced", "reproduced", "reproduced", "not reproduced"]
    assert card.loc["C14a", "paper_value"] == pytest.approx(5.04 - 5.01)
    more = {"verify_s": 1.0, "drafted": 10, "draft_s": 9.0, "forwards": 2}
    slow = answer(prompt="c", variant="hybrid_warm", mode="chain", plan="8", **more)
    wider = judged([*rows, alone("c", variant="hybrid_warm"), slow, alone("c", variant="hidden_continued")])
    assert wider.loc["C14c", "value"] == card.loc["C14c", "value"]  # `hidden` did not answer c
    without = judged([row for row in rows if row["variant"] != "hidden_continued"])
    assert without.loc[["C14a", "C14b"], "verdict"].tolist() == ["not run"] * 2
    assert without.loc["C14a", "missing"] == "hidden_continued"
    assert judged([])["verdict"].tolist() == ["not run"] * 4


def test_b2_is_judged_on_the_duels_prompts_alone():
    """Chains of 2 there: 3 and 2 times the target's speed; on the prompts that chose them the other way round."""

    def timed(prompt, hybrid, hidden):
        for variant, speed in (("hybrid_warm_31", hybrid), ("hidden_31_continued", hidden)):
            yield alone(prompt, variant=variant, seconds=6.0)
            yield answer(prompt=prompt, variant=variant, plan="2", seconds=6.0 / speed)
            yield answer(prompt=prompt, variant=variant, plan="8", seconds=0.1)

    row = judged([*timed("a", 1.0, 5.0)], "B2", [*timed("b", 3.0, 2.0), *timed("c", 3.0, 2.0)]).loc["B2"]
    assert row["value"] == pytest.approx(3 - 1.1 * 2) and row["verdict"] == "reached"
    assert judged([*timed("a", 1.0, 5.0)], "B2").loc["B2", "verdict"] == "not run"
