"""The bootstrap against an analytic case, its pairing, and what it refuses to compare."""

import numpy as np
import pandas as pd
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import acceptance as metrics
from kvshot_lib.metrics import resampling as bootstrap


def coin_run(documents, anchors=10, variant="hidden", seed=0, shift=0):
    """Documents that match everywhere or nowhere, in turn; the last `shift` of those that do not match do."""
    flags = (np.arange(documents) % 2 == 0) | (np.arange(documents) >= documents - shift)
    return metrics.count_run(variant, seed, [(np.full((anchors, 2), f), np.ones((anchors, 2), bool)) for f in flags])


def test_bootstrap_resamples_documents_not_anchors():
    """Of 100 documents half match throughout: resamples have a binomial share, so the interval is
    .5 ± 1.96 · sqrt(.25 / 100), however many anchors a document has. Resampling 100,000 anchors would give ± .003."""
    for anchors in (1, 1000):
        drawn = bootstrap.draw(*coin_run(100, anchors), samples=4000)
        found = drawn.mean("hidden", "step_acceptance", 0)
        assert found.value == 0.5
        assert (found.low, found.high) == pytest.approx((0.402, 0.598), abs=0.011)  # a step of the binomial is .01


def test_bootstrap_is_seeded_and_same_for_every_run():
    weights = bootstrap.resample_weights(5, 3, seed=1)
    assert (weights[0] == 1).all() and (weights.sum(1) == 5).all()
    assert (weights == bootstrap.resample_weights(5, 3, seed=1)).all()
    assert (weights != bootstrap.resample_weights(5, 3, seed=2)).any()
    alone, both = bootstrap.draw(*coin_run(40)), bootstrap.draw(*joined(coin_run(40, variant="kv_1"), coin_run(40)))
    assert np.array_equal(alone.rows("hidden", "retention"), both.rows("hidden", "retention"))


def joined(*runs):
    return tuple(pd.concat(tables, ignore_index=True) for tables in zip(*runs))


def test_paired_difference_is_narrower_than_its_parts():
    """kv_1 matches like hidden in 98 documents and better in two: the pairing removes what documents share."""
    drawn = bootstrap.draw(*joined(coin_run(100), coin_run(100, variant="kv_1", shift=4)))
    a, b = ("kv_1", "step_acceptance", 0), ("hidden", "step_acceptance", 0)
    gap = drawn.contrast((1, *a), (-1, *b))
    assert gap.value == pytest.approx(0.02)
    assert gap.high - gap.low < 0.06 < drawn.mean(*a).high - drawn.mean(*a).low
    turned = drawn.contrast((1, *b), (-1, *a))
    assert turned == bootstrap.Interval(*(pytest.approx(-x) for x in (gap.value, gap.high, gap.low)))
    assert drawn.contrast((1, *a), (-1, *a)) == bootstrap.Interval(0, 0, 0)


def test_verdict_needs_the_whole_interval():
    assert bootstrap.Interval(0.8, 0.7, 0.9).verdict(1) == "below"
    assert bootstrap.Interval(1.2, 1.1, 1.3).verdict(1) == "above"
    nan = float("nan")
    for numbers in ((0.9, 0.7, 1.1), (1.1, 0.9, 1.3), (0.9, nan, nan), (1.1, nan, nan)):
        unclear = bootstrap.Interval(*numbers)
        assert unclear.verdict(1) == "not distinguishable from"


def test_no_interval_where_it_rests_on_one_document():
    """With step 1 valid in one document of 20, all resamples that have it agree: no interval, not one of width 0."""
    match, whole, cut = np.array([[True, True], [True, False]]), np.ones((2, 2), bool), np.array([[True, False]] * 2)
    run = metrics.count_run("kv_1", 0, [(match, cut)] * 19 + [(match, whole)])
    table = bootstrap.acceptance_table(*run)
    row = table[(table["metric"] == "step_acceptance") & (table["draft_step"] == 1)].iloc[0]
    assert (row["value"], row["anchors"], row["documents"]) == (0.5, 2, 1)
    assert np.isnan([row["low"], row["high"]]).all()


