"""Speeds in docs/scale.md, held against the recorded bench and decoding."""

import pytest
from recorded import benched, fitted, in_a_long_answer, on_card, table
from stated import checked

from kvshot_lib.metrics.resampling import interval

PAGE, CORES = "docs/scale.md", "cpu x86_64 (2 threads)"
FOUND = "hidden_31_continued"


def rates(what: str) -> list[float]:
    """A row of the bench's table: speed and per cent of the most that could be, on the card and on two cores."""
    return [x for card in ("NVIDIA H200", CORES) for x in (benched(what, card=card), share(what, card))]


def share(what: str, card: str = "NVIDIA H200") -> float:
    return 100 * benched(what, card=card) / benched(what, "floor", card)


def gained(a: str, b: str) -> list[float]:
    """A ratio of two speeds on the card, and both."""
    return [benched(a) / benched(b), benched(a), benched(b)]


def decoded(metric: str) -> list[float]:
    """Of chains of two and of four, with intervals."""
    return [x for plan in ("2", "4") for x in on_card(FOUND, plan, metric)]


def milliseconds(variant: str, plan: str, profile: str = "full/h200") -> list[float]:
    """Of a round, and of an answer besides, with intervals."""
    return [x for row in fitted(variant, plan, profile) for x in vars(interval(row)).values()]


def shares(*parts: str) -> list[float]:
    """Milliseconds of a round in some columns, by the target alone and by chains of two and of four."""
    rows = table("decode_prompts", "full/h200").query("variant == @FOUND").groupby("plan").sum(numeric_only=True)
    return (1e3 * rows[[*parts]].sum(axis=1) / rows["forwards"]).loc[["-", "2", "4"]].tolist()


