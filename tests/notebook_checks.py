"""What every committed notebook must satisfy, and small notebooks for tests."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write_notebook(path: Path, *codes: str) -> Path:
    """Write a notebook of code cells, the first of which is its ``parameters`` cell."""
    cells = [new_markdown_cell(f"# {path.stem}"), *(new_code_cell(code) for code in codes)]
    cells[1].metadata["tags"] = ["parameters"]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), path)
    return path


def run_here(path: Path, parameters: dict) -> None:
    """Run a notebook's code cells in this process, which has imported the library already; what they show goes nowhere."""
    names = {"display": lambda *shown: None}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, path.name, "exec"), names)  # noqa: S102
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= names.keys()
                names |= parameters


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook that is to be committed; nbval alone passes one that was stripped or never run."""
    notebook = nbformat.read(path, as_version=4)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    outputs = [output for cell in codes for output in cell.outputs]
    checks = {
        "execution counts are not 1..n": [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1)),
        "not exactly one cell tagged 'parameters'": tags.count("parameters") == 1,
        "a cell injected by papermill": "injected-parameters" not in tags,
        "an error among the outputs": all(output.output_type != "error" for output in outputs),
        "kernelspec is not python3": notebook.metadata.get("kernelspec", {}).get("name") == "python3",
        "papermill's run times in the metadata": all(
            "papermill" not in m for m in [notebook.metadata, *metadata(codes)]
        ),
        "a path of one machine in the outputs": not any(home in str(outputs) for home in ("/root/", "/home/", "/tmp/")),
        "a nbval tag that nbval doesn't know": {t for t in tags if "nbval" in t.lower()} <= NBVAL_TAGS,
    }
    return [fault for fault, fine in checks.items() if not fine]


def metadata(cells: list) -> list[dict]:
    return [cell.metadata for cell in cells]


NBVAL_TAGS = {f"nbval-{tag}" for tag in ("ignore-output", "check-output", "raises-exception", "skip")}
