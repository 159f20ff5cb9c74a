"""Long work in parts: what is done is kept, other work's parts are not taken for one's own."""

import pandas as pd

from kvshot_lib.parts import Parts, claim


def test_folder_of_another_fingerprint_is_emptied_and_of_the_same_is_kept(tmp_path):
    work = tmp_path / "work"
    claim(work, "one")
    (work / "checkpoint").write_text("half")
    claim(work, "one")
    assert (work / "checkpoint").exists()
    claim(work, "two")
    assert not (work / "checkpoint").exists()


def test_a_part_is_made_once_until_what_it_depends_on_changes(tmp_path):
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"a": [len(made)]})

    for fingerprint in ("one", "one", "two"):
        parts = Parts(tmp_path / "work", fingerprint)
        assert (parts.folder / "a.parquet").exists() == (fingerprint == "one" and bool(made))
        assert parts.table("a", make)["a"].tolist() == [len(made)]
    assert len(made) == 2
