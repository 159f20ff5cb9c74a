"""Running the study's notebooks: their parameters, and one run with papermill.

Plain ``papermill IN OUT -p NAME VALUE --cwd notebooks`` works too, but only warns of a misspelt name.
"""

import ast
import contextlib
import difflib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import StudyError
from ..files import disk_trouble
from ..parts import claim


class CodeCell(NamedTuple):
    """A code cell's source and tags."""

    source: str
    tags: list[str]


def read_code_cells(notebook: str | Path) -> list[CodeCell]:
    """Read a notebook's code cells. (nbformat would do, but takes two seconds to import.)

    Raises
    ------
    StudyError : no such file, or not a notebook.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [CodeCell("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]
    except FileNotFoundError as error:
        raise StudyError(f"there is no notebook {notebook}; the study's are in notebooks/") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{notebook} is not a notebook; restore it with: git checkout {notebook}") from error


def parameter_defaults(notebook: str | Path) -> dict:
    """Names and values in the notebook's ``parameters`` cell, in their order; plain values, no expressions.

    (`papermill.inspect_notebook` gives source texts, of one line each, and is imported for three seconds.)

    Raises
    ------
    StudyError : not exactly one such cell, without which papermill would run with the defaults and say nothing.
    """
    sources = [cell.source for cell in read_code_cells(notebook) if "parameters" in cell.tags]
    if len(sources) != 1:
        raise StudyError(f"{notebook} has {len(sources)} cells tagged 'parameters' instead of one: nothing can be set")
    assignments = [node for node in ast.parse(sources[0]).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def check_names(given: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Raise a StudyError for the first name in ``given`` that is not in ``valid``, with the nearest valid one."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise StudyError(f"{what} has no '{name}'{hint}; valid names: {', '.join(valid) or 'none'}")


def check_parameters(notebook: str | Path, parameters: dict) -> None:
    """Refuse parameters that the notebook doesn't have, and numbers that YAML read as text.

    Raises
    ------
    StudyError : no ``parameters`` cell, an unknown name (the message lists the valid ones), or a number as text.
    """
    check_names(parameters, parameter_defaults(notebook), f"notebook {Path(notebook).name}")
    for name, value in parameters.items():
        check_no_number_as_text(name, value)


def check_no_number_as_text(name: str, value: object) -> None:
    """Refuse text such as ``1e-3``: YAML reads a number only with a point in it, as in ``1.0e-3``."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            with contextlib.suppress(ValueError):
                float(item)
                told = f"{name}: '{item}' is text, not a number; YAML wants a point and no quotes, as in 1.0e-3"
                raise StudyError(told)


def run_notebook(
    notebook: str | Path, output: str | Path, parameters: dict, *, owns: str = "", fingerprint: str = ""
) -> None:
    """Execute ``notebook`` with ``parameters`` and write it to ``output`` when it has run to its end.

    It runs in its own folder, in this Python, whatever kernel an editor has saved in it. Of
    ``owns``, a folder that only this notebook writes, what another ``fingerprint`` left is removed first; work of the
    same one stays, for the notebook to resume.

    Raises
    ------
    StudyError : an unknown parameter, or a cell that failed. What ran is left beside ``output`` as
        ``*.unfinished.ipynb``.
    """
    notebook, output = Path(notebook), Path(output)
    check_parameters(notebook, parameters)
    unfinished = output.with_suffix(".unfinished.ipynb")
    with locked(output.with_name(f".{output.stem}.lock"), wait=True):
        if owns:
            claim(Path(owns), fingerprint)
        print(f"{output.stem}: started", file=sys.stderr, flush=True)
        started_at = time.monotonic()
        execute(notebook, unfinished, parameters, Progress(output.stem))
        os.replace(unfinished, output)
        print(f"{output.stem}: done in {time.monotonic() - started_at:.0f} s", file=sys.stderr, flush=True)


def execute(notebook: Path, output: Path, parameters: dict, progress: "Progress") -> None:
    """Run ``notebook`` with papermill, its logs silenced, the notebook's stderr to ``progress``.

    Raises
    ------
    StudyError : a cell failed; one line with its error and the place to read on.
    """
    # jsonschema's optional check of IRIs, which no notebook has, makes a grammar when imported: two seconds of three.
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options = {
        "kernel_name": "python3",
        "language": "python",
        "progress_bar": False,
        "stderr_file": progress,
        "coalesce_streams": True,  # of a progress bar its last state stays
        "config": Config({"KernelManager": {"transport_encryption": "auto"}}),
        "extra_arguments": ["--IPKernelApp.log_level=50"],
    }
    try:
        papermill.execute_notebook(str(notebook), str(output), parameters, cwd=str(notebook.parent), **options)
    except PapermillExecutionError as error:
        text = " ".join(str(error.evalue).split()) or "(no message)"
        line = text if error.ename == "StudyError" else f"{error.ename}: {text}"
        raise StudyError(f"{notebook.name}: {line} [cell {error.exec_count} of {output}]") from error


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


class Taken(StudyError):
    """Another process is at work there."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, patience_s: float = 0) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends.

    Raises
    ------
    Taken : another process still holds it after ``patience_s``, and ``wait`` is False.
    StudyError : a folder that can't be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=patience_s)
    except Timeout as error:
        if not wait:
            raise Taken(f"another run is at work in {path.parent}; wait for it or stop it first") from error
        print(f"waiting for another process that writes to {path.parent}", file=sys.stderr, flush=True)
        held = lock.acquire()
    except OSError as error:
        why = disk_trouble(error) or str(error)
        told = f"could not write to {path.parent}: {why}; free some space or choose another folder"
        raise StudyError(told) from error
    with held:
        yield
