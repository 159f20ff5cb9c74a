"""The committed notebooks are fit for nbval, and bad parameters are refused before a notebook runs."""

import dis
import inspect
import json
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest
from nbstripout import strip_output
from notebook_checks import COMMITTED, ROOT, faults, write_notebook

from kvshot_lib.errors import StudyError
from kvshot_lib.study.cli import main
from kvshot_lib.study.notebooks import (
    Progress,
    check_parameters,
    locked,
    parameter_defaults,
    run_notebook,
)  # fmt: skip


@pytest.fixture
def small(tmp_path):
    return write_notebook(
        tmp_path / "small.ipynb", "learning_rate = 0.1\nsteps = 3", "print(round(steps * learning_rate, 3))"
    )


def test_the_notebooks_are_there():
    assert [path.name[:2] for path in COMMITTED] == [f"{number:02}" for number in range(len(COMMITTED))]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_is_executed_and_clean(path):
    assert faults(path) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_no_cell_takes_a_functions_name_for_something_else(path):
    """A branch that runs only with other parameters could, unseen, and break what comes after it."""
    cells = nbformat.read(path, as_version=4).cells
    code = compile("\n".join(cell.source for cell in cells if cell.cell_type == "code"), path.name, "exec")
    steps = [*dis.get_instructions(code)]
    stored = [step.argval for step in steps if step.opname == "STORE_NAME"]
    made = {step.argval.co_name for step in steps if inspect.iscode(step.argval)}
    assert [name for name in made if stored.count(name) > 1] == []


@pytest.mark.parametrize("name, near", [("learning_rat", "learning_rate"), ("stepz", "steps")])
def test_misspelt_parameter_is_refused_with_the_valid_names(small, name, near):
    with pytest.raises(StudyError, match=rf"'{name}' \(did you mean '{near}'\?\); valid names: learning_rate, steps"):
        check_parameters(small, {name: 1})


def test_number_read_as_text_is_refused(small):
    with pytest.raises(StudyError, match="'1e-3' is text, not a number"):
        check_parameters(small, {"learning_rate": "1e-3"})
    check_parameters(small, {"learning_rate": 1.0e-3, "steps": 2})


def test_notebook_without_a_parameters_cell_is_refused(tmp_path):
    path = tmp_path / "plain.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = 1")]), path)
    with pytest.raises(StudyError, match="has 0 cells tagged 'parameters' instead of one"):
        check_parameters(path, {})


def test_missing_or_broken_notebook_is_one_line(tmp_path):
    (tmp_path / "broken.ipynb").write_text("not a notebook")
    for name in ("absent.ipynb", "broken.ipynb"):
        with pytest.raises(StudyError) as caught:
            check_parameters(tmp_path / name, {})
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_parameters_are_read_with_their_values(small):
    assert parameter_defaults(small) == {"learning_rate": 0.1, "steps": 3}


def test_lock_is_refused_while_held_and_free_afterwards(tmp_path):
    with (
        locked(tmp_path / "lock"),
        pytest.raises(StudyError, match="another run is at work"),
        locked(tmp_path / "lock"),
    ):
        pass
    with locked(tmp_path / "lock"):
        pass


def test_progress_shows_the_newest_line_of_a_bar_now_and_then(capsys):
    progress = Progress("02_train", every_s=0)
    progress.write("\r10%\r20%")
    Progress("02_train", every_s=60).write("too early")
    assert capsys.readouterr().err == "02_train: 20%\n"


