"""A step's fingerprint: it changes with what can change the step's numbers, and with nothing else."""

import shutil

import nbformat
import pytest
from notebook_checks import ROOT, write_notebook

from kvshot_lib.errors import StudyError
from kvshot_lib.study import fingerprints
from kvshot_lib.study.cli import main
from kvshot_lib.study.fingerprints import fingerprint
from kvshot_lib.study.profiles import NOTEBOOKS


def write(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A library of two rooms, and a notebook that imports from one of them."""
    library = tmp_path / "kvshot_lib"
    write(library, {"__init__.py": "", "high/__init__.py": "", "low/__init__.py": "", "parts.py": ""})
    write(library, {"high/top.py": '"""Top."""\nfrom ..low import deep\n', "low/inner/__init__.py": ""})
    write(library, {"low/deep.py": "def f():\n    from .inner.deepest import g\n    return g()\n"})
    write(
        library, {"low/inner/deepest.py": 'def g():\n    """Doc."""\n    return 1\n', "drafters/variants.py": "A = 1\n"}
    )
    code = "%matplotlib inline\nfrom kvshot_lib.high.top import f"
    write_notebook(tmp_path / NOTEBOOKS["extract"], "a = 1", code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprints, "PACKAGE", library)
    return library


def test_code_counts_wherever_it_is_and_comments_docstrings_and_other_modules_do_not(small):
    before = fingerprint("extract", {"a": 1})
    write(
        small,
        {
            "low/inner/deepest.py": 'def g():  # a comment\n    """Another doc."""\n    return 1\n',
            "low/other.py": "x = 1",
        },
    )
    assert fingerprint("extract", {"a": 1}) == before
    assert len({before, fingerprint("extract", {"a": 2}), fingerprint("extract", {"a": 1}, "other input")}) == 3
    write(small, {"low/inner/deepest.py": "def g():\n    return 2\n"})
    assert fingerprint("extract", {"a": 1}) != before


def test_another_variant_trains_itself_and_not_the_others(small):
    write(small, {"low/deep.py": "from ..drafters.variants import A\n"})
    before = fingerprint("extract", {})
    write(small, {"drafters/variants.py": "A = 1\nB = 2\n"})
    assert fingerprint("extract", {}) == before


@pytest.mark.parametrize("line", ["from ..low import gone", "from ..low.gone import f", "import kvshot_lib.gone"])
def test_an_import_that_leads_nowhere_is_refused(small, line):
    write(small, {"high/top.py": f"{line}\nf = 1\n"})
    with pytest.raises(StudyError, match="gone(.f)?, which isn't there"):
        fingerprint("extract", {})


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A copy of the study's own code, to be changed."""
    shutil.copytree(ROOT / "kvshot_lib", tmp_path / "kvshot_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path / "kvshot_lib")
    return tmp_path


def append(path, line: str) -> None:
    path.write_text(path.read_text() + f"\n{line}\n")


def steps() -> dict[str, str]:
    return {
        step: fingerprint(step, {})
        for step in ("extract", "train", "decay", "probes.shift", "decoding.timing", "training.cost")
    }


@pytest.mark.parametrize(
    "file, changed",
    [
        ("plots/style.py", {"decay"}),
        ("drafters/variants.py", {"decay"}),
        ("study/pipeline.py", set()),
        ("drafters/layers.py", {"train", "probes.shift", "decoding.timing", "training.cost"}),
        ("training/loop.py", {"train"}),
        ("training/cost.py", {"train", "training.cost"}),
        ("target/capture.py", {"extract", "train", "probes.shift", "decoding.timing", "training.cost"}),
    ],
)
def test_a_changed_line_makes_out_of_date_what_it_can_change(study, file, changed):
    before = steps()
    append(study / "kvshot_lib" / file, "COLOUR = 'red'")
    after = steps()
    assert changed <= {step for step in before if before[step] != after[step]} <= changed | {"probes.shift"}


def test_a_cell_that_draws_leaves_the_training_alone(study):
    before = steps()
    path = study / NOTEBOOKS["train"]
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "  # a comment"
    notebook.cells.append(nbformat.v4.new_code_cell("print('done')", metadata={"tags": ["figure"]}))
    nbformat.write(notebook, path)
    assert steps() == before
    notebook.cells[-1].metadata["tags"] = []
    nbformat.write(notebook, path)
    assert {step for step, found in steps().items() if found != before[step]} == {"train"}


def test_what_a_fingerprint_covers_is_told(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["fingerprint", "train"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == NOTEBOOKS["train"] and {"kvshot_lib.training.loop", "kvshot_lib.drafters.layers"} <= set(told)
    assert not any(name.startswith(("kvshot_lib.plots", "kvshot_lib.study", "kvshot_lib.decoding")) for name in told)
    assert main(["fingerprint", "trian"]) == 1
    assert "the study has no 'trian' (did you mean 'train'?)" in capsys.readouterr().err
