"""What notebook 07 draws and says: chosen plans, break-even costs and C14 by hand, every figure from small tables."""

import math

import pandas as pd
import pytest
from decoded import alone, answer, answers, latency_rows, steps

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import decode_claims, decode_costs, tables
from kvshot_lib.metrics.decode_tables import ALL, decoding_table, model_table
from kvshot_lib.plots import decoding as figures_decoding
from kvshot_lib.plots import report_decode_costs, report_decoding
from kvshot_lib.plots import style as figures


@pytest.fixture(scope="module")
def prompts():
    return tables.check(pd.DataFrame(answers()), "decode_prompts", "here")


@pytest.fixture(scope="module")
def decoding(prompts):
    return decoding_table(prompts, samples=50)


@pytest.fixture(scope="module")
def timed():
    return tables.check(pd.DataFrame(steps()), "decode_steps", "here")


LATENCY = tables.check(pd.DataFrame(latency_rows()), "step_latency", "here")


def test_the_fastest_chain_is_chosen_and_peers_are_no_drafters(decoding):
    plans = decode_costs.best_plans(decoding)
    assert list(dict.fromkeys(plans["variant"])) == ["hidden", "kv_2", "hybrid_warm", "block_kv_2"]
    own = decoding[(decoding["variant"] == "kv_2") & (decoding["category"] == ALL) & (decoding["mode"] == "chain")]
    fastest = own.loc[own["speedup"].idxmax(), "plan"]
    assert plans[(plans["variant"] == "kv_2") & (plans["mode"] == "chain")]["plan"].tolist() == [fastest]
    assert len(plans) == 3 * 4  # the target alone, a chain and a tree of each


def test_one_dtype_and_one_seed():
    rows = [answer(), answer(dtype="bfloat16"), answer(dtype="bfloat16", seed=1)]
    table = decode_costs.one_dtype(tables.check(pd.DataFrame(rows), "decode_prompts", "here"))
    assert table["dtype"].tolist() == ["bfloat16"] * 2 and decode_costs.first_seed(table)["seed"].tolist() == [0]
    with pytest.raises(StudyError, match="dtype='float16' was not measured; measured: bfloat16"):
        decode_costs.one_dtype(table, "float16")
    assert decode_costs.one_dtype(tables.empty("decoding"), "bfloat16").empty


def test_what_a_pass_may_cost_by_hand():
    """Two tokens a forward: a chain of 4 may cost 1/4 a pass, a tree of 9 levels 1/9, a block 1; with verifications of 1.25, 0.6 / 4 and so on."""
    metrics = {"decoded_mat": 2.0, "draft_cost": 0.4, "verify_cost": 1.25}
    rows = [
        [
            "v" if mode != "block" else "block_kv_1",
            0,
            "chain" if mode == "block" else mode,
            plan,
            metric,
            value,
            0.0,
            0.0,
        ]
        for mode, plan in (("chain", "4"), ("tree", "8/10/60"), ("block", "7"))
        for metric, value in metrics.items()
    ]
    columns = ["variant", "seed", "mode", "plan", "metric", "value", "low", "high"]
    found = decode_costs.break_even(pd.DataFrame(rows, columns=columns)).set_index(["variant", "mode"])
    assert found["affordable"].tolist() == pytest.approx([1 / 4, 1 / 9, 1])
    assert found["affordable_here"].tolist() == pytest.approx([0.6 / 4, 0.6 / 9, 0.6])
    assert found["cost"].tolist() == pytest.approx([0.1, 0.4 / 9, 0.4])
    curves = decode_costs.break_even_curves(found.reset_index())
    assert (curves["speedup"] > 1).sum() == ((curves["cost"] < 0.25) & (curves["variant"] == "v")).sum() + (
        (curves["cost"] < 1) & (curves["variant"] == "block_kv_1")
    ).sum()


def test_the_branchs_price_and_what_grows_by_hand(timed):
    price = decode_costs.branch_price(timed)
    assert price["extra"].tolist() == pytest.approx([0.25] * 4) and set(price["variant"]) == {"hybrid_warm"}
    assert price["extra_with_prefix"].tolist() == pytest.approx([0.25] * 4)
    grown = decode_costs.growth(timed).set_index(["variant", "mode", "part"])["grown"]
    assert grown["hidden", "chain", "verify"] == pytest.approx((512 - 128) / 64)
    assert (grown.drop("verify", level="part") == 0).all()
    assert "changed by +0.0% to +0.0%" in report_decode_costs.what_grows(timed)
    assert "+25% to +25%" in report_decode_costs.price_of_the_branch(timed)
    assert decode_costs.branch_price(timed[timed["variant"] == "hidden"]).empty


def test_costs_at_the_papers_scale_by_hand():
    """A forward of one token takes 10 ms, of 9 12 ms, of 61 20 ms; draft steps 1 ms, levels of ten tokens 2 ms, a block of 7 3 ms."""
    found = decode_costs.paper_scale(LATENCY).set_index(["variant", "mode"])
    assert found.loc[("hidden", "chain"), "break_even_mat"] == pytest.approx((12 + 8 * 1 + 0.5) / 10)
    assert found.loc[("hidden", "tree"), "break_even_mat"] == pytest.approx((20 + 1 + 8 * 2 + 0.5) / 10)
    assert found.loc[("block_kv_2", "chain"), "break_even_mat"] == pytest.approx((11 + 3 + 0.5) / 10)
    assert len(found) == 5 and "+20% (1 token after 512)" in report_decode_costs.price_at_the_papers_scale(LATENCY)


