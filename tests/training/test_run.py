"""One run from features on disk to its tables: whole, step by step, after a kill, and from features in memory."""

import pandas as pd
import pytest
import study_jobs
import torch
from killed import Killed, die_before_step
from study_jobs import EXTRACT, TRAIN

from kvshot_lib.drafters.checkpoint import load_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.extract import hold, prepare
from kvshot_lib.files import read_json, write_json
from kvshot_lib.target.load import load_target
from kvshot_lib.training.loop import train
from kvshot_lib.training.run import finish_run, prepare_run, run_facts, train_run, train_runs

VALUES = TRAIN | {"max_steps": 6, "ttt_steps": 3, "draft_length": 3, "seed": 1}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study_jobs.extract(folder)
    return folder


def left_by(folder) -> dict:
    """What a run left, but for clock and date."""
    found = {path.name: pd.read_csv(path).drop(columns="seconds", errors="ignore") for path in folder.glob("*.csv")}
    return found | {"weights": load_drafter(folder, load_target("tiny", device="cpu")).state_dict()}


def assert_same(one, other):
    one, other = left_by(one), left_by(other)
    weights = one.pop("weights"), other.pop("weights")
    assert sorted(one) == ["axes.csv", "compute.csv", "counts.csv", "gradients.csv", "history.csv", "run_lengths.csv"]
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, other[name].assign(variant=table["variant"]), check_exact=True)
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_whole_is_its_three_steps(study, monkeypatch):
    """Also if it was killed."""
    facts = train_run("whole", VALUES, study)
    run = prepare_run("steps", VALUES, study)
    history = train(run.drafter, run.features["train"], run.features["validation"], run.training, run.folder)
    counts = finish_run(run, history, run_facts(run, history), VALUES["draft_length"])
    assert len(counts) == 8 * 3  # evaluation documents, draft steps
    with monkeypatch.context() as patched, pytest.raises(Killed):
        die_before_step(patched, 4, 3)
        train_run("killed", VALUES, study)
    assert (study / "runs/killed/seed1/checkpoint.pt").exists()
    train_run("killed", VALUES, study)
    for other in ("steps", "killed"):
        assert_same(study / "runs/whole/seed1", study / f"runs/{other}/seed1")
        assert not (study / f"runs/{other}/seed1/checkpoint.pt").exists()
    record = read_json(study / "runs/whole/seed1/run.json", "")
    assert {name: record[name] for name in facts} == facts
    assert set(record["files"]) == {path.name for path in run.folder.glob("*.csv")}
    assert (facts["variant"], facts["seed"], facts["epochs"], facts["draft_vocab_size"]) == ("whole", 1, 1, 384)
    assert facts["evaluation_documents"] == 8 and 0 <= facts["out_of_draft_vocab_fraction"] < 1


def test_features_in_memory_are_trained_on_alike(study):
    """They are not rounded, as stored ones are: the same documents, nearly the same numbers."""
    features = hold(prepare(EXTRACT), EXTRACT, study / "features")
    held = train_run("held", VALUES | {"features_on_device": True}, study, features)
    stored = train_run("stored", VALUES, study)
    for name in ("trained_tokens", "evaluation_documents", "corpus", "parameters"):
        assert held[name] == stored[name]
    losses = [left_by(study / f"runs/{name}/seed1")["history.csv"]["loss"].dropna() for name in ("held", "stored")]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-2)


def test_drafters_that_one_stream_feeds_are_those_trained_alone(study, monkeypatch):
    """By turns, one forward of the target a batch: also when one goes on from a checkpoint that the other doesn't have."""
    live = EXTRACT | {"features": "live"}
    features = hold(prepare(live), live, study / "features")
    jobs = [
        ("one", VALUES),
        ("other", VALUES | {"paradigm": "hidden", "num_layers": 1}),
        ("shuffled", VALUES | {"kv_control": "shuffled"}),
    ]
    for variant, values in jobs:
        train_run(f"{variant}_alone", values, study, features)
    asked, plain = [], features["train"].source.batch
    with monkeypatch.context() as patched, pytest.raises(Killed):
        die_before_step(patched, 4, 3)
        train_run("other", jobs[1][1], study, features)
    monkeypatch.setattr(features["train"].source, "batch", lambda *given: asked.append(given) or plain(*given))
    rows = train_runs(jobs, study, features)
    forwards = [indices for indices, state in asked if state]
    assert len(forwards) == 2 * VALUES["max_steps"]  # of each batch, and of the documents whose cache is shuffled in
    for row, (variant, _) in zip(rows, jobs, strict=True):
        assert row["variant"] == variant
        assert_same(study / f"runs/{variant}/seed1", study / f"runs/{variant}_alone/seed1")


def test_a_warm_start_takes_what_fits_and_says_what_is_fresh(study):
    train_run("start", VALUES, study)
    run = prepare_run("next", VALUES | {"num_layers": 1, "init_from": "start"}, study)
    trained = load_drafter(study / "runs/start/seed1", run.target).state_dict()
    assert run.fresh == () and all(torch.equal(t, trained[name]) for name, t in run.drafter.state_dict().items())
    deeper = prepare_run("deeper", VALUES | {"num_layers": 3, "init_from": "start"}, study)
    assert deeper.fresh and all(name.startswith("layers.2.") for name in deeper.fresh)
    with pytest.raises(StudyError, match="no trained drafter in .*/runs/nowhere/seed1"):
        prepare_run("next", VALUES | {"init_from": "nowhere"}, study)


def test_what_cannot_be_trained_is_told(study, tmp_path):
    with pytest.raises(StudyError, match="01_extract_kv_cache"):
        train_run("mine", VALUES, tmp_path)
    manifest = study / "features/train/manifest.json"
    kept = manifest.read_bytes()
    told = read_json(manifest, "")
    write_json(manifest, told | {"spec": told["spec"] | {"target_hash": "0" * 64}})
    with pytest.raises(
        StudyError, match="features were recorded for target tiny .* not for tiny .*; load that target, or make it anew"
    ):
        prepare_run("mine", VALUES, study)
    manifest.write_bytes(kept)
    with pytest.raises(StudyError, match="ttt_steps=3 contradicts block_size=8"):
        prepare_run("mine", {"ttt_steps": 3, "paradigm": "block", "draft_vocab_size": 384}, study)