def test_acceptance_table_has_the_columns_of_the_design():
    table = bootstrap.acceptance_table(*joined(coin_run(6), coin_run(6, seed=1)), samples=20)
    names = ["variant", "seed", "metric", "draft_step", "value", "low", "high", "anchors", "documents"]
    assert list(table.columns) == names
    assert len(table) == 2 * (2 * 2 + 4)
    assert set(table.loc[table["draft_step"].isna(), "metric"]) == set(metrics.SCALAR_METRICS)
    assert not table.duplicated(["variant", "seed", "metric", "draft_step"]).any()
    first = table.iloc[0]
    assert (first["metric"], first["draft_step"], first["value"]) == ("step_acceptance", 0, 0.5)
    assert first["low"] < 0.5 < first["high"] and (first["anchors"], first["documents"]) == (60, 6)


def test_summary_tells_document_interval_and_seed_spread():
    """Seeds of .5 and .6: the mean is .55, the seeds reach from .5 to .6, the interval is that of documents."""
    drawn = bootstrap.draw(*joined(coin_run(100), coin_run(100, seed=1, shift=20)))
    row = bootstrap.summary_table(drawn).iloc[0]
    assert (row["variant"], row["metric"], row["draft_step"], row["seeds"]) == ("hidden", "step_acceptance", 0, 2)
    assert (row["value"], row["seed_low"], row["seed_high"]) == pytest.approx((0.55, 0.5, 0.6))
    assert row["low"] < 0.48 and row["high"] > 0.62
    assert (row["value"], row["low"], row["high"]) == tuple(
        drawn.mean("hidden", "step_acceptance", 0).__dict__.values()
    )


# What can't be compared is refused


def test_runs_on_other_documents_or_anchors_are_refused():
    for other in (coin_run(7, variant="kv_1"), coin_run(6, anchors=11, variant="kv_1")):
        with pytest.raises(StudyError, match="kv_1 seed 0 and hidden seed 0 were evaluated on different documents"):
            bootstrap.draw(*joined(coin_run(6), other))


def test_missing_or_double_rows_are_refused():
    counts, runs = coin_run(6)
    with pytest.raises(StudyError, match="one row per document and draft step"):
        bootstrap.draw(counts.drop(index=3), runs)
    with pytest.raises(StudyError, match="one row per document and draft step"):
        bootstrap.draw(pd.concat([counts, counts]), runs)
    with pytest.raises(StudyError, match="no rows for hidden seed 0"):
        bootstrap.draw(counts, runs[:0])


def test_bad_requests_say_what_there_is():
    drawn = bootstrap.draw(*coin_run(6), samples=5)
    with pytest.raises(StudyError, match="no retention .* of kv_9; variants here: hidden"):
        drawn.mean("kv_9", "retention")
    with pytest.raises(StudyError, match="bootstrap_samples=0"):
        bootstrap.draw(*coin_run(6), samples=0)


# Two levels: documents and seeds


def flat_run(variant, *alphas, documents=4):
    """A run a seed whose every document matches in the same share of 100 anchors, so that documents add no spread."""
    made = []
    for seed, alpha in enumerate(alphas):
        match = np.arange(100)[:, None] < np.array([[alpha]])
        made.append(metrics.count_run(variant, seed, [(match, np.ones_like(match))] * documents))
    return joined(*made)


ALPHA = ("step_acceptance", 0)


def test_one_seed_leaves_the_interval_over_documents():
    drawn = bootstrap.draw(*joined(coin_run(100), coin_run(100, variant="kv_1", shift=4)))
    a, b = ("kv_1", *ALPHA), ("hidden", *ALPHA)
    assert drawn.contrast((1, *a)) == drawn.mean(*a)
    assert drawn.contrast((1, *a), (-1, *b)) == bootstrap.interval((drawn.rows(*a) - drawn.rows(*b))[0])
    assert drawn.seeds("kv_1") == 1


def test_two_seeds_by_hand():
    """A resample of two seeds holds one of them: .2 or .4, each half of the time. Its variance .1² is that of a mean of
    two draws, (.4 - .2)² / 2 / 2."""
    drawn = bootstrap.draw(*flat_run("kv_1", 20, 40), samples=4000)
    weights = drawn.weights_of("kv_1")
    assert weights.shape == (2, 4001) and weights[:, 0].tolist() == [0.5, 0.5]
    assert (weights.sum(0) == 1).all() and set(weights[0, 1:]) == {0, 1}
    assert weights[0, 1:].mean() == pytest.approx(0.5, abs=0.03)
    found = drawn.contrast((1, "kv_1", *ALPHA))
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))
    assert drawn.mean("kv_1", *ALPHA) == bootstrap.Interval(*[pytest.approx(0.3)] * 3), "documents alone show no spread"


