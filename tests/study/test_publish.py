"""A trained drafter is published, read back, and judged in another study, all on the tiny target."""

import json

import examples
import pandas as pd
import pytest
import synthetic
import torch
from finished_runs import write_run
from notebook_checks import ROOT
from safetensors.torch import load_file

from kvshot_lib.drafters.checkpoint import load_drafter, load_rounded, read_description, save_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.store import StoredFeatures, write_store
from kvshot_lib.files import write_csv, write_json
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.collect import collect
from kvshot_lib.metrics.resampling import Interval
from kvshot_lib.provenance import provenance
from kvshot_lib.study import cli, publish

VARIANT = "kv_2"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with evaluation features and one finished run, its drafter published."""
    folder = tmp_path_factory.mktemp("study") / "results/mine"
    live, target = examples.live(), examples.target()
    write_store(folder / "features/evaluation", live)
    run = folder / f"runs/{VARIANT}/seed3"
    torch.manual_seed(0)
    drafter = examples.drafter(VARIANT)
    save_drafter(drafter, run)
    facts = {name: "x" if kind == "str" else 1 for name, kind in tables.SCHEMAS["runs"].items()} | provenance()
    facts |= {
        "variant": VARIANT,
        "seed": 3,
        "paradigm": "kv",
        "num_layers": 2,
        "parameters": sum(p.numel() for p in drafter.parameters()),
    }
    facts |= {"target": target.name, "target_hash": target.hash, "profile": "mine", "train_s": 60.0, "init_from": ""}
    write_json(run / "run.json", facts)
    history = synthetic.matrix((VARIANT,), 1, 5)["history"].assign(seed=3)
    write_csv(run / "history.csv", history)
    evaluation = StoredFeatures(folder / "features/evaluation")
    to = folder.parents[1] / "data/checkpoints" / VARIANT
    draws = publish.publish(run, to, target, evaluation)
    return folder, to, drafter, draws


def test_the_published_drafter_is_the_trained_one_but_for_rounding(study):
    _, to, drafter, draws = study
    found = load_drafter(to, examples.target())
    assert found.config == drafter.config and torch.equal(found.draft_ids, drafter.draft_ids)
    for (name, mine), theirs in zip(drafter.state_dict().items(), found.state_dict().values(), strict=True):
        bound = 0.26 * mine.std(-1, correction=0).max() if mine.dim() == 2 else 0
        assert (mine - theirs).abs().max() <= bound, name
    assert draws.variants == ["as trained", "as published"]


def test_the_card_says_what_was_measured(study):
    _, to, _, draws = study
    card, described = (to / "README.md").read_text(), json.loads((to / "drafter.json").read_text())
    lost = draws.contrast((1, "as published", "measured_mat"), (-1, "as trained", "measured_mat"))
    assert (
        f"| measured MAT | {draws.mean('as trained', 'measured_mat')} | {draws.mean('as published', 'measured_mat')}"
        in card
    )
    assert str(lost) in card and described["weights_sha256"] in card and described["run"]["variant"] == VARIANT
    assert (
        "the profile `mine` its budget" in card
        and "03_train_drafter.ipynb OUT.ipynb -p variant kv_2 -p seed 3\n" in card
    )
    of_profile = publish.card(described["run"] | {"profile": "long"}, described, draws, 1, 64)
    assert "(`notebooks/profiles/long.yaml` says" in of_profile and "kvshot sweep long kv_2/seed3\n" in of_profile
    kept = pd.read_csv(to / "acceptance.csv").set_index("metric")
    assert kept.loc["measured_mat", "value"] == pytest.approx(
        draws.mean("as published", "measured_mat").value, rel=1e-5
    )


def test_altered_weights_and_another_target_are_refused(study, tmp_path):
    _, to, _, _ = study
    for name in ("drafter.json", "drafter.safetensors"):
        (tmp_path / name).write_bytes((to / name).read_bytes())
    with pytest.raises(StudyError, match="was trained for target"):
        load_drafter(tmp_path, examples.target("tiny-qwen3"))
    with open(tmp_path / "drafter.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(StudyError, match="missing or altered"):
        load_drafter(tmp_path, examples.target())


def test_it_becomes_a_run_of_another_study(study, monkeypatch):
    """Judged by the same code as a training's end, so its numbers are those of the card; tables are collected with it."""
    folder, to, _, draws = study
    monkeypatch.setattr(publish, "CHECKPOINTS", to.parent)
    monkeypatch.setattr(publish, "load_target", lambda _: examples.target())
    run = publish.judge_checkpoint(folder, VARIANT, mark="print")
    assert run == folder / f"runs/{VARIANT}_checkpoint/seed3" and (run / ".fingerprint").read_text() == "print"
    collected = collect(folder, [f"{VARIANT}_checkpoint/seed3"], samples=20)
    assert pd.read_csv(collected["runs"])["variant"].tolist() == [f"{VARIANT}_checkpoint"]
    acceptance = pd.read_parquet(collected["acceptance"]).set_index("metric")
    assert acceptance.loc["measured_mat", "value"] == pytest.approx(
        draws.mean("as published", "measured_mat").value, rel=1e-5
    )
    assert load_drafter(run, examples.target()).config == load_drafter(to, examples.target()).config


