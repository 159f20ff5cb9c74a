"""Numbers in the text of notebook 07, held against the recorded tables."""

from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
from recorded import benched, card_ratios, fitted, guesses, in_a_long_answer, on_card, table, turned
from recorded import decoded_gap as gap
from stated import checked

from kvshot_lib.metrics import decoding
from kvshot_lib.metrics.resampling import interval
from kvshot_lib.metrics.scorecard import paper_value, read_paper
from kvshot_lib.text.prompts import load_prompts

NOTEBOOK = "notebooks/07_decode_end_to_end.ipynb"
TREE = "8/10/60"


@cache
def drawn(*names):
    """Ratios of every drafter and plan, on the prompts of some tables and on resamples of them."""
    rows = pd.concat([table(name) for name in names])
    return {(key[0], key[-1]): ratio for key, _, _, ratio in decoding.drawn(rows, 2000, 0)}


def told(metric, variant, plan, lot="decode_duel"):
    return [*vars(interval(drawn(lot)[variant, plan][metric])).values()]


def first(plan, minus="", variant="hidden_31_continued", metric="decoded_mat"):
    """A metric of a plan (less that of another) on the prompts that plans were tried on, with its interval."""
    found = drawn("decode_prompts")
    return [*vars(interval(found[variant, plan][metric] - (found[variant, minus][metric] if minus else 0))).values()]


CORES = "cpu x86_64 (2 threads)"
FOUND = "hidden_31_continued"
card = partial(on_card, FOUND)


def loss(numbers):
    value, low, high = numbers
    return [-value, -high, -low]


@cache
def model():
    found = {(key[0], *key[-2:]): ratio for key, _, _, ratio in decoding.drawn(table("decode_prompts"), 2, 0)}
    wide = pd.DataFrame({key: {name: row[0] for name, row in ratio.items()} for key, ratio in found.items()}).T
    wide = wide.rename_axis(["variant", "mode", "plan"]).query("mode != 'alone' and variant != @decoding.PEERS")
    plain, rest = wide["decoded_mat"] / (1 + wide["draft_cost"]), 1 + wide["draft_cost"] + wide["other_cost"]
    whole = wide["decoded_mat"] / (wide["verify_cost"] * rest)
    return wide.assign(plain=plain / wide["speedup"] - 1, whole=whole / wide["speedup"] - 1)


def costs(variant, plan, column="cost"):
    found = decoding.break_even(table("decode_prompts")).set_index(["variant", "plan"])
    return found.loc[(variant, plan), column]


def other_share():
    parts = decoding.parts_table(decoding.fastest(table("decoding")))
    parts = parts[parts["part"].isin(["bookkeeping", "sampling", "rest"]) & (parts["mode"] != "alone")]
    found = 100 * parts.groupby(["variant", "mode"])["share"].sum()
    return [found.min(), found.max()]


def scale(variant):
    found = decoding.paper_scale(table("step_latency"))
    return found[(found["prefix_tokens"] == 2048) & (found["variant"] == variant)]["break_even_mat"].item()


def milliseconds(what, tokens):
    found = table("step_latency")
    return found[(found["what"] == what) & (found["tokens"] == tokens) & (found["prefix_tokens"] == 2048)][
        "milliseconds"
    ].item()


def step_ratio():
    rows = table("decode_prompts").query("variant in ['hybrid_warm', 'hidden']")
    found = {key[0]: ratio["draft_step_s"] for key, _, _, ratio in decoding.drawn(rows, 2000, 0) if key[-1] == "7"}
    return [*vars(interval(found["hybrid_warm"] / found["hidden"])).values()]


def served(*columns):
    return table("serving")[[*columns]].to_numpy().T.flatten()


def apart(rows):
    """Share of answers by chains of two that aren't the target's own to the last token."""
    chains = rows[(rows["mode"] == "chain") & (rows["plan"] == "2")]
    return (chains["same_tokens"] < chains["new_tokens"]).mean()


def prompts(*names):
    return [table(name)["prompt"].nunique() for name in names]


