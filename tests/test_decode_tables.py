"""What comes of single answers: ratios of sums that a person can compute, and intervals over prompts."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib import tables
from kvshot_lib.decode_tables import ALL, decoding_table

PARTS = {f"{part}_s": 0.0 for part in ("prefill", "verify", "draft", "project", "bookkeeping", "sampling", "rest")}


def answer(
    variant="hidden", mode="chain", plan="4", prompt="1", category="coding", tokens=9, forwards=4, seconds=1.0, **more
):
    """One row of decode_prompts."""
    row = {
        "variant": variant, "seed": 0, "mode": mode, "plan": plan, "prompt": prompt, "turn": 0, "category": category,
        "prompt_tokens": 30, "new_tokens": tokens, "same_tokens": tokens, "forwards": forwards, "drafted": 12, "accepted": 4,
        "seconds": seconds, "fastest_s": seconds, "slowest_s": seconds, "repeats": 1, **PARTS, "dtype": "float32", "device": "here",
    }  # fmt: skip
    return row | more


def alone(prompt="1", category="coding", tokens=9, seconds=2.0, **more):
    return answer(
        mode="alone",
        plan="-",
        prompt=prompt,
        category=category,
        tokens=tokens,
        forwards=tokens - 1,
        seconds=seconds,
        **more,
    )


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
