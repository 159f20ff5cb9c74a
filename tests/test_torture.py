"""A slice of `make torture`, and that it would notice."""

import contextlib
import subprocess
import sys
from pathlib import Path

import damage
import pytest
import study_jobs
import torture

from kvshot_lib import files
from kvshot_lib.errors import StudyError
from kvshot_lib.study.notebooks import locked

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_killed_and_damaged_study_comes_to_the_same_end():
    """In a process of its own: it forks, which is no thing to do in the middle of other tests."""
    words = ["--kills", "3", "--flips", "16", "--stages", "extract", "train", "flips", "disk"]
    command = [sys.executable, "tests/torture.py", *words]
    told = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=torture.os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr[-2000:]
    assert told.stdout.count("  kill ") == 3 and "nothing was lost" in told.stdout


def test_torture_notices_a_checksum_that_is_not_looked_at(tmp_path, monkeypatch):
    """Without the CRC of its record a changed weight of a checkpoint is read as good."""
    study_jobs.extract(tmp_path)
    damage.make_checkpoint(tmp_path)
    path = tmp_path / "checkpoint/checkpoint.pt"
    good, data = damage.read_checkpoint(tmp_path), path.read_bytes()
    weight = next(iter(good[0].values())).contiguous().numpy().tobytes()
    place = data.index(weight) + 3
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(StudyError, match="checkpoint.pt can't be read .*; delete it to train from the start"):
        damage.read_checkpoint(tmp_path)
    monkeypatch.setattr("kvshot_lib.training.loop.check_records", lambda *_: None)
    assert not damage.equal(damage.read_checkpoint(tmp_path), good)


def test_torture_notices_other_results():
    assert torture.differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "d": 4}) == ["b", "c", "d"]
    assert torture.differences({"a": 1}, {"a": 1}) == []


def test_an_altered_json_object_is_refused_and_an_older_one_read(tmp_path):
    path = files.write_json(tmp_path / "a.json", {"tokens": 128, "layers": (1, 2), "share": 0.5})
    assert files.read_json(path, "make it again") == {"tokens": 128, "layers": [1, 2], "share": 0.5}
    path.write_text(path.read_text().replace("128", "129"))
    with pytest.raises(StudyError, match="a.json is damaged: it is not what was written; make it again"):
        files.read_json(path, "make it again")
    path.write_text('{"tokens": 129}')
    assert files.read_json(path, "") == {"tokens": 129}
    for text in (b"\xff{}", b"[1]", b"{"):
        path.write_bytes(text)
        with pytest.raises(StudyError, match="a.json .*; make it again"):
            files.read_json(path, "make it again")


def test_a_list_of_checksums_vouches_for_what_it_names(tmp_path):
    import pandas as pd

    for name in ("a", "b"):
        files.write_csv(tmp_path / f"{name}.csv", pd.DataFrame({"x": [1, 2]}), listed=True)
    sums = tmp_path / files.SUMS
    with contextlib.chdir(tmp_path):
        assert subprocess.run(["sha256sum", "--check", "--quiet", sums.name], check=False).returncode == 0
    files.check_listed(tmp_path / "a.csv", "")
    sums.write_text(sums.read_text().replace("a.csv", "c.csv"))
    files.check_listed(tmp_path / "b.csv", "")
    for name, text in (("a.csv", None), ("b.csv", "x\n1\n3\n")):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(StudyError, match=f"{name} is damaged: .* SHA256SUMS; make it again"):
            files.check_listed(tmp_path / name, "make it again")
    sums.unlink()
    files.check_listed(tmp_path / "b.csv", "")


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f".a.{files._HOST}.{pid}.tmp.json" for pid in (dead.pid, torture.os.getppid())]
    for path in left:
        path.write_text("half")
    files.write_json(tmp_path / "a.json", {})
    assert [path.exists() for path in left] == [False, True]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    told = "could not write to .*: read-only file system; free some space or choose"
    with pytest.raises(StudyError, match=told), locked(tmp_path / "new/.lock"):
        pass
    with pytest.raises(StudyError, match="could not write .*a.json: read-only file system; .* run again"):
        files.write_json(tmp_path / "new/a.json", {})
