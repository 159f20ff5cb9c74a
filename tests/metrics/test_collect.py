"""Runs collected into tables, and runs that are refused."""

import pandas as pd
import pytest
from finished_runs import write_run

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.collect import OF_RUN, collect, thin
from kvshot_lib.metrics.resampling import acceptance_table

COLLECTED = {"runs", "acceptance", *OF_RUN}


def test_every_run_is_merged_in_the_order_of_the_study(tmp_path):
    for variant, seed in (("zebra", 0), ("hybrid", 0), ("kv_2", 10), ("kv_2", 2), ("hidden", 0)):
        write_run(tmp_path, variant, seed)
    unfinished = write_run(tmp_path, "kv_1")
    (unfinished / "run.json").unlink()
    assert set(collect(tmp_path, samples=20)) == COLLECTED
    for name in COLLECTED:
        table = tables.read(tmp_path / "tables", name)
        runs = table[["variant", "seed"]].drop_duplicates().to_numpy().tolist()
        assert runs == [["hidden", 0], ["kv_2", 2], ["kv_2", 10], ["hybrid", 0], ["zebra", 0]], name
    counts = tables.read(tmp_path / "tables", "counts")
    pd.testing.assert_frame_equal(
        counts[(counts["variant"] == "kv_2") & (counts["seed"] == 10)].reset_index(drop=True),
        pd.read_csv(tmp_path / "runs/kv_2/seed10/counts.csv"),
    )


def test_runs_collected_before_are_kept_unless_they_were_trained_again(tmp_path):
    """hidden and kv_1 in one place; later hidden again and hybrid in another: the later hidden counts."""
    for variant, tokens in (("hidden", 100), ("kv_1", 100)):
        write_run(tmp_path / "first", variant, trained_tokens=tokens)
    collect(tmp_path / "first")
    for variant, tokens in (("hidden", 200), ("hybrid", 200)):
        write_run(tmp_path / "later", variant, trained_tokens=tokens)
    collect(tmp_path / "later", keep=tmp_path / "first/tables")
    found = tables.read(tmp_path / "later/tables", "runs").set_index("variant")["trained_tokens"]
    assert found.to_dict() == {"hidden": 200, "kv_1": 100, "hybrid": 200}
    counts = tables.read(tmp_path / "later/tables", "counts").query("variant == 'kv_1'").reset_index(drop=True)
    before = tables.read(tmp_path / "first/tables", "counts").query("variant == 'kv_1'").reset_index(drop=True)
    pd.testing.assert_frame_equal(counts, before)


def test_collecting_twice_writes_the_same_bytes(tmp_path):
    for variant in ("kv_1", "hidden"):
        write_run(tmp_path, variant)
    first = {name: path.read_bytes() for name, path in collect(tmp_path, samples=50).items()}
    assert first == {name: path.read_bytes() for name, path in collect(tmp_path, samples=50).items()}
    assert not list((tmp_path / "tables").glob(".*"))


def test_runs_without_counts_along_the_axes_are_collected(tmp_path):
    """Runs of earlier versions have no axes.csv."""
    (write_run(tmp_path, "hidden") / "axes.csv").unlink()
    collect(tmp_path, samples=5)
    assert tables.read(tmp_path / "tables", "axes").empty
    write_run(tmp_path, "kv_1")
    collect(tmp_path, samples=5)
    assert set(tables.read(tmp_path / "tables", "axes")["variant"]) == {"kv_1"}


def test_written_acceptance_is_that_of_the_written_counts(tmp_path):
    write_run(tmp_path, "hidden")
    collect(tmp_path, samples=50)
    counts, lengths = (tables.read(tmp_path / "tables", name) for name in ("counts", "run_lengths"))
    written = tables.read(tmp_path / "tables", "acceptance")
    pd.testing.assert_frame_equal(written, acceptance_table(counts, lengths, samples=50), rtol=1e-5)


def test_floats_have_six_digits(tmp_path):
    write_run(tmp_path, "hidden", train_s=123.456789)
    collect(tmp_path, samples=5)
    assert tables.read(tmp_path / "tables", "runs")["train_s"].tolist() == [123.457]
    assert set(tables.read(tmp_path / "tables", "history")["loss"]) == {0.333333}