STATED = [
    ("at most 48 tokens", lambda: [table("decode_prompts")["new_tokens"].max()]),
    ("by several plans on 7 prompts; 98 others judge", lambda: prompts("decode_prompts", "decode_duel")),
    (
        "gets 2.21, at .74 times the target's own speed [.70, .78]",
        lambda: [told("decoded_mat", "hidden_continued", TREE)[0], *told("speedup", "hidden_continued", TREE)],
    ),
    ("is 1.31 times as fast as the target alone [1.27, 1.34]", lambda: told("speedup", "hidden_31_continued", "2")),
    (
        "gets .011 tokens more from a forward [−.005, .028] than `hidden_31_continued`, and its speedup is .051 lower [.037, .065]",
        lambda: (
            gap("decoded_mat", "hybrid_warm_31", "hidden_31_continued", "2")
            + loss(gap("speedup", "hybrid_warm_31", "hidden_31_continued", "2"))
        ),
    ),
    (
        "alone writes 776 tokens/s, and the chain is 1.09 times as fast [1.06, 1.12]: its round brings 1.60 tokens, but takes 1.47 times",
        lambda: [
            *(card("2", "target_tokens_per_s")[0], *card("2", "speedup")),
            *(card("2", metric)[0] for metric in ("decoded_mat", "round")),
        ],
    ),
    ("is 1.21 times as fast [1.18, 1.24].", lambda: on_card("hidden_31", "2", "speedup", "long/h200")),
    ("on 102 of the 105 prompts", lambda: [card_ratios()[0]["prompt"].nunique(), len(load_prompts())]),
    (
        "So they write at 1.09 times the target's own speed [1.06, 1.12], four at 1.06 times [1.03, 1.10]",
        lambda: [*card("2", "speedup"), *card("4", "speedup")],
    ),
    (
        "A round with them takes 1.47 times as long as a step of the target alone [1.46, 1.47]",
        lambda: card("2", "round"),
    ),
    (
        "gets 1.79 tokens, and has 1.21 times the target's speed [1.18, 1.24]",
        lambda: [
            on_card("hidden_31", "2", "decoded_mat", "long/h200")[0],
            *on_card("hidden_31", "2", "speedup", "long/h200"),
        ],
    ),
    (
        "a round with two guesses takes 1.73 ms [1.71, 1.74] and a step of the target alone 1.22. The rest of an answer takes 5.6 ms [5.2, 6.2], of the target alone 4.5",
        lambda: [
            *(*vars(interval(fitted(FOUND, "2")[0])).values(), fitted(FOUND, "-")[0][0]),
            *(*vars(interval(fitted(FOUND, "2")[1])).values(), fitted(FOUND, "-")[1][0]),
        ],
    ),
    (
        "1.12 times as fast as the target alone [1.09, 1.16], the longer-trained one 1.26 [1.22, 1.30]",
        lambda: [*in_a_long_answer(FOUND), *in_a_long_answer("hidden_31", "long/h200")],
    ),
    ("The 7 prompts above are easier: 1.80", lambda: [7, first("2")[0]]),
    (
        "of `kv_2` write at .92 times [.90, .95], a block at .96 times [.94, .98]",
        lambda: [*on_card("kv_2", "2", "speedup"), *on_card("block_kv_1", "2", "speedup")],
    ),
    ("two guesses take .21 of a forward of one token [.20, .21]", lambda: card("2", "draft_forwards")),
    (
        "had the same chain at 1.25 times the target's speed",
        lambda: [benched("decode with a chain of 2") / benched("decode alone")],
    ),
    (
        "a draft step is .045 forwards",
        lambda: [milliseconds("draft hidden", 1) / milliseconds("verify", 1)],
    ),
    (
        "The target alone takes 1.3 ms a token",
        lambda: [1000 / card("-", "tokens_per_s")[0]],
    ),
    (
        "takes 1.24 times as long as one (on two cores 1.02). To draft two guesses takes .17 of that verification (on two cores .15)",
        lambda: [
            card("2", "verify_cost")[0],
            model().loc[("hidden_31_continued", "chain", "2"), "verify_cost"],
            card("2", "draft_cost")[0],
            model().loc[("hidden_31_continued", "chain", "2"), "draft_cost"],
        ],
    ),
    (
        "0 of 32,320 tokens differ",
        lambda: table("lossless").query("dtype == 'float32'")[["mismatches", "new_tokens"]].sum(),
    ),
    (
        "40% part from the target's own somewhere on the GPU, 41% on two cores",
        lambda: [
            100 * apart(rows[rows["variant"] == "hidden_31_continued"])
            for rows in (card_ratios()[0], table("decode_duel"))
        ],
    ),
    ("All 35 answers are the same by vLLM", lambda: [served("same_as_alone", "same_as_ours").min()]),
    (
        "We accept 521, 209 and 90 drafts at the three steps. vLLM counts 8 more",
        lambda: [*served("accepted"), served("past_end").sum()],
    ),
    (
        "2.90, where a chain of 2 by `hidden_31_continued` gets 1.80 and one of 7 gets 2.16. So branches bring .74 [.53, .96]",
        lambda: [
            *(first(TREE)[0], 2, first("2")[0], 7, first("7")[0]),
            *first(TREE, "7"),
        ],
    ),
    ("A block gains least, .39 [.29, .56]", lambda: first(TREE, "7", "block_kv_2")),
    ("a speedup lower by .024 [−.178, .145]", lambda: turned(first("4", "2", metric="speedup"))),
    (
        "the latter gets .063 [.047, .078] more with two guesses",
        lambda: guesses("both_4_continued", "hidden_31_continued", 2),
    ),
    (
        "at 1.61, where these prompts have 1.31",
        lambda: [
            benched("decode with a chain of 2", card=CORES) / benched("decode alone", card=CORES),
            told("speedup", "hidden_31_continued", "2")[0],
        ],
    ),
    (
        "On 7 prompts `hybrid_warm_31` came first with 1.42",
        lambda: [7, decoding.fastest(table("decoding"))["speedup"].max()],
    ),
    ("On the others it reaches 1.26 [1.22, 1.29]", lambda: told("speedup", "hybrid_warm_31", "2")),
    (
        "A chain of 7 by `hidden_continued` gains nothing: 1.00 [.96, 1.04]",
        lambda: [7, *told("speedup", "hidden_continued", "7")],
    ),
    ("Its 1.30 has the interval [1.05, 1.60]", lambda: told("speedup", "transformers", "10", "decode_prompts")),
    ("calls chains 10% too fast on average, trees 139%", lambda: 100 * model()["plain"].groupby("mode").mean()),
    (
        "60 tokens cost 2.20 to 2.55 forwards",
        lambda: [60, *model().xs("tree", level="mode")["verify_cost"].agg(["min", "max"])],
    ),
    (
        "is off by 3%, the mean of absolute errors; the largest is 15%",
        lambda: 100 * model()["whole"].abs().agg(["mean", "max"]),
    ),
    ("take 1.9% to 4.0%", other_share),
    (
        "costs .077 verifications, one of `both_4_continued` .195. Both get 1.8 tokens here; on 508 answers",
        lambda: [
            costs("hidden_31_continued", "2"),
            costs("both_4_continued", "2"),
            costs("both_4_continued", "2", "decoded_mat"),
            table("counts")["document"].nunique(),
        ],
    ),
    ("may cost most: up to .59", lambda: [costs("block_kv_2", "4", "affordable")]),
    (
        "eight tokens cost 1.09 forwards, a tree's 61 cost 1.19",
        lambda: [
            milliseconds("verify", 8) / milliseconds("verify", 1),
            61,
            milliseconds("verify", 61) / milliseconds("verify", 1),
        ],
    ),
    (
        "One layer pays from 1.41 tokens on, `kv_4` from 2.01, a block of two layers from 1.18",
        lambda: [scale("kv_1"), scale("kv_4"), scale("block_kv_2")],
    ),
    (
        "A step of the hybrid takes 38% longer than one of `hidden`",
        lambda: [100 * (milliseconds("draft hybrid", 1) / milliseconds("draft hidden", 1) - 1)],
    ),
    (
        "The paper's warm hybrid gets 5.04 tokens by tree, its `hidden` 5.01",
        lambda: [paper_value(read_paper(), v, "tree_decoded_mat") for v in ("hybrid_warm", "hidden_continued")],
    ),
    (
        "On the first 7 prompts it was −.017 [−.108, .090]",
        lambda: [7, *gap("decoded_mat", "hybrid_warm", "hidden_continued", TREE, "decode_prompts")],
    ),
    (
        "+.070 [.041, .103] on all 105",
        lambda: [*gap("decoded_mat", "hybrid_warm", "hidden_continued", TREE, "decode_prompts", "decode_duel"), 105],
    ),
    ("+.075 [.043, .108] on the 98 alone", lambda: [*gap("decoded_mat", "hybrid_warm", "hidden_continued", TREE), 98]),
    (
        "the speedup of `hybrid_warm` is .032 lower [.020, .043]",
        lambda: loss(gap("speedup", "hybrid_warm", "hidden_continued", TREE)),
    ),
    ("Its draft step takes 1.47 times as long [1.40, 1.55]", step_ratio),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)


