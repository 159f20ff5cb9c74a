"""The Snakemake pipeline: what runs again and what doesn't, bad profiles, a kill, and a smoke run from end to end."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from notebook_checks import ROOT, write_notebook

from kvshot_lib.drafters.variants import VARIANTS
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.metrics.scorecard import all_draws, read_paper, scorecard
from kvshot_lib.parts import claim
from kvshot_lib.study import pipeline
from kvshot_lib.study.cli import main
from kvshot_lib.study.profiles import (
    Profile,
    checked_profile,
    load_profile,
    option_words,
)
from kvshot_lib.target.capture import uniform_layers

EXTRACT = """from pathlib import Path
store = Path(results_dir) / "features"
store.mkdir(parents=True, exist_ok=True)"""
TRAIN = """from pathlib import Path
import os, time
run = Path(results_dir) / "runs" / variant / f"seed{seed}"
with open(run / "checkpoint", "a") as handle:
    handle.write("x")
print("started", len((run / "checkpoint").read_text()), "times with", os.environ["OMP_NUM_THREADS"], "threads, log to", log_to)
until = time.monotonic() + wait_s
while time.monotonic() < until and not Path("../go").exists():
    time.sleep(0.1)
for name in ("run.json", "counts.csv", "run_lengths.csv", "axes.csv", "history.csv"):
    (run / name).write_text("{}")"""
PROFILE = """extract: {target: tiny}
train: {wait_s: 0, log_to: tensorboard}
drafters:
  hidden:
  kv_1: {paradigm: kv}
  warm: {paradigm: hybrid, init_from: hidden}
"""


def small_study(folder: Path) -> Path:
    """A checkout with notebooks that do nothing but leave the files that the study's notebooks leave."""
    common = 'results_dir = "../results/none"\nfigures_dir = ""\n'
    notebooks = folder / "notebooks"
    for name in ("05_find_bottlenecks", "06_information_in_the_prefix", "07_decode_end_to_end", "09_beyond_ttt"):
        write_notebook(notebooks / f"{name}.ipynb", 'tables_dir = ""\nfigures_dir = ""', "print(1)")
    write_notebook(notebooks / "08_paper_scorecard.ipynb", 'tables_dir = ""\nfigures_dir = ""\nsamples = 9')
    write_notebook(notebooks / "01_extract_kv_cache.ipynb", common + 'target = "tiny"\ntrain_documents = 4', EXTRACT)
    train = 'variant = "a"\nseed = 0\nparadigm = "hidden"\nnum_layers = 1\ninit_from = ""\nwait_s = 0\nlearning_rate = 0.001\nlog_to = ""'
    write_notebook(notebooks / "03_train_drafter.ipynb", common + train, TRAIN)
    write_notebook(notebooks / "04_long_range_decay.ipynb", 'tables_dir = ""\nfigures_dir = ""', "print(1)")
    (notebooks / "profiles").mkdir()
    (notebooks / "profiles/small.yaml").write_text(PROFILE)
    shutil.copy(ROOT / "notebooks/Snakefile", notebooks)
    return folder


