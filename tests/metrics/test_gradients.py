"""Statistics, claims, figures and sentences of notebook 05, on tables small enough to compute by hand."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib.metrics import claims, paper, tables
from kvshot_lib.metrics import gradients as statistics
from kvshot_lib.plots import gradients as figures_gradients
from kvshot_lib.plots import report_gradients


def flow_table(variant="kv_1", seed=0, scale=1.0, documents=(1.0, 2.0), contexts=(128, 512, 1024)):
    """A drafter of one layer: ∂L/∂W of each matrix is a literal times the document's number; attention on drafts is .2, k by k."""
    rows = []
    for document, size in enumerate(documents):
        for context in contexts:
            at = [variant, seed, document, context, 16, 0]
            for matrix, side, norm, numel in (
                ("q_proj", "draft", 4.0, 16), ("o_proj", "draft", 6.0, 9), ("k_proj", "draft", 0.3 * scale, 4),
                ("v_proj", "draft", 0.2 * scale, 4), ("fusion.keys", "prefix", 1.0, 4),
            ):  # fmt: skip
                values = {"grad_norm": norm * size, "numel": numel, "entries": 10, "entry_grad_norm": norm * size / 10}
                rows += [[*at, "cross", matrix, side, None, name, value] for name, value in values.items()]
            for k in range(7):
                share = (k + 1) / (context + k + 1)
                rows += [[*at, "cross", "attention", "draft", k, "draft_share", share]]
                rows += [[*at, "cross", "attention", "draft", k, "draft_mass", 0.1 * size]]
            rows += [[*at, "layer", "gate", "draft", 0, name, 0.3] for name in ("gate_mean", "gate_spread")]
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["gradient_flow"])).astype({"draft_step": "Int64"})


def gradients_table(variant="hybrid_warm", seed=0, gates=(0.5, 0.3, 0.1), scale=1.0):
    """Records at steps 1, 10 and 100; two validation documents, the second with a gate .02 higher; Adam's step is half a percent."""
    rows = []
    for step, gate in zip((1, 10, 100), gates, strict=True):
        at = [variant, seed, step, 50 * step]
        for matrix, size in (("q_proj", 1.0), ("k_proj", scale), ("o_proj", 2.0), ("v_proj", scale)):
            values = {"grad_norm": 3 * size, "weight_norm": 200.0, "adam_step_norm": 1.0, "numel": 9}
            rows += [[*at, 0, "cross", matrix, None, None, name, value] for name, value in values.items()]
        for k in range(2):
            rows += [[*at, 0, "layer", "gate", k, d, "gate_mean", gate + 0.02 * d] for d in (0, 1)]
            rows += [[*at, 0, "layer", "gate", k, d, "gate_spread", 0.05] for d in (0, 1)]
            rows += [
                [*at, 0, branch, "output", k, None, "grad_norm", 3.0 * part]
                for branch, part in (("cross", gate), ("self", 1 - gate))
            ]
    types = {"layer": "Int64", "draft_step": "Int64", "document": "Int64"}
    return pd.DataFrame(rows, columns=list(tables.SCHEMAS["gradients"])).astype(types)


def test_norms_are_pooled_over_documents_and_divided_by_parameters():
    """q: √((4² + 8²) / (16 + 16)) = √2.5; k: √((.3² + .6²) / 8); their ratio is what C16a is about."""
    table = statistics.norm_table(flow_table(), samples=50).set_index(["quantity", "matrix"])["value"]
    assert table["per_parameter", "q_proj"] == pytest.approx(2.5**0.5)
    assert table["per_parameter", "k_proj"] == pytest.approx((0.45 / 8) ** 0.5)
    assert table["per_entry", "q_proj"] == pytest.approx(((0.16 + 0.64) / 2) ** 0.5)
    draws = statistics.flow_draws(flow_table(), samples=50)
    found = draws.mean("kv_1", "key_gradient")
    assert found.value == pytest.approx((0.3 / 2) / (4 / 4)) and found.low == pytest.approx(found.high), (
        "every document has the same"
    )
    assert draws.mean("kv_1", "value_gradient").value == pytest.approx((0.2 / 2) / (6 / 3))


