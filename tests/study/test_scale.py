"""The dry run goes through every stage on a cut of Qwen3-8B, its extrapolation is arithmetic."""

import re

import pandas as pd
import pytest
from notebook_checks import ROOT

from kvshot_lib.study import scale
from kvshot_lib.study.cli import main
from kvshot_lib.study.profiles import load_profile


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_papers_profile_on_a_tiny_architecture(capsys, monkeypatch):
    """Every stage has a speed; hours are dialogues times tokens times passes over it."""
    monkeypatch.setitem(scale.ARCHITECTURES, "qwen3-8b", scale.ARCHITECTURES["tiny"])
    words = "qwen3-8b --steps 2 --length 48 --drafters hybrid --dtype float32 --device cpu"
    assert main(["dry-run", *words.split(), "--dialogues", "1000000"]) == 0
    out, layers = capsys.readouterr().out, scale.ARCHITECTURES["tiny"]["num_hidden_layers"]
    assert f"qwen3-8b, {layers} layers, random weights: " in out and "0.05 billion tokens" in out
    told = re.findall(r"^(.*?) +([\d,]+) tokens/s,.* GB +([\d,.]+ hours)?$", out, re.MULTILINE)
    assert [stage for stage, _, _ in told] == ["generate answers", "extract", "train hybrid"]
    numbers = [(float(speed.replace(",", "")), hours.split(" ")[0].replace(",", "")) for _, speed, hours in told]
    assert numbers[1][1] == "" and all(speed > 0 for speed, _ in numbers)
    assert float(numbers[2][1]) == pytest.approx(3 * 48e6 / numbers[2][0] / 3600, rel=0.05)


def test_the_profile_is_the_papers_setup():
    profile, setup = load_profile("qwen3-8b"), pd.read_csv(ROOT / "data/paper/results.csv").query("table == 'setup'")
    assert setup[setup["variant"] == "target"]["value"].iloc[0] in profile.extract["target"]
    assert profile.train["ttt_steps"] == int(setup[setup["variant"] == "ttt"]["value"].iloc[0])
    assert profile.train["draft_vocab_size"] == 32_000 and profile.extract["features"] == "live"
    assert str(profile.dialogues["train"]) == setup[setup["variant"] == "train_small"]["value"].iloc[0]
    assert not profile.dialogues.get("thinking")


def test_what_is_not_there_is_refused_in_one_line(capsys):
    assert main(["dry-run", "qwen3-8b", "--drafters", "kv_9"]) == 1
    assert "error: profile qwen3-8b, drafters: has no 'kv_9' (did you mean 'kv_" in capsys.readouterr().err