def test_command_line_refuses_before_running(small, tmp_path, capsys):
    assert main(["notebook", "run", str(small), str(tmp_path / "out.ipynb"), "-p", "step", "3"]) == 1
    assert capsys.readouterr().err.startswith("error: notebook small.ipynb has no 'step' (did you mean 'steps'?)")
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.pipeline
@pytest.mark.parametrize("kernel", [{"name": "myenv", "display_name": "Mine", "language": "R"}, {"name": "myenv"}, {}])
def test_parameters_reach_the_notebook_by_every_way_and_an_editors_kernel_does_not_matter(
    small, kernel, tmp_path, capfd
):
    """An editor saves the name of its own environment, or nothing: the notebook runs in this Python."""
    notebook = nbformat.read(small, as_version=4)
    notebook.metadata = {"kernelspec": kernel} if kernel else {}
    notebook.cells[-1].source += "\nimport sys\nprint(sys.executable)"
    nbformat.write(notebook, small)
    words = ["-y", "{learning_rate: 0.5, steps: 5}", "-p", "steps", "4"]
    assert main(["notebook", "run", str(small), str(tmp_path / "out.ipynb"), *words]) == 0
    told = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs[0].text
    assert told == f"2.0\n{sys.executable}\n"
    assert "out: started" in capfd.readouterr().err


@pytest.mark.pipeline
def test_progress_bars_keep_their_last_state_only(tmp_path):
    bar = "import sys\nfor share in (10, 60, 100):\n    print(f'\\rbar: {share}%', end='', file=sys.stderr, flush=True)"
    path = write_notebook(
        tmp_path / "bars.ipynb", "a = 1", f"{bar}\n    print('found', share)\nprint('\\nnote', file=sys.stderr)"
    )
    run_notebook(path, tmp_path / "out.ipynb", {})
    outputs = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs
    told = {output.name: output.text.lstrip("\r") for output in outputs}
    assert told == {"stderr": "bar: 100%\nnote\n", "stdout": "found 10\nfound 60\nfound 100\n"}


@pytest.mark.pipeline
def test_failed_notebook_tells_one_line_and_keeps_what_ran(tmp_path):
    error = "from kvshot_lib.errors import StudyError\nraise StudyError('no features; run 01 first')"
    path = write_notebook(tmp_path / "bad.ipynb", "a = 1", "print('ran')", error)
    with pytest.raises(StudyError) as caught:
        run_notebook(path, tmp_path / "out.ipynb", {})
    assert str(caught.value).startswith("bad.ipynb: no features; run 01 first [cell 3 of ")
    assert not (tmp_path / "out.ipynb").exists()
    assert "ran" in (tmp_path / "out.unfinished.ipynb").read_text()


DRAW = """from IPython.display import Image
Image(b"not quite a picture " * height + b"at all, but compared like one", format="png")"""


@pytest.mark.pipeline
def test_nbval_sees_a_changed_number_and_a_changed_figure_and_the_checks_see_a_stripped_notebook(tmp_path):
    good = write_notebook(
        tmp_path / "good.ipynb", "height = 1", "import sys\nprint('busy', file=sys.stderr)\nprint(height)", DRAW
    )
    nbformat.write(nbclient.execute(nbformat.read(good, as_version=4)), good)
    assert faults(good) == []
    before = good.read_text()
    notebook = json.loads(before)
    picture = notebook["cells"][3]["outputs"][0]["data"]["image/png"]
    (tmp_path / "number.ipynb").write_text(before.replace('"1\\n"', '"2\\n"'))
    (tmp_path / "figure.ipynb").write_text(before.replace(picture[:60], picture[:50] + "A" * 10))
    (tmp_path / "stderr.ipynb").write_text(before.replace('"busy\\n"', '"idle\\n"'))
    assert len({path.read_text() for path in tmp_path.glob("*.ipynb")}) == 4
    good.rename(tmp_path / "good.kept")  # stderr.ipynb is the same but for its progress bar, and must pass
    shutil.copy(ROOT / "conftest.py", tmp_path)
    words = ["-p", "no:cacheprovider", "--nbval", "--nbval-current-env", "-rA", "-q", "--color=no", "."]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    failed = {line.split()[1].split("::")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"number.ipynb", "figure.ipynb"} and "PASSED stderr.ipynb" in run.stdout, run.stdout

    good = (tmp_path / "good.kept").rename(good)
    kept = {"keep_output": False, "keep_count": False, "keep_id": True}
    nbformat.write(strip_output(nbformat.read(good, as_version=4), **kept), good)
    assert faults(good) == ["execution counts are not 1..n"]
