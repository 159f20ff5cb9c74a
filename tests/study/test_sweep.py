"""The sweep trains what the pipeline would train, skips what is done, and refuses unknown runs."""

import contextlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pandas as pd
import pytest
from filelock import FileLock

from kvshot_lib.errors import StudyError
from kvshot_lib.metrics.tables import read
from kvshot_lib.study import sweep
from kvshot_lib.study.cli import main
from kvshot_lib.study.profiles import load_profile, resolve_drafters, train_values
from kvshot_lib.text.corpus import SPLITS, load_corpus, save_corpus
from kvshot_lib.training.loop import identity
from kvshot_lib.training.run import prepare_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The smoke profile, trained by two workers; and what the command said."""
    folder = tmp_path_factory.mktemp("swept") / "smoke"
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["sweep", "smoke", "--results-dir", str(folder), "--workers", "2"]) == 0
    return folder, told.getvalue()


@pytest.mark.slow
def test_every_run_of_the_profile_is_trained_and_collected(swept):
    folder, told = swept
    assert "0 of 3 runs are done" in told and told.endswith("all runs are done\n")
    assert list(read(folder / "tables", "runs")["variant"]) == ["hidden", "kv_1", "hybrid_warm"]
    assert json.loads((folder / "runs/hybrid_warm/seed0/run.json").read_text())["init_from"] == "hidden"


def test_only_what_some_drafter_reads_is_held(tmp_path):
    """The extraction keeps all layers and fields for all: in memory EAGLE's alone would be a third of `sources`."""
    own = {"states_1": {"state_layers": "kv", "kv_layers": [2]}, "none_1": {}, "kv_1": {"kv_layers": [1, 3]}}
    profile = replace(load_profile("smoke"), drafters=resolve_drafters(own, "here"))
    profile.extract.update(kv_layers=[1, 2, 3], state_layers="kv", train_documents=2)
    held = sweep.load_features(profile, tmp_path, ["states_1", "none_1"])["train"]
    assert held.spec.hidden_layers == (2,) and "keys" not in held._fields and "hidden_states" in held._fields
    held = sweep.load_features(profile, tmp_path, own)["train"]
    assert (held.spec.hidden_layers, held.spec.kv_layers) == ((2,), (1, 3)) and held._fields["keys"].shape[1] == 2


def test_a_training_is_the_same_whatever_else_is_held(tmp_path):
    """A checkpoint belongs to its own drafter: others that come to the profile change nothing of it."""
    profile, made = load_profile("smoke"), []
    profile.extract.update(state_layers="kv", train_documents=4, evaluation_documents=2, validation_documents=2)
    for number, others in enumerate((["kv_1"], ["kv_1", "hidden"])):
        features = sweep.load_features(profile, tmp_path / str(number), others)
        run = prepare_run("kv_1", train_values(profile, "kv_1", 0), tmp_path / str(number), features)
        made.append(identity(run.drafter, run.features["train"], run.training, run.dtype))
    assert made[0] == made[1] and made[0]["hidden_layers"]


@pytest.mark.slow
def test_one_stream_of_the_target_trains_what_workers_train(swept, tmp_path, monkeypatch):
    """Of a profile with live features, starts before those that begin with them; and again, nothing."""
    folder, _ = swept
    profile, results = load_profile("smoke"), tmp_path / "smoke"
    profile.extract["features"] = "live"
    jobs = [(variant, 0) for variant in profile.drafters]
    assert sweep.sweep(profile, results, jobs, 4) == 0
    for variant in profile.drafters:
        first, again = (pd.read_csv(at / f"runs/{variant}/seed0/history.csv") for at in (folder, results))
        pd.testing.assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"), rtol=1e-4)
    monkeypatch.setattr(sweep, "train_runs", lambda named, *_: pytest.fail("trained again") if named else [])
    assert sweep.sweep(profile, results, jobs, 4) == 0
    done, away, begun = results / "runs/hidden/seed0/run.json", tmp_path / "run.json", Event()

    def another_sweep():
        with FileLock(done.with_name(".lock")):
            done.rename(away)
            begun.set()
            time.sleep(1)
            away.rename(done)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(another_sweep)
        begun.wait()
        assert sweep.sweep(profile, results, jobs, 4) == 0
        other.result()


