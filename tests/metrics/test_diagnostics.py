"""Statistics of the diagnostics, on tables small enough to compute by hand: pooled, paired, and read by the claims."""

import numpy as np
import pandas as pd
import pytest
from flat_draws import draws_of

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import diagnostics, tables
from kvshot_lib.metrics.claims import stated
from kvshot_lib.metrics.resampling import joined
from kvshot_lib.metrics.scorecard import read_paper, scorecard

DOCUMENTS = 30
RECALLS = {"kv_1": [0.3], "kv_4": [0.2, 0.5]}
FLOW, GATE = stated("C16"), stated("C17")


def overlap_rows(recalls=None):
    """Recall of each layer, alike in all documents but for some noise; two target layers, one .1 above the other."""
    chance, rows = np.random.default_rng(0), []
    sources = [("target", "row_t", None, 0.8)]
    sources += [(v, "drafter", layer, r) for v, own in (recalls or RECALLS).items() for layer, r in enumerate(own)]
    for variant, source, layer, recall in sources:
        for document in range(DOCUMENTS):
            for step in (0, 3, 6):
                for target_layer, more in ((9, 0.0), (19, 0.1)):
                    value = recall + more + 0.02 * chance.normal()
                    labels = [variant, 0, document, source, step, layer, target_layer, 10 + document]
                    rows.append([*labels, 1 - value, 0.5, value, 0.25])
    made = pd.DataFrame(rows, columns=list(tables.SCHEMAS["attention_overlap"]))
    return tables.check(made, "attention_overlap", "made")


def flow_table(variant="kv_1", seed=0, scale=1.0, contexts=(128, 512, 1024)):
    """A drafter of one layer: ∂L/∂W of each matrix is a literal times the document's number, 1 or 2."""
    rows, branches = [], {"cross": 1.0, "self": 10.0} if variant.startswith("hybrid") else {"cross": 1.0}
    for document, context in np.ndindex(2, len(contexts)):
        for branch, larger in branches.items():
            at = [variant, seed, document, contexts[context], 16, 0, branch]
            for matrix, side, norm, numel in (
                ("q_proj", "draft", 4.0, 16), ("o_proj", "draft", 6.0, 9), ("k_proj", "draft", 0.3 * scale, 4),
                ("v_proj", "draft", 0.2 * scale, 4), ("fusion.keys", "prefix", 1.0, 4),
            ):  # fmt: skip
                values = {"grad_norm": larger * norm * (1 + document), "numel": numel, "entries": 10}
                rows += [[*at, matrix, side, None, name, value] for name, value in values.items()]
            rows.append([*at, "attention", "draft", 0, "draft_mass", 0.1 * (1 + document)])
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["gradient_flow"])).astype({"draft_step": "Int64"})


def gradients_table(variant="hybrid_warm", seed=0, gates=(0.5, 0.3, 0.1)):
    """The gate at steps 1, 10 and 100, on two validation documents, the second .02 higher; other rows beside it."""
    rows = []
    for step, gate in zip((1, 10, 100), gates, strict=True):
        at = [variant, seed, step, 50 * step, 0]
        rows += [[*at, "layer", "gate", k, d, "gate_mean", gate + 0.02 * d] for k in (0, 1) for d in (0, 1)]
        rows += [[*at, "cross", "q_proj", None, None, "grad_norm", 3.0]]
    types = {"layer": "Int64", "draft_step": "Int64", "document": "Int64"}
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["gradients"])).astype(types)


def test_recall_is_of_the_last_layer_pooled_over_anchors_and_target_layers():
    draws = diagnostics.overlap_draws(overlap_rows(), 50)
    assert draws.mean("kv_4", "overlap_recall").value == pytest.approx(0.55, abs=0.02)
    rows = overlap_rows()[lambda t: t["document"] < 2].assign(anchors=lambda t: 1 + 2 * t["document"])
    draws = diagnostics.overlap_draws(rows.assign(recall=1.0 - rows["document"]), 50)
    assert draws.mean("kv_1", "overlap_recall").value == pytest.approx(0.25)  # (1·1 + 3·0) / 4


