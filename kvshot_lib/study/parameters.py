"""What a notebook's parameters are called, checks of what is to be set, and a hash of its code."""

import ast
import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import StudyError


@dataclass(frozen=True)
class CodeCell:
    """A code cell's source and tags."""

    source: str
    tags: tuple[str, ...]


def read_code_cells(notebook: str | Path) -> list[CodeCell]:
    """Read a notebook's code cells. (nbformat would do, but takes two seconds to import.)

    Raises
    ------
    StudyError : no such file, or not a notebook.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        return [
            CodeCell("".join(cell["source"]), tuple(cell["metadata"].get("tags", ())))
            for cell in cells
            if cell["cell_type"] == "code"
        ]
    except FileNotFoundError as error:
        raise StudyError(f"there is no notebook {notebook}; the study's are in notebooks/") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{notebook} is not a notebook; restore it with: git checkout {notebook}") from error


def parameter_names(notebook: str | Path) -> list[str]:
    """Names assigned in the notebook's ``parameters`` cell, in their order.

    Raises
    ------
    StudyError : not exactly one such cell, without which papermill would run with the defaults and say nothing.
    """
    sources = [cell.source for cell in read_code_cells(notebook) if "parameters" in cell.tags]
    if len(sources) != 1:
        raise StudyError(
            f"{notebook} has {len(sources)} cells tagged 'parameters' instead of one; nothing can be set in it"
        )
    names = []
    for node in ast.parse(sources[0]).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def check_names(given: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Raise a StudyError for the first name in ``given`` that is not in ``valid``, with the nearest valid one."""
    valid = list(valid)
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise StudyError(f"{what} has no '{name}'{hint}; valid names: {', '.join(valid) or 'none'}")


def check_parameters(notebook_path: str | Path, parameters: dict) -> None:
    """Refuse parameters that the notebook doesn't have, and numbers that YAML read as text.

    papermill alone only warns of an unknown name and runs with the defaults.

    Raises
    ------
    StudyError : no ``parameters`` cell, an unknown name (the message lists the valid ones), or a number as text.
    """
    check_names(parameters, parameter_names(notebook_path), f"notebook {Path(notebook_path).name}")
    for name, value in parameters.items():
        check_no_number_as_text(name, value)


def check_no_number_as_text(name: str, value: object) -> None:
    """Refuse text such as ``1e-3``: YAML reads a number only with a point in it, as in ``1.0e-3``."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            with contextlib.suppress(ValueError):
                float(item)
                raise StudyError(
                    f"{name}: '{item}' is text, not a number; YAML wants a point and no quotes, as in 1.0e-3"
                )


def code_hash(notebook_path: str | Path) -> str:
    """Hex SHA-256 over the sources of the notebook's code cells; outputs, counts and prose don't count."""
    sources = [cell.source for cell in read_code_cells(notebook_path)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()