def test_spread_between_seeds_widens_the_interval():
    widths = []
    for spread in (0, 5, 20):
        runs = joined(flat_run("hidden", 50, 50, 50), flat_run("kv_1", 50 - spread, 50, 50 + spread))
        found = bootstrap.draw(*runs).contrast((1, "kv_1", *ALPHA), (-1, "hidden", *ALPHA))
        assert found.value == pytest.approx(0)
        widths.append(found.high - found.low)
    assert widths == pytest.approx([0, 0.1, 0.4])


def test_resampled_means_of_seeds_vary_as_much_as_means_of_seeds_do():
    """Seeds at .2 .5 .8 have variance s² = .09, their mean s² / 3 = .03. Three draws of three would give .02."""
    drawn = bootstrap.draw(*flat_run("kv_1", 20, 50, 80), samples=20_000)
    means = (drawn.weights_of("kv_1") * drawn.rows("kv_1", *ALPHA)).sum(0)[1:]
    assert means.var() == pytest.approx(0.03, rel=0.05)


def test_seeds_are_drawn_alike_for_all_metrics_of_a_variant_and_apart_for_variants():
    """α_0 - α_0 of one variant is 0 in every resample; two with equal seeds still differ by up to their spread."""
    drawn = bootstrap.draw(*joined(flat_run("hidden", 20, 40), flat_run("kv_1", 20, 40)))
    same = drawn.contrast((1, "kv_1", *ALPHA), (-1, "kv_1", *ALPHA))
    apart = drawn.contrast((1, "kv_1", *ALPHA), (-1, "hidden", *ALPHA))
    assert (same.low, same.high) == (0, 0)
    assert (apart.low, apart.high) == pytest.approx((-0.2, 0.2))
    both = bootstrap.draw(*joined(flat_run("kv_1", 20, 40), flat_run("kv_3", 10)))
    assert np.array_equal(both.weights_of("kv_1"), drawn.weights_of("kv_1")), "other variants change nothing"
    assert not np.array_equal(
        drawn.weights_of("kv_1"), bootstrap.draw(*flat_run("kv_1", 20, 40), seed=1).weights_of("kv_1")
    )


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.68), (3, 0.86), (5, 0.90)])
def test_few_seeds_cover_less_than_95_percent(seeds, share):
    """What notebook 08 says: where only seeds differ, how often the interval of a difference holds 0, the truth."""
    weights = [
        bootstrap.draw(*flat_run(variant, *range(seeds)), samples=1000).weights_of(variant)[:, 1:] for variant in "ab"
    ]
    one, other = np.random.default_rng(0).normal(size=(2, 4000, seeds))
    edges = np.percentile(one @ weights[0] - other @ weights[1], [2.5, 97.5], axis=1)
    assert ((edges[0] < 0) & (edges[1] > 0)).mean() == pytest.approx(share, abs=0.02)


def test_a_variants_new_name_moves_no_interval():
    """The draws of a variant's seeds are those of the name under which it was recorded first."""
    old, new = (bootstrap.draw(*flat_run(name, 20, 40, 60)) for name in ("kv_1_none", "none_1"))
    assert np.array_equal(old.weights_of("kv_1_none"), new.weights_of("none_1"))


# Along the text


BY = ["bin_low", "draft_step"]


def cells(*rows, samples=200):
    """Summary of rows (variant, seed, document, bin_low, anchors, matches) of ``axes``, at draft step 0 of one axis."""
    table = pd.DataFrame(rows, columns=["variant", "seed", "document", "bin_low", "bottom", "top"])
    return bootstrap.summary_table(bootstrap.draw_ratios(table.assign(draft_step=0), BY, samples), ["variant", *BY])