def test_the_context_of_the_claim_is_the_longest_that_training_knew():
    assert statistics.nearest_context(flow_table()) == 512
    assert statistics.nearest_context(flow_table(contexts=(128, 256))) == 256
    assert statistics.nearest_context(flow_table(contexts=(1024, 2048))) == 1024


def test_layers_and_seeds_are_pooled():
    two = pd.concat([flow_table(), flow_table().assign(layer=1)], ignore_index=True)
    assert statistics.norm_table(two, 20)["value"].tolist() == pytest.approx(
        statistics.norm_table(flow_table(), 20)["value"].tolist()
    )
    seeds = pd.concat([flow_table(), flow_table(seed=1, scale=3.0)], ignore_index=True)
    assert statistics.flow_draws(seeds, 20).mean("kv_1", "key_gradient").value == pytest.approx((0.15 + 0.45) / 2)


def test_attention_and_share_by_context():
    table = statistics.attention_table(flow_table(), 50).set_index(["quantity", "context_length_tokens", "draft_step"])
    assert table.loc[("draft_share", 1024, 6), "value"] == pytest.approx(7 / 1031)
    mass = table.loc[("draft_mass", 128, 0)]
    assert mass["value"] == pytest.approx(0.15) and (mass["low"], mass["high"]) == pytest.approx((0.1, 0.2))


def test_the_gate_of_the_claim_is_the_first_with_a_tenth_of_the_steps_behind_it():
    """Of 100 steps that is step 10: gates .3 and .32 in the two documents."""
    draws = statistics.gate_draws(gradients_table(), samples=100)
    found = draws.mean("hybrid_warm", "gate_after_a_tenth")
    assert (found.value, found.low, found.high) == pytest.approx((0.31, 0.3, 0.32))


def test_verdicts():
    reported = paper.read_paper()
    for scale, wanted in (
        (0.5, "reproduced"),
        (1.0, "not reproduced"),
    ):  # key_gradient .075 and .15, the same in every document
        card = claims.scorecard(statistics.flow_draws(flow_table(scale=scale), 50), reported, claims.FLOW_CLAIMS)
        assert card["verdict"].tolist() == [wanted, wanted, "reproduced"] and card["claim"].tolist() == [
            "C16",
            "C16a",
            "C16b",
        ]
    for gates, wanted in (
        ((0.5, 0.1, 0.9), "reproduced"),
        ((0.5, 0.3, 0.1), "not reproduced"),
        ((0.5, 0.19, 0), "inconclusive"),
    ):
        card = claims.scorecard(statistics.gate_draws(gradients_table(gates=gates), 50), reported, claims.GATE_CLAIMS)
        assert card["verdict"].tolist() == [wanted]
    empty = tables.read("nowhere", "gradient_flow"), tables.read("nowhere", "gradients")
    for draws, told in (
        (statistics.flow_draws(empty[0], 9), claims.FLOW_CLAIMS),
        (statistics.gate_draws(empty[1], 9), claims.GATE_CLAIMS),
    ):
        assert set(claims.scorecard(draws, reported, told)["verdict"]) == {"not run"}


def test_gates_and_branches_over_the_training():
    table = statistics.gate_table(gradients_table(), 50).set_index(["quantity", "step"])["value"]
    assert table["gate_mean"].tolist() == pytest.approx([0.51, 0.31, 0.11])
    assert table["branch_ratio"].tolist() == pytest.approx([1, 3 / 7, 1 / 9])


def test_gates_of_seeds_are_means_though_their_token_counts_differ():
    other = gradients_table(gates=(0.7, 0.5, 0.3)).assign(seed=1)
    both = pd.concat([gradients_table(), other.assign(trained_tokens=other["trained_tokens"] + 8)], ignore_index=True)
    table = statistics.gate_table(both, 50)
    mean = table[table["quantity"] == "gate_mean"]
    assert mean["seeds"].tolist() == [2, 2, 2] and mean["value"].tolist() == pytest.approx([0.61, 0.41, 0.21])


