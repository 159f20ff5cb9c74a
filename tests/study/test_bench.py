"""The bench tells a speed and its floor for every heavy loop, and keeps what other machines did."""

import pandas as pd
import pytest
from examples import document
from notebook_checks import ROOT

from kvshot_lib.metrics.tables import read_one
from kvshot_lib.study import bench
from kvshot_lib.study.cli import main
from kvshot_lib.target.load import load_target

WORDS = "--target tiny --corpus tiny --documents 4 --steps 1 --vocabulary 64 --texts 2 --drafter"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(bench, "BENCHED", ("hidden_31", "block_kv_2"))
    monkeypatch.setattr(bench, "launched_speed", lambda number, _: 10.0 * number)
    monkeypatch.setattr(bench, "generate_batch", lambda *_: [document("0011111")])  # random weights end no turn


def test_every_loop_has_a_row_and_other_machines_keep_theirs(tmp_path, capsys):
    out = tmp_path / "bench.csv"
    old = pd.DataFrame([{"what": "capture, tiny", "value": 7.0, "unit": "tokens/s", "floor": 9.0, "card": "another",
                         "date": "2026-01-01", "revision": "x"}])  # fmt: skip
    old.to_csv(out, index=False)
    for _ in range(2):  # the second time replaces its own rows only
        assert main(["bench", *WORDS.split(), "", "--out", str(out)]) == 0
    table = read_one(out, "bench")
    names = ["capture", "train hidden_31", "judge hidden_31", "train block_kv_2", "judge block_kv_2"]
    names += [f"train these by turns from {source}" for source in ("memory", "one stream")]
    names += [f"train kv_2 from live features, {number} processes" for number in (1, 2)]
    names += ["write dialogues, 2 at a time", "decode alone", "peak memory"]
    own = table[table["card"] != "another"]
    assert [*own["what"]] == [f"{name}, tiny" for name in names] and (own["value"] > 0).all()
    assert table[table["card"] == "another"]["value"].tolist() == [7.0]
    counted = own.set_index("what")["floor"].dropna()
    assert len(counted) == 5 and (counted > 0).all()
    assert "% of" in capsys.readouterr().out


def test_a_floor_is_what_the_bytes_allow(tmp_path):
    """Bytes counted in bfloat16, twice as many in float32; at one byte a second a token takes as long as its bytes."""
    target = load_target("tiny", device="cpu", dtype="float32")
    made = bench.Bench(target, tmp_path / "bench.csv")
    made.moved = 1.0
    made.decoding([[5, 6, 7]], None, bench.ALONE, new=3)
    found = read_one(tmp_path / "bench.csv", "bench")["floor"].item()
    assert 1 / found == pytest.approx(2 * bench.target_cost(target).bytes, rel=1e-5)


def test_a_drafter_of_another_target_is_refused_before_anything_is_timed(tmp_path, capsys):
    words = [*WORDS.split(), "data/checkpoints/hidden_31_continued", "--out", str(tmp_path / "bench.csv")]
    assert main(["bench", *words]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "bench.csv").exists()
