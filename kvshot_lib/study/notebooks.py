"""Running the study's notebooks: check parameters, execute one with papermill.

    python -m kvshot_lib.study.notebooks run IN OUT [-f FILE] [-y YAML] [-p NAME VALUE] ...   one notebook, own parameters
    python -m kvshot_lib.study.notebooks execute NOTEBOOK ...    in place at its own parameters, ready to be committed

Plain ``papermill IN OUT -p NAME VALUE --cwd notebooks`` works too, but only warns of a misspelt name.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from ..errors import StudyError
from ..files import disk_trouble
from ..parts import claim
from .parameters import check_parameters

STRIPPED = "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution"


def run_notebook(
    notebook: str | Path,
    output: str | Path,
    parameters: dict,
    *,
    cwd: str | Path | None = None,
    owns: str | Path | None = None,
    fingerprint: str | None = None,
) -> None:
    """Execute ``notebook`` with ``parameters`` and write it to ``output`` when it has run to its end.

    Parameters
    ----------
    cwd : the folder that the notebook runs in; by default its own.
    owns, fingerprint : a folder that only this notebook writes, and what its contents depend on. Work that another
        fingerprint left there is removed first; work of the same fingerprint stays, for the notebook to resume.

    Raises
    ------
    StudyError : an unknown parameter, or a cell that failed. What ran is left beside ``output`` as ``*.unfinished.ipynb``.
    """
    notebook, output = Path(notebook), Path(output)
    check_parameters(notebook, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished.ipynb")
    with locked(output.with_name(f".{output.stem}.lock"), wait=True):
        if owns is not None:
            claim(Path(owns), str(fingerprint))
        print(f"{output.stem}: started", file=sys.stderr, flush=True)
        started_at = time.monotonic()
        execute(notebook, unfinished, parameters, Path(cwd or notebook.parent), Progress(output.stem))
        collapse_progress(unfinished)
        os.replace(unfinished, output)
        print(f"{output.stem}: done in {time.monotonic() - started_at:.0f} s", file=sys.stderr, flush=True)


def execute(notebook: Path, output: Path, parameters: dict, cwd: Path, progress: "Progress") -> None:
    """Run ``notebook`` with papermill, its own warnings and logs silenced, its stderr sent to ``progress``.

    Raises
    ------
    StudyError : a cell failed; one line with its error and the place to read on.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {
        "progress_bar": False,
        "config": Config({"KernelManager": {"transport_encryption": "auto"}}),
        "extra_arguments": ["--IPKernelApp.log_level=50"],
    }
    try:
        papermill.execute_notebook(str(notebook), str(output), parameters, cwd=str(cwd), stderr_file=progress, **quiet)
    except PapermillExecutionError as error:
        text = " ".join(str(error.evalue).split()) or "(no message)"
        line = text if error.ename == "StudyError" else f"{error.ename}: {text}"
        raise StudyError(f"{notebook.name}: {line} [cell {error.exec_count} of {output}]") from error


def collapse_progress(path: Path) -> None:
    """Leave of each cell's stderr what a terminal would show at the end: a progress bar's last state, not every one."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        text = "".join(output.text for output in outputs if output.get("name") == "stderr")
        lines = [line.split("\r")[-1] for line in text.removesuffix("\n").replace("\r\n", "\n").split("\n")]
        rest = [output for output in outputs if output.get("name") != "stderr"]
        if text:
            cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text="\n".join(lines) + "\n"), *rest]
    nbformat.write(notebook, path)


class Progress:
    """Repeats the newest line of a notebook's progress bars every ``every_s`` seconds, with its name in front.

    Two notebooks that run side by side share the terminal, so bars that redraw themselves would mix.
    """

    def __init__(self, name: str, every_s: float = 10.0):
        self.name, self.every_s, self.shown_at = name, every_s, time.monotonic()

    def write(self, text: str) -> None:
        lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
        if lines and time.monotonic() - self.shown_at >= self.every_s:
            self.shown_at = time.monotonic()
            print(f"{self.name}: {lines[-1]}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[int]:
    """Hold a lock that ends with the process, however it ends; yields its file descriptor.

    Raises
    ------
    StudyError : another process holds it, and ``wait`` is False; or a folder that can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        why = disk_trouble(error) or str(error)
        raise StudyError(
            f"could not write to {path.parent}: {why}; free some space or choose another folder"
        ) from error
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise StudyError(f"another run is at work in {path.parent}; wait for it or stop it first") from error
            print(f"waiting for another process that writes to {path.parent}", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def execute_in_place(notebook: str | Path) -> None:
    """Run a notebook at its own parameters and store its outputs in it, without run times and machine details.

    Raises
    ------
    StudyError : a cell failed; the notebook is left as it was.
    """
    notebook = Path(notebook)
    fresh = notebook.with_name(f".fresh.{notebook.name}")
    try:
        run_notebook(notebook, fresh, {})
        words = ["--keep-output", "--keep-count", "--extra-keys", STRIPPED, str(fresh)]
        subprocess.run([sys.executable, "-m", "nbstripout", *words], check=True)
        os.replace(fresh, notebook)
    finally:
        fresh.unlink(missing_ok=True)
        fresh.with_name(f".{fresh.stem}.lock").unlink(missing_ok=True)


def main(words: list[str] | None = None) -> int:
    """Command line; returns the exit status. Errors that a reader can mend are one line."""
    parser = argparse.ArgumentParser(prog="python -m kvshot_lib.study.notebooks", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute one notebook with own parameters")
    run.add_argument("notebook")
    run.add_argument("output")
    run.add_argument("-f", "--file", action="append", default=[], help="YAML file of parameters")
    run.add_argument("-y", "--yaml", action="append", default=[], help="YAML text of parameters")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--cwd", help="folder to run in (by default the notebook's)")
    run.add_argument("--owns", help="folder that this notebook alone writes")
    run.add_argument("--fingerprint", help="what the contents of that folder depend on")
    in_place = commands.add_parser("execute", help="execute notebooks in place, ready to be committed")
    in_place.add_argument("notebooks", nargs="+")
    given = parser.parse_args(words)
    try:
        if given.command == "execute":
            for notebook in given.notebooks:
                execute_in_place(notebook)
        else:
            texts = [Path(file).read_text() for file in given.file] + given.yaml
            parameters = {name: value for text in texts for name, value in (yaml.safe_load(text) or {}).items()}
            parameters |= {name: yaml.safe_load(value) for name, value in given.parameter}
            run_notebook(
                given.notebook, given.output, parameters, cwd=given.cwd, owns=given.owns, fingerprint=given.fingerprint
            )
    except (StudyError, OSError, yaml.YAMLError) as error:
        full = isinstance(error, OSError) and disk_trouble(error)
        remedy = "; free some space or choose another folder, then run again" if full else ""
        print(f"error: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
