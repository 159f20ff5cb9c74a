"""Tables as they are written and read back, and what is refused with one line that says what to do."""

from pathlib import Path

import pandas as pd
import pytest
from finished_runs import write_run

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.collect import OF_RUN, collect

RECORDED = sorted((Path(__file__).parents[2] / "data/recorded").glob("*/runs.csv"))
COLLECTED = ("runs", "acceptance", *OF_RUN)
LENGTHS = pd.DataFrame([["none", 0, 1, 2, 1]], columns=list(tables.SCHEMAS["run_lengths"]))


def test_a_table_in_words():
    """Columns in order, an integer where no type stands, a star on those that tell rows apart."""
    made = tables._table("*variant:str *draft_step:int? anchors value:float", large=True)
    assert made.columns == {"variant": "str", "draft_step": "Int64", "anchors": "int64", "value": "float64"}
    assert (made.keys, made.large, made.optional) == (["variant", "draft_step"], True, True)


def test_large_tables_are_parquet_and_small_ones_csv(tmp_path):
    write_run(tmp_path, "hidden")
    names = {path.name for path in collect(tmp_path, samples=5).values()}
    small = ("runs", "compute")
    assert names == {f"{name}.{'csv' if name in small else 'parquet'}" for name in COLLECTED}


@pytest.mark.parametrize("name", ["history", "runs"])  # Parquet and CSV
def test_a_table_comes_back_as_it_was(tmp_path, name):
    """Commas, quotes, empty cells, text that looks like a number or like nothing, further columns, no rows."""
    words = ["a,b", 'say "x"', "1e5", "none", "0001", "nan"]
    schema = tables.SCHEMAS[name]
    rows = [
        {column: {"str": word, "float64": 1e-7, "Int64": 3}.get(kind, i) for column, kind in schema.items()}
        for i, word in enumerate(words)
    ]
    table = pd.DataFrame(rows).astype(schema).assign(further=1.5)
    table.loc[0, [column for column, kind in schema.items() if kind in ("Int64", "float64")]] = None
    for made in (table, table[:0]):
        tables.write(tmp_path, name, made)
        pd.testing.assert_frame_equal(tables.read(tmp_path, name), made, check_dtype=bool(len(made)))


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for name, table in (("run_lengths", LENGTHS), ("compute", tables.empty("compute"))):
        first, second = (tables.write(tmp_path / folder, name, table) for folder in "ab")
        assert first.read_bytes() == second.read_bytes()
    assert not list((tmp_path / "a").glob(".*"))


@pytest.mark.parametrize(
    "spoil", [lambda data: b"variant,seed\n", lambda data: data[:-9], lambda data: data[:30] + data[40:]]
)
@pytest.mark.parametrize("name", ["counts", "compute"])
def test_a_damaged_table_is_one_line(tmp_path, name, spoil):
    write_run(tmp_path, "hidden")
    path = collect(tmp_path, samples=5)[name]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(StudyError, match=f"{path.name} is (no readable table|damaged)") as error:
        tables.read(tmp_path / "tables", name)
    assert "\n" not in str(error.value)


def test_a_missing_table_names_what_makes_it(tmp_path):
    with pytest.raises(StudyError, match="counts.parquet is not there: train drafters and collect them; `make study`"):
        tables.read(tmp_path, "counts")
    assert tables.read(tmp_path, "axes").empty, "what not every study has reads as an empty table"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="accepted"), r"here lacks accepted \(columns of run_lengths: variant, seed"),
        (lambda t: t.assign(seed="one"), "here has a cell of the wrong type .*one"),
        (lambda t: pd.concat([t, t]), "here has two rows for .*'variant': 'none', 'seed': 0, 'document': 1}"),
    ],
)
def test_what_does_not_fit_its_schema_is_refused(change, message):
    with pytest.raises(StudyError, match=message):
        tables.check(change(LENGTHS), "run_lengths", "here")


def test_floats_are_rounded_to_six_digits():
    table = pd.DataFrame({"a": [123.456789, 1 / 3, None], "b": [1234567, 2, 3]})
    assert tables.rounded(table)["a"].tolist()[:2] == [123.457, 0.333333]
    assert tables.rounded(table)["b"].tolist() == [1234567, 2, 3]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_recorded_tables_are_whole_and_agree(path):
    recorded = {name: tables.read(path.parent, name) for name in tables.TABLES if name != "scorecard"}
    runs = set(recorded["runs"]["variant"])
    for name in OF_RUN:
        found = set(recorded[name]["variant"])
        assert found <= runs if tables.TABLES[name].optional else found == runs, name


def test_a_flipped_bit_of_a_large_table_is_not_read_as_another_number(tmp_path):
    """Parquet itself reads some of them as good."""
    table = pd.DataFrame({name: range(40) for name in tables.SCHEMAS["run_lengths"]}).assign(variant="kv_1")
    path = tables.write(tmp_path, "run_lengths", table)
    good = path.read_bytes()
    assert len(tables.read(tmp_path, "run_lengths")) == 40
    for place in range(4, len(good), 97):
        path.write_bytes(good[:place] + bytes([good[place] ^ 8]) + good[place + 1 :])
        with pytest.raises(StudyError, match="run_lengths.parquet is damaged"):
            tables.read(tmp_path, "run_lengths")
