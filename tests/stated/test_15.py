"""Numbers in the text of notebook 15, held against the recorded tables of both halves."""

import numpy as np
import recorded
from notebook_checks import ROOT
from recorded import TRAINED_ON, by_context, turned
from recorded import in_context as of
from stated import checked

from kvshot_lib.study.profiles import load_profile
from kvshot_lib.text.corpus import load_corpus

NOTEBOOK = "notebooks/15_lengthen_the_context.ipynb"
DRAFTERS = ("hidden_31", "kv_2", "states_2", "none_2")


def at(variant: str, low: int, window: int = 0) -> float:
    """Expected MAT of a bin, mean over seeds."""
    keys = by_context().keys
    own = (keys["variant"] == variant) & (keys["bin_low"] == low) & (keys["window_tokens"] == window)
    return float(by_context().values[own & (keys["metric"] == "expected_mat"), 0].mean())


def size(name: str) -> list[int]:
    extract = load_profile(name).extract
    return [extract["train_documents"], extract["max_length_tokens"]]


STATED = [
    (
        "15.7 million training tokens a run, judged on 64 dialogues of 8,192 tokens",
        lambda: [
            *{tokens / 1e6 for p in TRAINED_ON.values() for tokens in recorded.table("runs", p)["trained_tokens"]},
            len(documents := load_corpus(ROOT / "data/corpus/longest", "evaluation").documents),
            max(len(document.tokens) for document in documents),
        ],
    ),
    (
        "yields 1.863 tokens a forward at contexts of 256 to 511 and 1.446 at 4,096 to 8,191",
        lambda: [at("hidden_31 on 512", 256), 256, 511, at("hidden_31 on 512", 4096), 4096, 8191],
    ),
    (
        "falls from 1.819 to 1.261. Even one that sees nothing of the target falls, from 1.699 to 1.295",
        lambda: [at(f"{drafter} on 512", low) for drafter in ("kv_2", "none_2") for low in (256, 4096)],
    ),
    (
        "falls by .141 tokens [.077, .196] more",
        lambda: turned(of("hidden_31 on 512", "fall", minus="kv_2 on 512")),
    ),
    (
        "gains .507 tokens [.443, .572] in the last bin, the drafter over the cache .663 [.612, .723]",
        lambda: [*of("hidden_31 on 512", "window_gain"), *of("kv_2 on 512", "window_gain")],
    ),
    (
        "yields 2.446 in the last bin, .493 [.410, .578] more",
        lambda: [
            at("hidden_31 on 2,048", 4096, 512),
            *of("hidden_31 on 2,048", "last", "window_gain", minus="hidden_31 on 512"),
        ],
    ),
    ("on 10,240 dialogues of 512 tokens, or on 2,560 of 2,048", lambda: [*size("context_512"), *size("context_2048")]),
    ("falls as well, by .405 [.338, .478]", lambda: of("none_2 on 512", "fall")),
    (
        "worth .080 tokens [.025, .149] over nothing when all is attended to, .189 [.145, .232] with the window",
        lambda: [
            *of("kv_2 on 2,048", "last", minus="none_2 on 2,048"),
            *of("kv_2 on 2,048", "last", "window_gain", minus="none_2 on 2,048"),
        ],
    ),
    ("by .098 [.029, .181], which", lambda: of("states_2 on 512", "fall", minus="kv_2 on 512")),
    (
        "They differ by .067",
        lambda: [np.ptp(by_context().rows("kv_2 on 2,048", "last")[:, 0])],
    ),
    (
        "worth .493 tokens in the last bin, but costs at the beginning: 1.650 against 1.747 at 128 to 255",
        lambda: [
            of("hidden_31 on 2,048", "last", "window_gain", minus="hidden_31 on 512")[0],
            *(at(f"hidden_31 on {trained}", 128) for trained in ("2,048", "512")),
            128,
            255,
        ],
    ),
]


test_numbers_are_those_of_the_tables, test_every_interval_is_checked = checked(NOTEBOOK, STATED)


def test_where_curves_fall_and_where_they_rise():
    """Without a window each is worst after it was best; with one each rises from the bin of 512 on, past where it was."""
    lows = (512, 1024, 2048, 4096)
    for drafter in DRAFTERS:
        short, long = (f"{drafter} on {trained}" for trained in TRAINED_ON)
        whole = [at(short, low) for low in (256, *lows)]
        assert whole == sorted(whole, reverse=True)
        assert at(long, 256) < at(long, 512) < at(long, 1024) and at(long, 4096) < at(long, 2048)
        for variant in (short, long):
            seen = [at(variant, low, 512) for low in lows]
            assert seen == sorted(seen) and seen[-1] > at(variant, 256, 512)


def test_states_fall_more_than_eagle():
    assert of("hidden_31 on 512", "fall", minus="states_2 on 512")[2] < 0