def test_cures_have_a_row_beside_the_hybrid_that_they_should_cure():
    names = ("hybrid", "hybrid_warm", "hybrid_warm_gate_floor", "hybrid_warm_kv_init")
    table = statistics.gate_table(pd.concat([gradients_table(name) for name in names], ignore_index=True), 20)
    drawn = [axes.get_legend_handles_labels()[1] for axes in figures_gradients.draw_gates(table).axes[::2]]
    assert drawn == [["hybrid", "hybrid_warm"], ["hybrid_warm", "hybrid_warm_gate_floor", "hybrid_warm_kv_init"]]
    for alone in ("hybrid_warm", "hybrid_warm_kv_init"):
        assert len(figures_gradients.draw_gates(table[table["variant"] == alone]).axes) == 2


def test_adam_steps_and_scaling():
    """Gradients 50 times as large, Adam steps the same: 50 and 1 for keys and values, 1 and 1 for queries."""
    both = pd.concat([gradients_table("kv_2"), gradients_table("kv_2_grad50", scale=50.0)], ignore_index=True)
    first = statistics.training_table(both).iloc[0]
    assert (first["gradient"], first["adam_step"], first["relative_step"]) == pytest.approx((1, 1 / 3, 0.005))
    table = statistics.scaling_table(both)
    means = table.groupby("matrix")[["gradient", "adam_step"]].mean()
    assert means.loc["k_proj"].tolist() == pytest.approx([50, 1]) and means.loc["q_proj"].tolist() == pytest.approx(
        [1, 1]
    )
    assert "k_proj 50.00 and 1.00" in report_gradients.scaling(table)
    assert statistics.scaling_table(both[both["variant"] == "kv_2"]).empty


def test_every_figure_is_drawn(tmp_path):
    flow = pd.concat([flow_table(), flow_table("kv_2", scale=2.0)], ignore_index=True)
    kinds = ("hybrid_warm", "kv_2", "kv_2_grad50")
    gradients = pd.concat([gradients_table(v) for v in kinds], ignore_index=True)
    attention = statistics.attention_table(flow, 20)
    made = {
        "norms": figures_gradients.draw_norms(statistics.norm_table(flow, 20)),
        "contexts": figures_gradients.draw_contexts(attention),
        "mass": figures_gradients.draw_mass(attention),
        "training": figures_gradients.draw_training(statistics.training_table(gradients)),
        "scaling": figures_gradients.draw_scaling(statistics.scaling_table(gradients)),
        "gates": figures_gradients.draw_gates(statistics.gate_table(gradients, 20)),
        "missing": figures_gradients.draw_missing("nothing recorded"),
    }
    for name, figure in made.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=30)
        assert name == "missing" or all(axes.lines for axes in figure.axes), name


def test_sentences_name_what_is_not_recorded():
    runs = pd.DataFrame({"variant": ["hidden", "kv_1", "hybrid_warm"]})
    told = report_gradients.recorded(runs, flow_table(), gradients_table())
    assert "Gradient flow of the trained drafter: `kv_1`. Not recorded: `hidden`, `hybrid_warm`." in told
    flow, gradients = tables.read("nowhere", "gradient_flow"), tables.read("nowhere", "gradients")
    assert "none" in report_gradients.recorded(runs, flow, gradients)
    assert statistics.gate_table(gradients).empty and statistics.training_table(gradients).empty
    assert report_gradients.final_gates(flow) == "No drafter with a gate was measured."
    assert "| `kv_1` | cross | 0.150 | 0.050 | 0.075 | 0.033 |" in report_gradients.norms(
        flow_table(), statistics.norm_table(flow_table(), 9)
    )

    assert "0.68% of the entries" in report_gradients.attention(statistics.attention_table(flow_table(), 9))
    assert np.isfinite(statistics.gate_table(gradients_table(), 9)["value"]).all()