def test_committed_checkpoints_are_what_their_cards_say():
    """Whole by their hashes, for the default target, small together, and drafted from the same tokens."""
    folders = sorted(path.parent for path in (ROOT / "data/checkpoints").glob("*/drafter.json"))
    assert folders and sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 14e6
    for folder in folders:
        described, card = read_description(folder), (folder / "README.md").read_text()
        assert described["variant"] == folder.name and described["spec"]["target"] == "smollm2-135m-instruct"
        assert described["weights_sha256"] in card and f"{described['run']['trained_tokens']:,} tokens" in card
        measured = tables_of(folder).loc["measured_mat", ["value", "low", "high"]]
        assert str(Interval(*measured)) in card
        assert len(load_rounded(folder / "drafter.safetensors")["draft_ids"]) == described["run"]["draft_vocab_size"]


def test_tables_and_figures_are_recorded_whole_and_thinned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["record", "mine"]) == 1
    assert (
        "there are no tables in results/mine/tables; make them with: make study PROFILE=mine" in capsys.readouterr().err
    )
    write_run("results/mine", "kv_1")
    collect("results/mine", samples=20)
    for name in ("decay.png", "training_kv_1_seed0.png"):
        write_csv(f"results/mine/figures/{name}", pd.DataFrame())
    for _ in range(2):
        assert cli.main(["record", "mine"]) == 0
    assert [path.name for path in (tmp_path / "figures/mine").iterdir()] == ["decay.png"]
    for name in ("runs", "counts", "gradients", "acceptance"):
        recorded, made = (tables.read(folder, name) for folder in ("data/recorded/mine", "results/mine/tables"))
        pd.testing.assert_frame_equal(recorded, made)


def tables_of(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "acceptance.csv").set_index("metric")


def test_a_run_that_is_not_finished_is_refused(tmp_path, study):
    with pytest.raises(StudyError, match="no finished run"):
        publish.publish(tmp_path / "runs/kv_1/seed0", tmp_path / "to", examples.target(), None)
    with pytest.raises(StudyError, match="two seeds of one drafter"):
        publish.publish_runs(tmp_path, ["kv_1/seed0", "kv_1/seed1"])


def test_a_drafter_is_exported_in_eagle3s_form(tmp_path):
    save_drafter(examples.drafter("hidden", "tiny"), tmp_path / "run")
    assert cli.main(["eagle3", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--target", "tiny"]) == 0
    assert load_file(tmp_path / "out/model.safetensors")["fc.weight"].dtype == torch.bfloat16
