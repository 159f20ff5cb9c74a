"""What comes of single answers: ratios of sums that a person can compute, and intervals over prompts."""

import numpy as np
import pandas as pd
import pytest
from decoded import PARTS, alone, answer

from kvshot_lib.metrics import tables
from kvshot_lib.metrics.decode_tables import ALL, decoding_table, model_table


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
    """Three tokens a forward; a forward of 0.12 s costs 1.5 of the target alone, drafting half of it, the rest a quarter.

    Predicted: 3 / (1 + 1/2) = 2; with everything: 3 / (1.5 · (1 + 1/2 + 1/4)).
    """
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
    found = model_table(table, samples=50).set_index("metric")["value"]
    assert found["decoded_mat"] == pytest.approx(3) and found["draft_cost"] == pytest.approx(0.5)
    assert found["verify_cost"] == pytest.approx(1.5) and found["other_cost"] == pytest.approx(0.25)
    assert found["predicted"] == pytest.approx(2) and found["predicted_whole"] == pytest.approx(3 / 1.5 / 1.75)
    assert found["draft_step_s"] == pytest.approx(0.20 / 16)
    assert model_table(tables.empty("decode_prompts")).empty