STATED = [
    ("| capture every feature, tokens/s | 575,234 | 96.6% | 807 | 101% |", lambda: rates("capture")),
    ("alone, tokens/s | 945,058 | 12.5% | 3,432 | 71% |", lambda: rates("train hidden_31")),
    ("| 409,084 | 11.9% | 1,488 | 68% |", lambda: rates("train kv_4")),
    ("| train `hybrid` | 736,571 | 12.3% | 2,582 | 67% |", lambda: rates("train hybrid")),
    ("| 875,923 | 11.1% | 3,938 | 79% |", lambda: rates("train block_kv_2")),
    (
        "long documents/s | 936 | | 1.6 |",
        lambda: [benched("judge block_kv_2"), benched("judge block_kv_2", card=CORES)],
    ),
    ("a chain of seven passes | 574 |", lambda: [benched("judge kv_4")]),
    (
        "answer tokens/s | 76,104 | 13% | 61 | 1.1% |",
        lambda: [
            *(benched(what := "write dialogues, 1024 at a time"), share(what)),
            *(benched(what := "write dialogues, 16 at a time", card=CORES), share(what, CORES)),
        ],
    ),
    ("target alone, tokens/s | 793 | 6.1% | 39 | 9.0% |", lambda: rates("decode alone")),
    ("| 990 | 4.5% | 63 | 8.3% |", lambda: rates("decode with a chain of 2")),
    (
        ".79, 128,260 against 162,638 tokens/s for each of four. Running the target explains all of the loss: its time added, at the speed of capture above, makes .78",
        lambda: [
            *gained("train these by turns from one stream", "train these by turns from memory"),
            1 / (1 + benched("train these by turns from memory") / benched("capture")),
        ],
    ),
    (
        ".966 with 32 texts at a time; .983 with 128 (",
        lambda: [share("capture") / 100, 32, share("capture, 128 texts at a time") / 100, 128],
    ),
    (
        "| 1.85, 695,728 against 376,616 tokens/s",
        lambda: gained(*(f"train kv_2 from live features, {n} processes" for n in (2, 1))),
    ),
    (
        "1.09 [1.06, 1.12] on the prompts below, 1.25 by the bench",
        lambda: [*on_card(FOUND, "2", "speedup"), gained("decode with a chain of 2", "decode alone")[0]],
    ),
    ("| target alone | 1.216 [1.209, 1.223] | 4.5 [4.2, 4.9] |", lambda: milliseconds(FOUND, "-")),
    ("| 1.728 [1.707, 1.745] | 5.6 [5.2, 6.2] |", lambda: milliseconds(FOUND, "2")),
    ("| chain of 4 | 1.890 [1.870, 1.916] | 5.5 [5.0, 6.0] |", lambda: [4, *milliseconds(FOUND, "4")]),
    ("| 1.724 [1.712, 1.734] | 5.6 [5.3, 5.9] |", lambda: milliseconds("hidden_31", "2", "long/h200")),
    ("| 1.663 [1.652, 1.679] | 5.0 [4.6, 5.4] |", lambda: milliseconds("block_kv_1", "2")),
    (
        "would be 1.12 [1.09, 1.16] times as fast as the target, that of `hidden_31` 1.26 [1.22, 1.30]",
        lambda: [*in_a_long_answer(FOUND), *in_a_long_answer("hidden_31", "long/h200")],
    ),
    (
        "0.9 s at the rate of `kv_4`, 0.5 s at that of",
        lambda: [508 / benched("judge kv_4"), 508 / benched("judge block_kv_2")],
    ),
    ("| in steps of the target alone | 1 | 1.47 [1.46, 1.47] | 1.59 [1.59, 1.60] |", lambda: [1, *decoded("round")]),
    ("| wall, prefill included | 1.32 | 1.93 | 2.10 |", lambda: shares("seconds")),
    ("| verifying | 1.30 | 1.61 | 1.63 |", lambda: shares("verify_s")),
    ("| drafting | | 0.27 | 0.41 |", lambda: shares("draft_s", "project_s")[1:]),
    (
        "| loop, sampling, bookkeeping | 0.23 | 0.28 | 0.29 |",
        lambda: shares("bookkeeping_s", "sampling_s", "rest_s"),
    ),
    ("| tokens a round | 1 | 1.60 [1.55, 1.65] | 1.70 [1.63, 1.77] |", lambda: [1, *decoded("decoded_mat")]),
    ("Three tokens take 1.241 [1.238, 1.244] times", lambda: on_card(FOUND, "2", "verify_cost")),
    ("Two guesses take .21 [.20, .21] forwards", lambda: on_card(FOUND, "2", "draft_forwards")),
    (
        "chains of four layers had 1.36 and 1.37 by that code in a run where the target alone was as fast as now, 774 tokens/s",
        lambda: [
            *(on_card(v, "2", "verify_cost", "long/h200")[0] for v in ("states_4", "kv_4")),
            on_card("kv_4", "-", "tokens_per_s", "long/h200")[0],
        ],
    ),
    (
        "brings 1.79 tokens by a chain of 2 and takes 1.48 [1.47, 1.48] steps",
        lambda: [
            *(on_card("hidden_31", "2", "decoded_mat", "long/h200")[0], 2),
            *on_card("hidden_31", "2", "round", "long/h200"),
        ],
    ),
    ("`hidden_31_continued` on 102 prompts (", lambda: [table("decode_prompts", "full/h200")["prompt"].nunique()]),
    ("over rounds, 117 answers each,", lambda: [len(table("decode_prompts", "full/h200")) / 9]),
    (
        "for the price of one, it would reach only 1.79",
        lambda: on_card("hidden_31", "2", "decoded_mat", "long/h200")[:1],
    ),
    (
        "397 to 402 s each for 146.8 million tokens, compiled before (seed 1",
        lambda: [
            *(getattr(table("runs", "one_layer").query("seed == 1")["train_s"], f)() for f in ("min", "max")),
            *(table("runs", "one_layer")["trained_tokens"].median() / 1e6, 1),
        ],
    ),
    ("it is 1.21 [1.18, 1.24] times as", lambda: on_card("hidden_31", "2", "speedup", "long/h200")),
]
test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(PAGE, STATED)


def test_three_of_one_layer_train_side_by_side_at_the_rate_that_is_told():
    rows = table("runs", "one_layer").query("seed == 1")
    assert len(rows) == 3 and (rows["trained_tokens"] / rows["train_s"]).sum() == pytest.approx(1.1e6, abs=5e3)


def test_four_layers_train_at_the_rates_that_are_told():
    """Alone on a card, after the steps in which kernels compile."""
    found = []
    for profile, runs in (("repeat", None), ("long", [("kv_4", 2), ("none_4", 1)])):
        rows = table("history", profile).query("split == 'train' and draft_step == 0 and step >= 625")
        for run, own in rows.groupby(["variant", "seed"]):
            if runs is None or run in runs:
                ends = own.sort_values("step").iloc[[0, -1]]
                found.append(ends["trained_tokens"].diff().iloc[1] / ends["seconds"].diff().iloc[1])
    assert [min(found), max(found)] == pytest.approx([279_000, 310_000], abs=500)