def start(folder: Path, *words: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "kvshot_lib", "study", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def run(folder: Path, *words: str) -> None:
    """In this process, which has imported everything."""
    with contextlib.chdir(folder):
        assert main(["study", *words]) == 0


def due(folder: Path, capfd) -> dict[str, int]:
    """How many jobs of each rule would run, up to the trainings."""
    capfd.readouterr()
    run(folder, "small", "--dry-run", "trained")
    output = "".join(capfd.readouterr())
    assert "trained" in output or "Nothing to be done" in output, output
    return {
        rule: int(count)
        for rule, count in re.findall(r"^(dialogues|extract|train|collect|decay) +(\d+)$", output, re.MULTILINE)
    }


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = small_study(tmp_path_factory.mktemp("study"))
    run(folder, "small", "trained")
    return folder


@pytest.fixture
def study(finished, tmp_path):
    """A copy of the finished small study, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "study"))


@pytest.mark.pipeline
def test_trainings_share_the_cores_evenly(finished):
    """As many of the three drafters as there are cores train at once."""
    threads = max(1, os.cpu_count() // min(os.cpu_count(), 3))
    for variant in ("hidden", "kv_1", "warm"):
        text = (finished / f"results/small/notebooks/03_train_drafter.{variant}.seed0.ipynb").read_text()
        assert f"started 1 times with {threads} threads, log to tensorboard" in text


@pytest.mark.pipeline
def test_nothing_runs_again_after_a_reader_ran_and_saved_notebooks(study, capfd):
    for path in [*study.glob("notebooks/*.ipynb"), *study.glob("results/small/notebooks/*.ipynb")]:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[-1].update(outputs=[nbformat.v4.new_output("stream", text="mine\n")], execution_count=7)
        notebook.cells[0].source += "\n\nA note of mine."
        nbformat.write(notebook, path)
    assert due(study, capfd) == {}


@pytest.mark.pipeline
@pytest.mark.parametrize(
    "path, old, new, jobs",
    [
        ("notebooks/03_train_drafter.ipynb", "time.sleep(0.1)", "time.sleep(0.2)", {"train": 3}),
        ("notebooks/01_extract_kv_cache.ipynb", "store.mkdir(", "store.mkdir(mode=0o755, ", {"extract": 1, "train": 3}),
        (
            "notebooks/profiles/small.yaml",
            "hidden:\n",
            "hidden: {learning_rate: 0.01}\n",
            {"train": 2},
        ),
        ("notebooks/profiles/small.yaml", "target: tiny", "target: tiny-qwen3", {"extract": 1, "train": 3}),
        ("notebooks/profiles/small.yaml", ", log_to: tensorboard", "", {}),
    ],
)
def test_a_change_runs_what_depends_on_it_and_nothing_else(study, capfd, path, old, new, jobs):
    edit(study / path, old, new)
    assert due(study, capfd) == jobs


@pytest.mark.pipeline
def test_killed_run_is_resumed_and_changed_parameters_start_afresh(tmp_path, monkeypatch, capfd):
    folder = small_study(tmp_path)
    profile = folder / "notebooks/profiles/small.yaml"
    profile.write_text("train: {wait_s: 60}\ndrafters: {hidden: {}}\n")
    process = start(folder, "small", "trained", start_new_session=True)
    checkpoint = folder / "results/small/runs/hidden/seed0/checkpoint"
    until = time.monotonic() + 60
    while not (checkpoint.exists() and checkpoint.stat().st_size):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.2)
    monkeypatch.chdir(folder)
    assert main(["study", "small"]) == 1 and "another run is at work" in capfd.readouterr().err
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    (folder / "go").touch()
    run(folder, "small", "trained")
    executed = folder / "results/small/notebooks/03_train_drafter.hidden.seed0.ipynb"
    assert "started 2 times" in executed.read_text()

    edit(profile, "wait_s: 60", "wait_s: 0")
    run(folder, "small", "trained")
    assert "started 1 times" in executed.read_text()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("extract:", "extrac:", r"has no 'extrac' \(did you mean 'extract'\?\)"),
        ("target: tiny", "targt: tiny", r"has no 'targt' \(did you mean 'target'\?\); valid names: .*train_documents"),
        ("wait_s: 0", "learning_rate: 1e-3", "train, learning_rate: '1e-3' is text"),
        ("paradigm: kv}", "paradgm: kv}", r"has no 'paradgm' \(did you mean 'paradigm'\?\)"),
        ("init_from: hidden", "init_from: hiden", "'warm' starts from 'hiden', which is not among its drafters"),
        ("wait_s: 0", "seed: 1", "'seed' is set by the pipeline"),
        ("drafters:", "seeds: 3\ndrafters:", "'seeds' must be a list, not 3"),
        ("{target: tiny}", "{target: tiny", "not valid YAML"),
        ("train:", "generate: 3\ntrain:", "'generate' must be a dict, not 3"),
        ("{paradigm: kv}", "kv", "drafters.kv_1 must be a mapping"),
        ("{paradigm: kv}", "{paradigm: hidden}", "the study's 'kv_1' has paradigm='kv'; with 'hidden' give it another"),
        ("hidden:\n", "hiden:\n", r"the study has no 'hiden' \(did you mean 'hidden'\?\); valid names: hidden, .*kv_1"),
        ("  warm:", "  a b:", "'a b' is no name for a drafter"),
        ("init_from: hidden", "init_from: warm", "'warm' starts from itself, by warm from warm"),
        ("drafters:", "seeds: [0, a]\ndrafters:", "seed 'a' must be a whole number"),
        ("drafters:", "seeds: []\ndrafters:", "no seeds, so there is nothing to train"),
        ("drafters:", "generate: {}\ndrafters:", "there is no notebook notebooks/00_generate_corpus.ipynb"),
        ("{paradigm: kv}", "{paradigm: kv, num_layers: 0}", "drafter 'kv_1': num_layers=0 "),
        (
            "{paradigm: hybrid,",
            "{paradigm: hybrit,",
            "drafter 'warm': paradigm='hybrit' must be one of",
        ),
        ("wait_s: 0", "learning_rate: -1.0", "drafter 'hidden': learning_rate=-1.0 must be above 0"),
        (
            "wait_s: 0",
            "learning_rate: fast",
            "drafter 'hidden': learning_rate='fast' must be a finite number",
        ),
    ],
)
def test_bad_profile_is_refused_in_one_line(tmp_path, monkeypatch, old, new, message):
    monkeypatch.chdir(small_study(tmp_path))
    edit(tmp_path / "notebooks/profiles/small.yaml", old, new)
    with pytest.raises(StudyError, match=message) as caught:
        checked_profile("small")
    assert "\n" not in str(caught.value)


def test_command_line_refuses_a_bad_profile_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(small_study(tmp_path))
    assert main(["study", "smal"]) == 1
    assert "there is no profile notebooks/profiles/smal.yaml; known: small" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("parallel, cores, limit", [(0, 4, 4), (1, 4, 1), (3, 4, 3), (6, 6, 6)])
def test_no_more_trainings_at_once_than_the_profile_says(monkeypatch, parallel, cores, limit):
    """Threads alone would let 16 cores run eight trainings of two threads where six were asked for."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    words = pipeline.snakemake_words(Profile("small", parallel_trainings=parallel), "small", ["-n"])
    assert f"--cores {cores} --resources training={limit} " in " ".join(words)
    assert re.search(r"rule train:.*?resources:\s+training=1,", (ROOT / "notebooks/Snakefile").read_text(), re.DOTALL)


def test_speed_is_measured_with_the_profiles_options_and_alone(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("drafters: [hidden]\nspeed: {new_tokens: 8, chains: [2, 4], tree: none}")
    words = option_words(load_profile(path).speed)
    assert words == ["--new-tokens", "8", "--chains", "2,4", "--tree", "none"]
    path.write_text("drafters: [hidden]\nspeed: {new_token: 8}")
    with pytest.raises(StudyError, match=r"speed.*'new_token' \(did you mean 'new_tokens'"):
        load_profile(path)
    rule = re.search(r"rule speed:.*?shell", (ROOT / "notebooks/Snakefile").read_text(), re.DOTALL)[0]
    assert "threads: workflow.cores" in rule  # all that Snakemake has: no training runs beside it


def test_figures_are_redrawn_from_every_recorded_profile(tmp_path, monkeypatch, capsys):
    """Every drawing notebook with the profile's own parameters; one that its profile leaves out is named."""
    monkeypatch.chdir(small_study(tmp_path))
    edit(tmp_path / "notebooks/profiles/small.yaml", "drafters:", "scorecard: {samples: 5}\ndrafters:")
    for name in ("other", "small"):
        (tmp_path / "data/recorded" / name).mkdir(parents=True)
    ran = []
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(pipeline, "run_notebook", lambda *given: ran.append(given))
    assert main(["figures"]) == 0
    drawn = {name: [] for name in ("other", "small")}
    for notebook, output, parameters in ran:
        name = Path(parameters["tables_dir"]).name
        drawn[name].append(notebook.name[:2])
        assert str(output) == f"results/{name}/notebooks/{notebook.stem}.recorded.ipynb"
        own = {"samples": 5} if (name, notebook.name[:2]) == ("small", "08") else {}
        assert parameters == {**own, "tables_dir": f"../data/recorded/{name}", "figures_dir": f"../figures/{name}"}
    drawn = {name: sorted(numbers) for name, numbers in drawn.items()}
    assert drawn == {"other": ["04", "05", "06", "07", "08", "09", "12", "15", "16", "17"], "small": ["04", "08"]}
    assert "09_beyond_ttt.ipynb: not drawn for small, whose profile has no 'beyond'" in capsys.readouterr().out
    assert main(["figures", "smal"]) == 1
    assert "there are no tables in data/recorded/smal; recorded: other, small" in capsys.readouterr().err


def test_published_drafters_are_judged_beside_the_trained_ones(tmp_path, monkeypatch, capfd):
    """One job each, no training; other weights are judged anew, and a name that is not there is refused with those that are."""
    folder = small_study(tmp_path)
    monkeypatch.chdir(folder)
    edit(folder / "notebooks/profiles/small.yaml", "drafters:", "checkpoints: [kv_2]\ndrafters:")
    with pytest.raises(StudyError, match="checkpoints: data/checkpoints has no 'kv_2'; valid names: none"):
        checked_profile("small")
    described = folder / "data/checkpoints/kv_2/drafter.json"
    described.parent.mkdir(parents=True)
    described.write_text('{"seed": 4, "weights_sha256": "a"}')
    checked_profile("small")
    capfd.readouterr()
    run(folder, "small", "--dry-run")
    output = "".join(capfd.readouterr())
    assert re.search(r"^judge_kv_2_checkpoint +1$", output, re.MULTILINE) and re.search(
        r"^train +3$", output, re.MULTILINE
    ), output


def test_runs_made_elsewhere_are_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(small_study(tmp_path))
    run = tmp_path / "results/small/runs/kv_1/seed0"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    monkeypatch.setattr("snakemake.cli.main", lambda _: sys.exit(0))
    assert main(["study", "small"]) == 1 and run.exists()
    assert (
        "1 runs in results/small were not trained by the pipeline (results/small/runs/kv_1/" in capsys.readouterr().err
    )
    assert main(["study", "small", "-n"]) == 0
    claim(run, "its fingerprint")
    (run / "run.json").touch()
    assert main(["study", "small"]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_profile_fits_the_notebooks(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    checked_profile(path.stem)


def test_full_trains_the_studys_variants_on_layers_that_are_extracted():
    """Three layers of SmolLM2's 30 unless a variant says otherwise; `extract` records the union."""
    profile = load_profile(ROOT / "notebooks/profiles/full.yaml")
    matrix = {name: variant.parameters for name, variant in VARIANTS.items() if name in profile.drafters}
    assert profile.drafters == matrix and list(profile.drafters) == list(matrix) and profile.seeds == [0, 1, 2]
    counts = {3} | {parameters.get("kv_layers", 3) for parameters in matrix.values()}
    wanted = {layer for count in counts for layer in uniform_layers(range(30), count)}
    assert profile.extract["kv_layers"] == sorted(wanted)


def test_variants_by_list_and_by_mapping(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("drafters: [kv_2, hybrid_warm, hidden]")
    assert load_profile(path).drafters == {
        name: VARIANTS[name].parameters for name in ("kv_2", "hybrid_warm", "hidden")
    }
    path.write_text("drafters: {kv_2: , hidden: {epochs: 9}, mine: {paradigm: kv, kv_layers: 5}}")
    assert load_profile(path).drafters == {
        "kv_2": {"paradigm": "kv", "num_layers": 2},
        "hidden": {"paradigm": "hidden", "epochs": 9},
        "mine": {"paradigm": "kv", "kv_layers": 5},
    }


@pytest.mark.pipeline
def test_smoke_study_from_end_to_end(tmp_path, capfd):
    ignored = shutil.ignore_patterns(".*")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=ignored)
    (tmp_path / "data").symlink_to(ROOT / "data")
    process = start(tmp_path, "smoke")  # as `make study` does
    output = process.communicate()[0]
    assert process.returncode == 0, output
    results = tmp_path / "results/smoke"
    drafters = load_profile(ROOT / "notebooks/profiles/smoke.yaml").drafters
    acceptance = tables.read(results / "tables", "acceptance")
    assert set(acceptance.variant) == set(pd.read_csv(results / "tables/runs.csv").variant) == set(drafters)
    assert acceptance[acceptance.metric == "step_acceptance"].value.between(0, 1).all()
    executed = {path.name.split(".")[0] for path in results.glob("notebooks/[0-9]*.ipynb")}
    assert {"01_extract_kv_cache", "03_train_drafter", "04_long_range_decay", "07_decode_end_to_end"} <= executed
    assert set(tables.read(results / "tables", "decoding").variant) == {*drafters, "transformers"}
    assert len(list(results.glob("notebooks/03*.ipynb"))) == len(drafters)
    assert list(results.glob("figures/*.png")) and list(results.glob("figures/*.csv"))
    card = pd.read_csv(results / "figures/scorecard.csv")
    again = scorecard(all_draws(results / "tables", samples=20), read_paper(ROOT / "data/paper/results.csv"))
    assert card["claim"].tolist() == again["claim"].tolist(), "the scorecard saw every table that the study makes"
    assert ((card["verdict"] == "not run") == (again["verdict"] == "not run")).all()
    run(tmp_path, "smoke", "--dry-run")
    assert "Nothing to be done" in "".join(capfd.readouterr())


def listed(folder: Path, capfd) -> str:
    capfd.readouterr()
    run(folder, "small", "--dry-run")
    return "".join(capfd.readouterr())


@pytest.mark.pipeline
def test_a_profile_without_drawings_still_trains_and_its_scorecard_needs_no_curves(study, capfd):
    edit(study / "notebooks/profiles/small.yaml", "extract:", "decay: null\nextract:")
    assert re.search(r"^collect +1$", listed(study, capfd), re.MULTILINE)
    edit(study / "notebooks/profiles/small.yaml", "extract:", "scorecard: {}\nextract:")
    assert re.search(r"^scorecard +1$", listed(study, capfd), re.MULTILINE)


@pytest.mark.pipeline
def test_a_corpus_in_a_folder_is_named_from_the_notebooks_and_known_by_its_content(study, capfd):
    """However its path is written; and written again it is another corpus."""
    text, notebook = study / "results/text", study / "notebooks/01_extract_kv_cache.ipynb"
    text.mkdir()
    (text / "provenance.json").write_text("one")
    own = nbformat.read(notebook, 4)
    (parameters,) = (cell for cell in own.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += '\ncorpus = "selfgen"'
    nbformat.write(own, notebook)
    edit(study / "notebooks/profiles/small.yaml", "{target: tiny}", "{target: tiny, corpus: ./results/text}")
    run(study, "small", "trained")
    executed = nbformat.read(study / "results/small/notebooks/01_extract_kv_cache.ipynb", 4)
    assert any("../results/text" in cell.source for cell in executed.cells)
    assert due(study, capfd) == {}
    (text / "provenance.json").write_text("two")
    assert due(study, capfd) == {"extract": 1, "train": 3}


def test_dialogues_come_before_extraction_and_are_its_corpus(tmp_path, capfd):
    folder = small_study(tmp_path)
    edit(
        folder / "notebooks/profiles/small.yaml",
        "train: {wait_s",
        "dialogues: {train: 4, thinking: false}\ntrain: {wait_s",
    )
    assert due(folder, capfd) == {"dialogues": 1, "extract": 1, "train": 3}
    with contextlib.chdir(folder):
        profile = load_profile("small")
        assert option_words(profile.dialogues) == ["--train", "4", "--no-thinking"]
        edit(Path("notebooks/profiles/small.yaml"), "target: tiny", "target: tiny, corpus: tiny")
        with pytest.raises(StudyError, match="with 'dialogues' they are the corpus; take 'corpus' out"):
            load_profile("small")
        edit(Path("notebooks/profiles/small.yaml"), "train: 4", "trains: 4")
        with pytest.raises(StudyError, match="dialogues.*trains"):
            load_profile("small")