def test_claims_on_queries_in_both_directions():
    """MAT is 1 + α. The true query gains .3; over another document's cache it gains .1, .26 or all of that over none_1."""
    asked, shuffled = "kv_1_oracle_query", "kv_1_oracle_query_shuffled"

    def verdicts(recalls, kv_4, **runs):
        own = [
            diagnostics.overlap_draws(overlap_rows(recalls), 50),
            draws_of({"kv_1": (40,), "kv_4": (kv_4,)}, samples=50),
        ]
        trained = draws_of({"kv_1": (40,), "none_1": (30,), **runs}, samples=50)
        card = scorecard(joined(own), read_paper(), stated("C15"), {"sources": trained})
        return dict(zip(card["claim"], card["verdict"], strict=True))

    good = verdicts(RECALLS, 50, **{asked: (70,), shuffled: (40,)})
    assert good == dict.fromkeys(["C15", "C15a", "C15b", "C15c", "C15d"], "reproduced")
    bad = verdicts({"kv_1": [0.5], "kv_4": [0.3, 0.3]}, 30, **{asked: (42,), shuffled: (40,)})
    assert bad == dict.fromkeys(["C15", "C15a", "C15b", "C15c", "C15d"], "not reproduced")
    said = verdicts(RECALLS, 50, **{asked: (70,), shuffled: (56,)})  # one part is enough
    assert (said["C15c"], said["C15d"], said["C15"]) == ("reproduced", "not reproduced", "not reproduced")
    waiting = verdicts(RECALLS, 50, **{asked: (70,)})
    assert (waiting["C15c"], waiting["C15d"], waiting["C15"]) == ("reproduced", "not run", "inconclusive")


def test_claims_about_an_experiment_are_not_judged_on_other_drafters_of_these_names():
    draws = draws_of({"kv_1": (40,), "kv_1_oracle_query": (70,)}, samples=50)
    card = scorecard(draws, read_paper(), stated("C15")).set_index("claim")
    assert card.loc["C15c", "verdict"] == "not run" and card.loc["C15c", "missing"] == "kv_1_oracle_query kv_1"
    assert diagnostics.overlap_draws(tables.empty("attention_overlap"), 9).variants == []


def test_gradients_are_pooled_over_documents_layers_and_seeds_and_divided_by_parameters():
    """k: √((.3² + .6²) / 8) over q: √((4² + 8²) / 32); every document has the same ratio, so its interval is a point."""
    draws = diagnostics.flow_draws(flow_table(), samples=50)
    found = draws.mean("kv_1", "key_gradient")
    assert (found.value, found.low, found.high) == pytest.approx((0.15, 0.15, 0.15))
    assert draws.mean("kv_1", "value_gradient").value == pytest.approx((0.2 / 2) / (6 / 3))
    layers = pd.concat([flow_table(), flow_table().assign(layer=1)], ignore_index=True)
    assert diagnostics.flow_draws(layers, 20).mean("kv_1", "key_gradient").value == pytest.approx(0.15)
    seeds = pd.concat([flow_table(), flow_table(seed=1, scale=3.0)], ignore_index=True)
    assert diagnostics.flow_draws(seeds, 20).mean("kv_1", "key_gradient").value == pytest.approx((0.15 + 0.45) / 2)


def test_a_hybrid_has_both_branches():
    draws = diagnostics.flow_draws(flow_table("hybrid"), samples=50)
    metrics = ("key_gradient", "self_key_gradient", "self_value_gradient")
    assert [draws.mean("hybrid", metric).value for metric in metrics] == pytest.approx(
        [0.15, 0.15, (0.2 / 2) / (6 / 3)]
    )
    assert not diagnostics.flow_draws(flow_table(), 50).has("kv_1", "self_key_gradient")


def test_the_context_of_the_claim_is_the_longest_that_training_knew():
    for contexts, wanted in (((128, 512, 1024), 512), ((128, 256), 256), ((1024, 2048), 1024)):
        assert diagnostics.nearest_context(flow_table(contexts=contexts)) == wanted