def test_further_facts_of_a_run_are_kept_and_may_be_missing_elsewhere(tmp_path):
    write_run(tmp_path, "hidden", peak_memory_bytes=12)
    write_run(tmp_path, "kv_1")
    edit("history", lambda t: t.assign(x=1))(tmp_path / "runs/kv_1/seed0")
    collect(tmp_path, samples=5)
    assert tables.read(tmp_path / "tables", "runs")["peak_memory_bytes"].isna().tolist() == [False, True]
    assert tables.read(tmp_path / "tables", "history").groupby("variant")["x"].count().to_dict() == {
        "hidden": 0,
        "kv_1": 6,
    }


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    """A variant called none is no missing cell, and a hash such as 0123e45 is no number."""
    write_run(tmp_path, "none", git_revision="0123456e78", target_hash="0001")
    collect(tmp_path, samples=5)
    assert set(tables.read(tmp_path / "tables", "counts")["variant"]) == {"none"}
    row = tables.read(tmp_path / "tables", "runs").iloc[0]
    assert (row["git_revision"], row["target_hash"]) == ("0123456e78", "0001")


# What is refused


def edit(name, change):
    """A spoiler that replaces table ``name`` of a run by ``change(table)``."""
    return lambda run: change(pd.read_csv(run / f"{name}.csv")).to_csv(run / f"{name}.csv", index=False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "run.json").write_text("{"), "run.json can't be read .* train again"),
        (lambda run: (run / "counts.csv").unlink(), "counts.csv is not there: run notebooks/03_train_drafter"),
        (lambda run: (run / "counts.csv").write_text(""), "counts.csv is no readable table"),
        (edit("counts", lambda t: t.drop(columns="reached")), "counts.csv lacks reached .*03_train_drafter"),
        (edit("counts", lambda t: t.assign(seed="one")), "counts.csv has a cell of the wrong type .*one"),
        (edit("counts", lambda t: t.assign(draft_step=0)), "counts.csv has two rows for .*'document': 0"),
        (edit("counts", lambda t: t.assign(variant="kv_9")), "the counts in .* are of kv_9/seed0"),
        (edit("axes", lambda t: t.assign(variant="kv_9")), "the axes in .* are of kv_9/seed0"),
        (edit("counts", lambda t: t[:0]), "the counts in .* are of no run"),
        (edit("counts", lambda t: t[1:]), "different documents, draft steps or anchors"),
        (edit("run_lengths", lambda t: t[1:]), "different documents, draft steps or anchors"),
    ],
)
def test_spoiled_runs_are_refused_and_earlier_tables_stay(tmp_path, spoil, message):
    write_run(tmp_path, "hidden")
    write_run(tmp_path, "kv_2")
    before = {path: path.read_bytes() for path in collect(tmp_path, samples=5).values()}
    spoil(tmp_path / "runs/kv_2/seed0")
    with pytest.raises(StudyError, match=message) as error:
        collect(tmp_path, samples=5)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in before}


def test_runs_of_two_targets_are_refused(tmp_path):
    write_run(tmp_path, "hidden")
    write_run(tmp_path, "kv_2", target="other", target_hash="0123456789")
    with pytest.raises(
        StudyError, match=r"different targets: hidden seed 0 \(x, abc\) and kv_2 seed 0 \(other, 01234567\)"
    ):
        collect(tmp_path)


def test_no_finished_run_is_refused(tmp_path):
    with pytest.raises(StudyError, match="no finished run in .*03_train_drafter"):
        collect(tmp_path / "elsewhere")


# What recorded tables keep


def test_recorded_counts_along_the_text_are_those_of_the_main_drafters(tmp_path):
    for variant in ("kv_2", "kv_2_heads"):
        write_run(tmp_path, variant)
    collect(tmp_path, samples=5)
    thin(tmp_path / "tables")
    assert set(tables.read(tmp_path / "tables", "axes")["variant"]) == {"kv_2"}
    assert set(tables.read(tmp_path / "tables", "counts")["variant"]) == {"kv_2", "kv_2_heads"}


def test_recorded_gradients_are_those_of_projections_and_gates_to_four_digits(tmp_path):
    write_run(tmp_path, "kv_2")
    collect(tmp_path, samples=5)
    row = {"variant": "kv_2", "seed": 0, "step": 1, "trained_tokens": 9, "layer": 0, "branch": "layer"}
    parts = [
        *(("q_proj", "grad_norm", 1.23456), ("q_proj", "numel", 4.0), ("fusion.0", "grad_norm", 3.0)),
        *(("norms", "grad_norm", 5.0), ("gate", "gate_mean", 0.5), ("output", "grad_norm", 6.0)),
    ]
    made = pd.DataFrame(
        [row | {"matrix": m, "draft_step": pd.NA, "document": pd.NA, "quantity": q, "value": v} for m, q, v in parts]
    )
    tables.write(tmp_path / "tables", "gradients", made[list(tables.SCHEMAS["gradients"])])
    thin(tmp_path / "tables")
    thinned = tables.read(tmp_path / "tables", "gradients")
    assert thinned["matrix"].tolist() == ["q_proj", "gate"]
    assert thinned["value"].tolist() == [1.235, 0.5]