def test_counts_along_an_axis_are_summed_before_they_are_divided():
    """8 of 10 and 1 of 2 make 9 of 12; the other seed 6 of 12; their mean is .625."""
    rows = [("kv_2", 0, 0, 0, 10, 8), ("kv_2", 0, 2, 0, 2, 1), ("kv_2", 1, 0, 0, 10, 5), ("kv_2", 1, 2, 0, 2, 1)]
    found = cells(*rows, ("kv_2", 0, 1, 16, 10, 8), ("kv_2", 1, 1, 16, 10, 8))[:1]  # a third document has other bins
    wanted = {"variant": "kv_2", "bin_low": 0, "draft_step": 0, "value": 0.625}
    wanted |= {"seed_low": 0.5, "seed_high": 0.75, "seeds": 2, "anchors": 12, "documents": 2}
    pd.testing.assert_frame_equal(found.drop(columns=["low", "high"]), pd.DataFrame([wanted]), check_dtype=False)
    # One resample in 27 holds neither document and is undefined; the others lie between the two documents' own shares.
    assert 0.5 <= found["low"].iloc[0] < 0.625 < found["high"].iloc[0] <= 0.65


def test_documents_are_drawn_along_an_axis_too():
    """100 documents, half of which match throughout: .5 +- 1.96 sqrt(.25 / 100), however many anchors they have."""
    rows = [("kv_2", 0, document, 16, 30, 30 * (document % 2)) for document in range(100)]
    (row,) = cells(*rows, samples=4000).itertuples()
    assert (row.value, row.low, row.high) == pytest.approx((0.5, 0.402, 0.598), abs=0.011)


def test_all_bins_together_give_step_acceptance():
    match = np.random.default_rng(0).random((4, 40, 7)) < 0.4
    judged = [(m, np.ones_like(m)) for m in match]
    places = np.stack([np.arange(40), np.arange(40) + 7], axis=1)
    axes = metrics.count_axes("kv_2", 0, judged, [places] * 4).rename(columns={"anchors": "bottom", "matches": "top"})
    drawn = bootstrap.draw_ratios(axes, ["axis", *BY], samples=5)
    found = bootstrap.summary_table(drawn, ["variant", "axis", *BY])
    found["matches"] = found["value"] * found["anchors"]
    total = found.groupby(["axis", "draft_step"])[["matches", "anchors"]].sum()
    for (_, step), row in total.iterrows():
        assert row["matches"] / row["anchors"] == pytest.approx(match[:, :, step].mean())


def test_ratios_sum_before_dividing():
    """Two documents with 0 of 5 and 6 of 6: 6 / 11, and of a root √(6 / 11); two seeds of one variant are averaged."""
    table = pd.DataFrame({"variant": "kv_1", "seed": 0, "document": [0, 1], "top": [0, 6], "bottom": [5, 6]})

    def of(rows, **how):
        return bootstrap.summary_table(bootstrap.draw_ratios(rows, samples=50, **how), ["variant"]).iloc[0]

    found = of(table)
    assert (found["value"], found["low"], found["high"], found["seeds"]) == pytest.approx((6 / 11, 0, 1, 1))
    assert of(table, root=True)["value"] == pytest.approx((6 / 11) ** 0.5)
    assert of(pd.concat([table, table.assign(seed=1, top=[5, 6])]))["value"] == pytest.approx((6 / 11 + 1) / 2)


def test_draws_of_several_tables_as_one():
    """Seeds are those that a metric has: m was measured of one of two trainings."""
    both = bootstrap.draw(*flat_run("kv_1", 20, 40), samples=9)
    other = bootstrap.drawn_as([["kv_1", 0, "m", None]], [np.arange(10.0)], 9, 0)
    joint = bootstrap.joined([both, other])
    assert joint.contrast((1, "kv_1", *ALPHA)) == both.contrast((1, "kv_1", *ALPHA))
    assert joint.contrast_draws((1, "kv_1", "m")).tolist() == list(range(10))
    assert (joint.seeds("kv_1"), joint.seeds("kv_1", "m")) == (2, 1)


def test_a_number_and_its_interval_as_text():
    assert bootstrap.with_interval(bootstrap.Interval(0.137, -0.101, 0.3), "+.2f") == "+0.14 [−0.10, +0.30]"
    assert str(bootstrap.Interval(-0.5, np.nan, np.nan)) == "−0.500 [no interval]"
    assert bootstrap.with_interval(pd.Series({"value": np.nan, "low": np.nan, "high": np.nan})) == ""