@pytest.mark.slow
def test_the_features_in_memory_train_the_same_drafter_as_those_on_disk(swept, tmp_path):
    """Against prepare_run on a feature store, as notebook 02 calls it: the same history up to bfloat16's rounding of the store."""
    folder, _ = swept
    profile = load_profile("smoke")
    features = sweep.load_features(profile, tmp_path / "smoke", ["kv_1"])
    facts = sweep.train_run("kv_1", train_values(profile, "kv_1", 0), tmp_path / "smoke", features)
    again = pd.read_csv(tmp_path / "smoke/runs/kv_1/seed0/history.csv").drop(columns="seconds")
    first = pd.read_csv(folder / "runs/kv_1/seed0/history.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(first, again, rtol=1e-4)
    assert facts["trained_tokens"] == first["trained_tokens"].max()


def test_a_profiles_own_dialogues_are_what_it_trains_on(tmp_path):
    """Ids of another corpus would mean other text; without the dialogues the command that writes them is named."""
    profile = replace(load_profile("smoke"), dialogues={"train": 4})
    del profile.extract["corpus"]
    with pytest.raises(
        StudyError, match="no dialogues .*: python -m kvshot_lib generate .*/corpus --target tiny --train 4"
    ):
        sweep.load_features(profile, tmp_path, ["hidden"])
    documents = load_corpus("tiny", "train").documents
    splits = {name: documents[4 * place : 4 * place + 4] for place, name in enumerate(SPLITS)}
    save_corpus(tmp_path / "corpus", splits, {"target": "tiny", "seed": 0}, greedy=[])
    features = sweep.load_features(profile, tmp_path, ["hidden"])
    for name, own in splits.items():
        assert features[name].lengths == [len(document.tokens) for document in own]
        assert features[name].batch([0], ()).tokens[0].tolist() == own[0].tokens.tolist()


@pytest.mark.slow
def test_what_is_done_is_skipped_without_loading_anything(swept, monkeypatch):
    folder, _ = swept
    monkeypatch.setattr(sweep, "load_features", lambda *_: pytest.fail("features were loaded"))
    assert main(["sweep", "smoke", "--results-dir", str(folder)]) == 0


def test_a_run_waits_for_the_one_that_it_starts_from(tmp_path):
    profile = load_profile("smoke")
    assert sweep._ready(profile, tmp_path, "hidden", 0) and not sweep._ready(profile, tmp_path, "hybrid_warm", 0)
    (tmp_path / "runs/hidden/seed0").mkdir(parents=True)
    (tmp_path / "runs/hidden/seed0/run.json").write_text("{}")
    assert sweep._ready(profile, tmp_path, "hybrid_warm", 0) and not sweep._ready(profile, tmp_path, "hybrid_warm", 1)


def test_unknown_runs_and_profiles_are_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "load_features", lambda *_: pytest.fail("features were loaded"))
    assert main(["sweep", "smoke", "--results-dir", str(tmp_path), "hidden/seed0", "kv_9/seed0"]) == 1
    assert (
        "error: kv_9/seed0: not among the runs of smoke, which are hidden/seed0, kv_1/seed0" in capsys.readouterr().err
    )
    assert main(["sweep", "smok"]) == 1
    assert "there is no profile" in capsys.readouterr().err


def test_a_run_whose_start_is_not_asked_for_is_left_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "load_features", lambda *_: {})
    profile = replace(load_profile("smoke"))
    assert sweep.sweep(profile, tmp_path, [("hybrid_warm", 0)], workers=1) == 1


@pytest.mark.slow
def test_a_run_in_the_hands_of_another_sweep_is_left_to_it_until_it_is_gone(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "smoke"
    held = [FileLock(folder / f"runs/{variant}/seed0/.lock", thread_local=False) for variant in ("hidden", "kv_1")]
    for lock in held:
        Path(lock.lock_file).parent.mkdir(parents=True)
        lock.acquire()
    (folder / "runs/hidden/seed0/run.json").write_text("{}")  # done by the other one before it went
    wait, refused = sweep.wait, []

    def wait_and_let_go(running, **given):
        ended = wait(running, **given)
        refused.extend(future.result() is None for future in ended.done if held[1].is_locked)
        for lock in held:
            lock.release()
        return ended

    monkeypatch.setattr(sweep, "wait", wait_and_let_go)
    assert sweep.sweep(load_profile("smoke"), folder, [("hidden", 0), ("kv_1", 0)], workers=1) == 0
    assert refused == [True] and capsys.readouterr().out.count("kv_1/seed0:") == 1
