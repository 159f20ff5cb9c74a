"""The dry run goes through every stage on a cut of Qwen3-8B, and its extrapolation is arithmetic."""

import pandas as pd
import pytest
from notebook_checks import ROOT

from kvshot_lib.features.spec import FeatureSpec
from kvshot_lib.study import dry_run
from kvshot_lib.study.dry_run import Stage, disk_table, hours
from kvshot_lib.study.profiles import load_profile

QWEN = FeatureSpec("q", "", "", (2, 18, 33), (11, 23, 35), 4096, 8, 128, 151_936)


def test_every_stage_of_the_papers_profile_on_four_narrow_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = f"qwen3-8b --layers 4 --narrow --steps 2 --length 48 --drafters hybrid --dtype float32 --device cpu --out {tmp_path}/a.csv"
    assert dry_run.main(words.split()) == 0
    out = capsys.readouterr().out
    assert "qwen3-8b, 4 layers, random weights: " in out and "(of a target cut short: not the whole one's)" in out
    stages = [
        "generate answers",
        "extract on the fly",
        "extract into a store",
        "train hybrid",
        "judge hybrid",
        "decode hybrid",
    ]
    table = pd.read_csv(tmp_path / "a.csv")
    assert table["name"].tolist() == stages and (table["seconds"] > 0).all() and (table["memory_bytes"] > 1e8).all()
    assert (
        table.set_index("name")["tokens"].loc[["extract on the fly", "extract into a store"]].tolist()
        == [2 * 8 * 48] * 2
    )
    assert table.set_index("name")["tokens"]["train hybrid"] == 2 * 8 * 48
    assert "280,000 dialogues of 48 tokens (at most): 0.01 billion tokens" in out


def test_bytes_a_token_of_qwen3_8b_by_hand():
    """3 layers of 8 KV heads of 128, keys and values, 2 bytes each: 12,288. A hidden state of 4,096: 8,192."""
    table = disk_table(QWEN, 10**9).set_index("stored")
    wanted = [12_288, 3 * 8_192, 8_192 + 4, 12_288 + 4 * 8_192 + 4, 12_288 + 8_192 + 4, 4 * 8_192, 0]
    assert table["bytes a token"].tolist() == wanted
    assert table["TB"]["hidden-state storage (fused and final)"] == pytest.approx(32.768)


def test_hours_by_hand():
    stages = [Stage("a", tokens=1000, seconds=10.0, passes=3.0), Stage("judge", tokens=5, seconds=1.0)]
    table = hours(stages, 3_600_000)
    assert table.to_dict("records") == [{"stage": "a", "passes": 3.0, "tokens/s": 100.0, "hours": 30.0}]


def test_the_profile_is_the_papers_setup(monkeypatch):
    monkeypatch.chdir(ROOT)
    profile, setup = load_profile("qwen3-8b"), pd.read_csv(ROOT / "data/paper/results.csv").query("table == 'setup'")
    assert setup[setup["variant"] == "target"]["value"].iloc[0] in profile.extract["target"]
    assert profile.train["ttt_steps"] == int(setup[setup["variant"] == "ttt"]["value"].iloc[0])
    assert profile.train["draft_vocab_size"] == 32_000 and profile.extract["features"] == "live"
    assert str(profile.dialogues["train"]) == setup[setup["variant"] == "train_small"]["value"].iloc[0]
    assert not profile.dialogues.get("thinking")


def test_what_is_not_there_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert dry_run.main(["qwen3-8b", "--drafters", "kv_9"]) == 1
    assert "error: kv_9: not among the drafters of qwen3-8b, hidden, kv_1" in capsys.readouterr().err
