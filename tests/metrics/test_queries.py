"""Query estimation's tables to numbers: by hand, pooled and paired; claims in both directions; what the oracle is read as; figures and sentences."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from kvshot_lib.metrics import queries as statistics
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.claims import query_claims, scorecard
from kvshot_lib.metrics.paper import read_paper
from kvshot_lib.plots import queries as draw
from kvshot_lib.plots import report_queries as report

DOCUMENTS, STEPS = 30, 7


RECALLS = {"kv_1": [0.3], "kv_2": [0.2, 0.5]}


def overlap_rows(recalls=None, floor=0.1):
    """Recall of each layer, alike in all documents but for some noise; two target layers, one .1 above the other."""
    chance, rows = np.random.default_rng(0), []
    sources = [("target", "row_t", None, 0.8), ("target", "other_document", None, floor)]
    sources += [
        (v, "drafter", layer, r) for v, layers in (recalls or RECALLS).items() for layer, r in enumerate(layers)
    ]
    for variant, source, layer, recall in sources:
        for document in range(DOCUMENTS):
            for step in (0, 3, 6):
                for target_layer, more in ((9, 0.0), (19, 0.1)):
                    value = recall + more + 0.02 * chance.normal()
                    labels = [variant, 0, document, source, step, layer, target_layer, 10 + document]
                    rows.append([*labels, 1 - value, 0.5, value, 0.25])
    made = pd.DataFrame(rows, columns=list(tables.SCHEMAS["attention_overlap"]))
    return tables.check(made, "attention_overlap", "made")


def oracle_rows(variants=("kv_1", "kv_2"), oracle=0.0, perfect=0.0, random=-0.1, better=0.1):
    """Step acceptance .4 for kv_1 and .4 + ``better`` for kv_2 with its own query; the other arms differ from it as given."""
    chance, rows = np.random.default_rng(1), []
    arms = {"as_trained": -0.02, "own": 0.0, "oracle": oracle, "perfect": perfect, "random": random}
    for variant in variants:
        for arm, more in arms.items():
            for document in range(DOCUMENTS):
                for step in range(STEPS):
                    anchors = 200 - step
                    share = 0.4 + more + better * (variant == "kv_2") + 0.01 * chance.normal()
                    rows.append([variant, 0, arm, 100, document, step, anchors, round(share * anchors), 1, 1])
    return tables.check(pd.DataFrame(rows, columns=list(tables.SCHEMAS["query_oracle"])), "query_oracle", "made")


def probe_rows():
    rows = [
        [variant, 0, document, labels, step, layer, 9, (1.0 - r2) * (5 + document), 5.0 + document]
        for variant, layers in {"kv_1": [0.3], "kv_2": [0.3, 0.6]}.items()
        for layer, value in enumerate(layers)
        for labels, r2 in (("true", value), ("shuffled", -0.02))
        for document in range(DOCUMENTS)
        for step in (0, 6)
    ]
    return tables.check(pd.DataFrame(rows, columns=list(tables.SCHEMAS["query_probe"])), "query_probe", "made")


def test_overlap_is_pooled_over_anchors_and_target_layers():
    """Two documents of 1 and 3 anchors with recalls 1 and 0: (1·1 + 3·0) / 4."""
    rows = overlap_rows()[lambda t: t["document"] < 2].assign(anchors=lambda t: 1 + 2 * t["document"])
    rows = rows.assign(recall=1.0 - rows["document"])
    table = statistics.overlap_table(rows, 50)
    assert table.loc[table["measure"] == "recall", "value"].tolist() == pytest.approx([0.25] * 5 * 3)
    assert table["layer"].isna().sum() == 2 * 3 * 4  # the references, steps, measures


def test_missing_measures_do_not_count():
    rows = overlap_rows().assign(js=lambda t: t["js"].where(t["document"] > 0))
    table = statistics.overlap_table(rows, 50)
    assert table["value"].notna().all() and (table["low"] <= table["value"]).all()


def test_r_squared_sums_before_dividing():
    table = statistics.probe_table(probe_rows(), 50).set_index(["variant", "labels", "layer", "draft_step"])
    assert table.loc[("kv_2", "true", 1, 6), "value"] == pytest.approx(0.6)
    uneven = probe_rows()[lambda t: (t["document"] < 2) & (t["variant"] == "kv_1") & (t["labels"] == "true")]
    uneven = uneven.assign(residual=np.where(uneven["document"] == 0, 0.0, uneven["total"]))  # totals 5 and 6
    assert statistics.probe_table(uneven, 50)["value"].tolist() == pytest.approx([5 / 11, 5 / 11])


def test_gains_are_differences_of_expected_mat():
    draws = statistics.query_draws(overlap_rows(), oracle_rows(oracle=0.1, perfect=0.2), 200)
    mat = lambda a: 1 + sum(a**i for i in range(1, STEPS + 1))
    gain = {arm: draws.mean("kv_1", f"{arm}_gain").value for arm in ("own", "oracle", "perfect", "random")}
    assert gain["oracle"] == pytest.approx(mat(0.5) - mat(0.4), abs=0.02)
    assert gain["perfect"] == pytest.approx(mat(0.6) - mat(0.4), abs=0.02)
    assert gain["own"] == pytest.approx(mat(0.4) - mat(0.38), abs=0.02) and gain["random"] < -0.1
    assert draws.mean("kv_1", "returned").value == pytest.approx(gain["oracle"] / gain["perfect"])
    assert draws.mean("kv_1", "oracle_last").value == pytest.approx(0.1, abs=0.01)
    assert draws.mean("kv_2", "overlap_recall").value == pytest.approx(
        0.55, abs=0.02
    )  # the last layer, both target layers


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"oracle": 0.1, "perfect": 0.2}, "bottleneck"),
        ({"oracle": 0.0, "perfect": 0.0}, "no_bottleneck"),
        ({"oracle": -0.1, "perfect": 0.0}, "no_bottleneck"),
        ({"oracle": -0.1, "perfect": -0.05}, "worse"),
        ({"oracle": 0.0, "perfect": 0.1}, "projection"),
        ({"oracle": 0.0, "perfect": 0.0, "random": 0.0}, "idle"),
        ({"oracle": 0.018, "perfect": 0.1}, "open"),
    ],
)
def test_what_the_oracle_is_read_as(given, wanted):
    draws = statistics.query_draws(overlap_rows(), oracle_rows(**given), 200)
    assert statistics.reading(draws, "kv_1") == wanted
    told = report.in_short(draws)
    assert told.count("\n") == 1 and "`kv_2`" in told
    phrase = {"bottleneck": "is a bottleneck here", "no_bottleneck": "is not the bottleneck here", "open": "**open**"}
    phrase |= {"worse": "no sign that query estimation is the bottleneck"}
    phrase |= {"projection": "projection of the keys", "idle": "the oracle can't tell"}
    assert phrase[wanted] in told.splitlines()[0]


def verdicts(overlap, oracle):
    draws = statistics.query_draws(overlap, oracle, 200)
    card = scorecard(draws, read_paper(), query_claims(set(draws.variants)))
    return dict(zip(card["claim"], card["verdict"], strict=True))


def test_claims_in_both_directions():
    good = verdicts(overlap_rows(), oracle_rows(oracle=0.1, perfect=0.1))
    assert good == dict.fromkeys(["C15", "C15a", "C15b", "C15c"], "reproduced")
    bad = verdicts(overlap_rows({"kv_1": [0.5], "kv_2": [0.3, 0.3]}), oracle_rows(oracle=0.0, better=-0.1))
    assert bad == dict.fromkeys(["C15", "C15a", "C15b", "C15c"], "not reproduced")
    assert verdicts(overlap_rows(), oracle_rows(oracle=0.0))["C15"] == "not reproduced"  # one part is enough


def test_claims_fall_back_on_kv_2_and_are_not_run_without_tables():
    assert query_claims({"kv_1", "kv_2"})[0].variants == ["kv_2", "kv_1"]
    assert query_claims({"kv_1", "kv_2", "kv_4"})[1].variants == query_claims(set())[1].variants == ["kv_4", "kv_1"]
    assert [claim.threshold for claim in query_claims(())] == [0, 0, 0.05]
    nothing = verdicts(tables.empty("attention_overlap"), tables.empty("query_oracle"))
    assert set(nothing.values()) == {"not run"}


def test_figures_and_sentences_tell_the_tables(tmp_path):
    overlap, oracle, probe = overlap_rows(), oracle_rows(oracle=0.1, perfect=0.2), probe_rows()
    draws, table = statistics.query_draws(overlap, oracle, 100), statistics.overlap_table(overlap, 100)
    assert isinstance(draw.draw_overlap(table), Figure)
    told = report.overlaps(table)
    assert "| `kv_2`, layer 2 | 0.5" in told and "another document | 0.1" in told
    assert "by whole intervals: above it for `kv_1`, `kv_2`." in told
    low = report.overlaps(statistics.overlap_table(overlap_rows(floor=0.9), 100))
    assert "by whole intervals: below it for `kv_1`, `kv_2`." in low
    table = statistics.probe_table(probe, 100)
    assert isinstance(draw.draw_probe(table), Figure)
    assert "| `kv_2` | 2 | 0.600" in report.probes(table) and "R² is -0.020 to -0.020" in report.probes(table)
    table = draw.gain_table(draws)
    assert set(table["variant"]) == {"kv_1", "kv_2"} and isinstance(draw.draw_gains(table, 0.05), Figure)
    table = statistics.arm_table(oracle, 100)
    assert len(table) == 2 * 5 * (STEPS + 2) and isinstance(draw.draw_arms(table), Figure)
    some = table[(table["variant"] == "kv_1") | (table["arm"] == "as_trained")]
    assert [axes.get_title("left") for axes in draw.draw_arms(some).axes] == ["kv_1"], (
        "no panel for a drafter without arms"
    )
    assert len(draw.draw_arms(table[table["arm"] == "as_trained"]).axes) == 2, "unless none has any"
    assert "no gap to close" not in report.arms(draws)
    flat = statistics.query_draws(overlap, oracle_rows(), 100)
    assert report.arms(flat).count("no gap to close") + report.arms(flat).count("]") >= 2
    assert "matters to it" in report.controls(draws)
    facts = {
        "documents": 30,
        "target": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "date": "today",
        "git_revision": "abc",
    }
    trained = [
        facts | {"runs": f"{name}/seed0", "retrained_documents": 5, "retrained_tokens": 12345}
        for name in ("kv_1", "kv_2")
    ]
    told = report.facts(overlap, pd.DataFrame(trained))
    assert "(`kv_1/seed0`, `kv_2/seed0`) was re-trained on 5 training documents, 12,345 tokens" in told
    assert "re-trained" not in report.facts(overlap, pd.DataFrame([facts | {"retrained_documents": None}]))
    assert "12,345 tokens" in told and "One seed of `kv_1`, `kv_2`" in told and "`target`" not in told