def test_the_gate_of_the_claim_is_the_first_with_a_tenth_of_the_steps_behind_it():
    """Of 100 steps that is step 10: gates .3 and .32 in the two documents. The least is not the last."""
    draws = diagnostics.gate_draws(gradients_table(gates=(0.5, 0.3, 0.4)), samples=100)
    found = draws.mean("hybrid_warm", "gate_after_a_tenth")
    assert (found.value, found.low, found.high) == pytest.approx((0.31, 0.3, 0.32))
    assert draws.mean("hybrid_warm", "gate_least").value == pytest.approx(0.31)
    assert draws.mean("hybrid_warm", "gate_at_the_end").value == pytest.approx(0.41)
    floored = diagnostics.gate_draws(gradients_table("hybrid_warm_gate_floor"), samples=9)  # .3 + .7 · .11
    assert floored.mean("hybrid_warm_gate_floor", "gate_at_the_end").value == pytest.approx(0.377)
    assert diagnostics.gate_draws(gradients_table("none_of_ours"), 9).mean("none_of_ours", "gate_least").value < 0.12


@pytest.mark.parametrize(
    "draws, claims, wanted",
    [
        (diagnostics.flow_draws(flow_table(scale=0.5), 50), FLOW, ["reproduced"] * 3),
        (diagnostics.flow_draws(flow_table(), 50), FLOW, ["not reproduced", "not reproduced", "reproduced"]),
        (diagnostics.flow_draws(tables.empty("gradient_flow"), 9), FLOW, ["not run"] * 3),
        (diagnostics.gate_draws(gradients_table(gates=(0.5, 0.1, 0.9)), 50), GATE, ["reproduced"]),
        (diagnostics.gate_draws(gradients_table(gates=(0.5, 0.3, 0.1)), 50), GATE, ["not reproduced"]),
        (diagnostics.gate_draws(gradients_table(gates=(0.5, 0.19, 0)), 50), GATE, ["inconclusive"]),
        (diagnostics.gate_draws(tables.empty("gradients"), 9), GATE, ["not run"]),
    ],
)
def test_verdicts_on_gradients_and_gates(draws, claims, wanted):
    assert scorecard(draws, read_paper(), claims)["verdict"].tolist() == wanted


def context_rows(variant, alphas, documents=4):
    """One draft step: of 10 anchors a document, bin and window so many match; window 0 and 512."""
    rows = []
    for (window, low), share in alphas.items():
        for document in range(documents):
            rows.append([variant, 0, window, document, low, 0, 10, round(10 * share), 10, round(10 * share), 10, 0])
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["context"]))


def test_what_a_long_context_does_by_hand():
    alphas = {(0, 256): 0.4, (512, 256): 0.4, (0, 512): 0.1, (512, 512): 0.3}
    other = {place: 0.5 for place in alphas}
    drawn = diagnostics.context_draws(
        pd.concat([context_rows("kv_2", alphas), context_rows("none_2", other)]), 512, samples=5
    )
    told = drawn.keys.assign(value=drawn.values[:, 0]).query("variant == 'kv_2'")
    assert dict(zip(told["metric"], told["value"].round(9))) == {
        "mat_256": 1.4,
        "mat_256_window_512": 1.4,
        "mat_512": 1.1,
        "mat_512_window_512": 1.3,
        "last": 1.1,
        "fall": 0.3,
        "window_gain": 0.2,
    }
    bins = told[told["bin_low"].notna()].set_index(["window_tokens", "bin_low"])
    assert bins["value"].to_dict() == pytest.approx({place: 1 + share for place, share in alphas.items()})
    assert set(bins["anchors"]) == {40} and set(bins["documents"]) == {4}
    assert drawn.contrast((1, "kv_2", "fall"), (-1, "none_2", "fall")).value == pytest.approx(0.3)


def test_a_document_that_does_not_reach_a_bin_counts_as_nothing_there():
    rows = context_rows("kv_2", {(0, 256): 0.4, (512, 256): 0.4, (0, 512): 0.1, (512, 512): 0.3})
    rows = rows[(rows["bin_low"] == 256) | (rows["document"] > 0)]
    drawn = diagnostics.context_draws(rows, 512, samples=50)
    last = drawn.keys.query("bin_low == 512")
    assert set(last["documents"]) == {3} and drawn.values[last.index[0]] == pytest.approx(1.1)


@pytest.mark.parametrize("missing", [{(0, 256): 0.4, (0, 512): 0.1}, {(0, 128): 0.4, (512, 128): 0.4}])
def test_texts_that_are_too_short_or_windows_that_were_not_measured_are_told(missing):
    with pytest.raises(StudyError, match="anchors at 256 tokens and windows 0 and 512"):
        diagnostics.context_draws(context_rows("kv_2", missing), 512, samples=5)
