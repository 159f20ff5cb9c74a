"""What makes a step's results out of date: the code that can change their numbers, its parameters, and what it reads.

`python -m kvshot_lib fingerprint train` prints what a step's fingerprint covers.
"""

import ast
import functools
import hashlib
import json
from importlib.util import resolve_name
from pathlib import Path

from .. import EXPORTS
from ..errors import StudyError
from .notebooks import check_names, read_code_cells
from .profiles import DRAWING, NOTEBOOKS

PACKAGE = Path(__file__).parents[1]
# What can't change a number: messages, how files are written, how steps are started. A variant's parameters reach its
# training as parameters, so that another variant more leaves the trained ones alone; where they are drawn they count.
LOOKS = {"drafters.variants"}
UNCOUNTED = {"errors", "files", "parts", "provenance", *LOOKS}
FIGURE = "figure"  # tag of cells that only draw or print: they are not counted where numbers are made


def fingerprint(step: str, parameters: dict, *upstream: str) -> str:
    """Short hash of all that a step's results depend on: `covered`, its parameters, fingerprints of what it reads.

    ``step`` is a key of ``NOTEBOOKS``, or a module of the library such as ``probes.gradients``.
    """
    parts = [*covered(step).values(), json.dumps(parameters, sort_keys=True), *upstream]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def covered(step: str) -> dict[str, str]:
    """Code that the step's fingerprint covers: name of each notebook or module -> its code without comments and layout.

    Raises
    ------
    StudyError : no such step, or an import of kvshot_lib that leads nowhere.
    """
    if module_path(step) is None:
        check_names([step], NOTEBOOKS, "the study")
    drawing = step in DRAWING
    if step in NOTEBOOKS:
        program = ast.parse(plain_python(NOTEBOOKS[step], figures=drawing))
        code, todo = {NOTEBOOKS[step]: ast.dump(program)}, imported_modules(program, "", NOTEBOOKS[step])
    else:
        code, todo = {}, {step}
    uncounted, rooms = (UNCOUNTED - LOOKS, {"study"}) if drawing else (UNCOUNTED, {"study", "plots"})
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in found or name in uncounted or name.split(".")[0] in rooms:
            continue
        path = module_path(name)
        if path is None:
            raise StudyError(f"{step} is made of kvshot_lib.{name}, which isn't there; restore it with git checkout")
        found[name], imported = _read_module(path, name, path.stat().st_mtime_ns)
        todo |= imported
    return code | {f"kvshot_lib.{name}".rstrip("."): found[name] for name in sorted(found)}


def plain_python(notebook: str | Path, *, figures: bool = True) -> str:
    """The notebook's code cells as one program, without IPython's own syntax (and, if wanted, cells that only draw)."""
    cells = [cell for cell in read_code_cells(notebook) if figures or FIGURE not in cell.tags]
    lines = [line for cell in cells for line in cell.source.splitlines()]
    return "\n".join(line for line in lines if not line.startswith(("%", "!", "?")))


def module_path(name: str) -> Path | None:
    """File of module ``name`` of the library (dotted, without ``kvshot_lib.``), None if there is none."""
    base = PACKAGE / name.replace(".", "/") if name else PACKAGE
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache  # a sweep asks for the same modules a hundred times
def _read_module(path: Path, name: str, _changed_ns: int) -> tuple[str, set[str]]:
    """A module's code without comments, docstrings and layout, and what it imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    room = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return ast.dump(tree), imported_modules(tree, room, str(path))


def imported_modules(tree: ast.AST, room: str, where: str) -> set[str]:
    """Modules of the library that a program in the package ``room`` imports, dotted without ``kvshot_lib.``.

    Raises
    ------
    StudyError : one that leads nowhere: to pass over it would leave its code out of every fingerprint.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "kvshot_lib"}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), f"kvshot_lib.{room}".rstrip("."))
            if base.split(".")[0] == "kvshot_lib":
                names |= {_home(base.partition(".")[2], alias.name, where) for alias in node.names}
    return names


def _home(base: str, name: str, where: str) -> str:
    """Module behind ``from base import name``: ``name`` may itself be one, or be lent by the package's ``__init__``."""
    if module_path(inner := f"{base}.{name}".lstrip(".")):
        return inner
    if (path := module_path(base)) and name in path.read_text():
        return base or EXPORTS.get(name, "")
    raise StudyError(f"{where} imports kvshot_lib.{inner}, which isn't there; mend the import")
