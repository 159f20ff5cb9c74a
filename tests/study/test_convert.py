"""Tables as earlier versions of the study wrote them become present ones, with present names."""

import csv
import io
import lzma

import pandas as pd
import pytest

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.study.recorded import convert

OLD = pd.DataFrame(
    [["kv_1_none", 0, 3, 0, 9, 4, 9, 4], ["hidden_normed_post_norm", 1, 3, 0, 9, 5, 9, 5]],
    columns=list(tables.SCHEMAS["counts"]),
)


def on_its_side(table: pd.DataFrame) -> bytes:
    """``NAME.columns.xz``: a line a column, its name and then its values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([name, *table[name]] for name in table)
    return lzma.compress(text.getvalue().encode())


def test_old_forms_and_old_names_become_present_ones(tmp_path):
    (tmp_path / "counts.columns.xz").write_bytes(on_its_side(OLD))
    OLD[["variant", "seed", "document"]].assign(anchors=9, accepted=4).to_csv(
        tmp_path / "run_lengths.csv.xz", index=False
    )
    with pytest.raises(StudyError, match="convert the folder once with `kvshot convert"):
        tables.read(tmp_path, "counts")
    assert {path.name for path in convert(tmp_path)} == {"counts.parquet", "run_lengths.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == {"counts.parquet", "run_lengths.parquet", "SHA256SUMS"}
    found = tables.read(tmp_path, "counts")
    assert (
        found["variant"].tolist() == tables.read(tmp_path, "run_lengths")["variant"].tolist() == ["none_1", "hidden_31"]
    )
    pd.testing.assert_frame_equal(found.drop(columns="variant"), OLD.drop(columns="variant"))


def test_a_second_time_changes_nothing_and_an_empty_folder_is_refused(tmp_path):
    tables.write(tmp_path, "compute", tables.empty("compute"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StudyError, match="holds no table of the study"):
        convert(tmp_path / "empty")