def test_c14_by_hand():
    """hidden_continued: 8 / 4 tokens a forward by chain and tree; hybrid_warm 8 / 2; its draft step takes a third longer than hidden's."""
    rows = []
    for prompt in "ab":
        for variant, forwards, draft in (("hidden", 4, 0.3), ("hidden_continued", 4, 0.3), ("hybrid_warm", 2, 0.4)):
            rows.append(alone(prompt, variant=variant))
            for mode, plan in (("chain", "2"), ("chain", "8"), ("tree", "8/10/60")):
                more = {"draft_s": draft, "forwards": forwards if plan != "2" else 8}
                rows.append(
                    answer(prompt=prompt, variant=variant, mode=mode, plan=plan, verify_s=1.0, drafted=10, **more)
                )
    table = tables.check(pd.DataFrame(rows), "decode_prompts", "here")
    card = decode_claims.decode_rows(table, samples=50).set_index("claim")
    assert card.loc["C14a", "value"] == card.loc["C14b", "value"] == pytest.approx(2)
    assert card.loc["C14c", "value"] == pytest.approx(math.log(4 / 3))
    assert card["verdict"].tolist() == ["not reproduced", "reproduced", "reproduced", "not reproduced"]
    more = answer(
        prompt="c", variant="hybrid_warm", mode="chain", plan="8", verify_s=1.0, drafted=10, draft_s=9.0, forwards=2
    )
    both = [*rows, alone("c", variant="hybrid_warm"), more, alone("c", variant="hidden_continued")]
    wider = decode_claims.decode_rows(tables.check(pd.DataFrame(both), "decode_prompts", "here"), samples=50).set_index(
        "claim"
    )
    assert wider.loc["C14c", "value"] == card.loc["C14c", "value"]  # `hidden` did not answer c
    assert card.loc["C14a", "paper_value"] == pytest.approx(5.04 - 5.01)
    without = decode_claims.decode_rows(table[table["variant"] != "hidden_continued"], samples=50).set_index("claim")
    assert without.loc[["C14a", "C14b"], "verdict"].tolist() == ["not run"] * 2
    assert without.loc["C14a", "missing"] == "hidden_continued"
    nothing = decode_claims.decode_rows(tables.empty("decode_prompts"), samples=50)
    assert set(nothing["verdict"]) == {"not run"}
    tables.check(nothing, "scorecard", "here")


def test_every_figure_is_drawn_and_every_sentence_written(prompts, decoding, timed, tmp_path):
    plans, model = decode_costs.best_plans(decoding), model_table(prompts, samples=50)
    costs, scale = decode_costs.break_even(model), decode_costs.paper_scale(LATENCY)
    mats, parts = decode_costs.chosen(decoding, plans, "chain", "tree"), decode_costs.parts_table(decoding, plans)
    curves, chains = decode_costs.break_even_curves(costs), decode_costs.chosen(costs, plans, "chain")
    drawn = {
        "mat": (figures_decoding.draw_mat(mats), mats),
        "speed": (figures_decoding.draw_speed(decoding[decoding["category"] == ALL]), mats),
        "parts": (figures_decoding.draw_parts(parts), parts),
        "steps": (figures_decoding.draw_steps(decode_costs.step_parts(timed)), timed),
        "model": (figures_decoding.draw_model(model), model),
        "even": (figures_decoding.draw_break_even(curves, chains), curves),
        "scale": (figures_decoding.draw_paper_scale(scale), scale),
    }
    for name, (figure, table) in drawn.items():
        assert figures.save_figure(figure, table, tmp_path, name).stat().st_size > 5000
    assert parts.groupby(["variant", "mode"])["share"].sum().to_numpy() == pytest.approx(1)
    acceptance = pd.DataFrame({"variant": ["kv_2"], "metric": ["measured_mat"], "value": [1.7]})
    assert "| 1.700 |" in report_decoding.mats(decoding, plans, acceptance)
    best = decoding[(decoding["category"] == ALL) & (decoding["variant"] != "transformers")]["speedup"].max()
    assert f"{best:.3f} [" in report_decoding.in_short(decoding, plans, decoding[:0])
    assert "The study's goal of 1.3" in report_decoding.in_short(decoding, plans, pd.DataFrame())
    fresh = decoding[(decoding["variant"] == "hidden")].assign(
        prompts=9, speedup=1.2, speedup_low=1.1, speedup_high=1.29
    )
    told = report_decoding.in_short(decoding, plans, fresh)
    assert "On 9 others" in told and "1.200 [1.100, 1.290]" in told and told.count("goal of 1.3 is missed") == 1
    assert "6 of 6" in report_decoding.speeds(decoding, plans)
    assert "the goal of less than 8% is" in report_decode_costs.where_time_goes(parts)
    assert "off by" in report_decode_costs.model_errors(model) and "| yes |" in report_decode_costs.affordable(chains)
    assert "Architecture tiny with **random weights**" in report_decode_costs.at_the_papers_scale(scale, LATENCY)


def test_the_lossless_report_counts_by_number_format():
    row = {"variant": "hidden", "seed": 0, "mode": "chain", "prompt": "1", "new_tokens": 30, "target_forwards": 10, "accepted": 19, "mismatches": 0,
           "first_mismatch": None, "logit_gap": None, "dtype": "float32", "device": "here", "git_revision": "x", "torch": "x", "transformers": "x", "date": "x"}  # fmt: skip
    other = row | {"dtype": "bfloat16", "mismatches": 4, "first_mismatch": 26, "logit_gap": 0.125}
    told = report_decoding.lossless(tables.check(pd.DataFrame([row, row | {"prompt": "2"}, other]), "lossless", "here"))
    assert "In float32: 0 of 60 generated tokens differ" in told
    assert "| `hidden` | chain | bfloat16 | 1 | 30 | 2.90 | 4 | 1 | 0.125 |" in told