def test_the_best_of_many_tries_is_the_one_named():
    best = decoding.fastest(table("decoding"))
    assert best.loc[best["speedup"].idxmax(), "variant"] == "hybrid_warm_31"


def test_what_vllm_serves_differs_in_nothing():
    found = table("serving")
    for theirs, ours in (
        ("engine_accepted", found["accepted"] + found["past_end"]),
        ("engine_forwards", found["forwards"]),
        ("same_as_alone", found["prompts"]),
        ("same_as_ours", found["prompts"]),
    ):
        assert (found[theirs] == ours).all() and len(found) == 3


def test_one_of_three_drafters_pays_on_the_card():
    timed = {key: ratio for key, ratio in card_ratios()[1].items() if key[1] != "-"}
    assert {*timed} == {(variant, plan) for variant in ("kv_2", FOUND, "block_kv_1") for plan in "24"}
    low, high = ({key: on_card(*key, "speedup")[edge] for key in timed} for edge in (1, 2))
    assert (
        [key for key in timed if low[key] > 1]
        == [key for key in timed if high[key] >= 1]
        == [(FOUND, "2"), (FOUND, "4")]
    )
    assert min(timed, key=lambda key: timed[key]["draft_forwards"][0])[0] == "block_kv_1"


def test_the_line_through_answers_is_numpys():
    rows = card_ratios()[0].query("variant == @FOUND and plan == '2'")
    assert fitted(FOUND, "2")[:, 0] == pytest.approx(1e3 * np.polyfit(rows["forwards"], rows["seconds"], 1))
