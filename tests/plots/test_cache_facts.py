import examples
import pandas as pd
import pytest
import torch

from kvshot_lib.plots import cache_facts
from kvshot_lib.target.capture import Captured


def test_norms_are_means_over_tokens():
    """Two tokens with keys (3, 4) and (0, 1) in the only head: (5 + 1) / 2 = 3."""
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]])
    table = cache_facts.norm_table(Captured(keys={7: keys}, values={7: 2 * keys}))
    assert table.values.tolist() == [["keys", 7, 0, 3.0], ["values", 7, 0, 6.0]]


def test_attention_is_that_of_eager_attention_and_stops_at_the_wanted_tokens():
    target, tokens = examples.target(), examples.features(documents=(0,)).tokens
    table = cache_facts.attention_table(cache_facts.capture_everything(target, tokens), [2], tokens=5)
    before = target.model.config._attn_implementation
    try:
        target.model.set_attn_implementation("eager")
        wanted = target.model(tokens, output_attentions=True).attentions[2][0].mean(0)
    finally:
        target.model.set_attn_implementation(before)
    assert len(table) == 5 * 6 / 2
    assert all(row.weight == pytest.approx(float(wanted[row.query, row.key]), abs=1e-5) for row in table.itertuples())


def test_the_sink_is_what_late_queries_look_at():
    """With distance 2, key 0 is judged by queries 2 and 3: (.6 + .8) / 2; key 1 has one such query, too few."""
    weights = [(0, 0, 1.0), (1, 0, 0.1), (1, 1, 0.9), (2, 0, 0.6), (2, 1, 0.2), (2, 2, 0.2), (3, 0, 0.8), (3, 1, 0.9)]
    table = pd.DataFrame([(4, *row) for row in weights], columns=["layer", "query", "key", "weight"])
    found = cache_facts.sinks(table, distance=2)
    assert found[["layer", "key"]].values.tolist() == [[4, 0]] and found["mean_weight"].tolist() == [pytest.approx(0.7)]
