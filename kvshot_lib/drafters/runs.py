"""Where trainings leave their drafters, `results_dir/runs/<variant>/seed<k>`: found, or told what makes them."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import StudyError
from ..files import read_json
from .variants import in_study_order

DESCRIPTION, FINISHED = "drafter.json", "run.json"
NOTEBOOK = "notebooks/03_train_drafter.ipynb"


def find_runs(results_dir: str | Path, runs: Sequence[str] = (), finished: bool = True) -> dict[str, Path]:
    """Runs of a results folder, ``variant/seedN`` -> folder, in the study's order.

    Parameters
    ----------
    runs : names of the wanted ones; all by default.
    finished : leave out trainings that have not run to their end. Otherwise a trained drafter is enough,
        and a folder of checkpoints, one in each of its folders, will do as well.

    Raises
    ------
    StudyError : there is none, or one of ``runs`` is not there.
    """
    folder, mark, found = Path(results_dir), FINISHED if finished else DESCRIPTION, {}
    for path in folder.glob(f"runs/*/seed*/{mark}"):
        if re.fullmatch(r"seed\d+", path.parent.name):
            found[run_name(path.parent)] = path.parent
    for path in [] if finished else folder.glob(f"*/{DESCRIPTION}"):
        found[run_name(path.parent)] = path.parent
    told, known = "finished run" if finished else "trained drafter", ", ".join(sorted(found)) or "none"
    if unknown := [name for name in runs if name not in found]:
        raise StudyError(f"{', '.join(unknown)}: no {told} in {folder / 'runs'}; there: {known}")
    if not found:
        raise StudyError(f"no {told} in {folder / 'runs'}: train one with {NOTEBOOK}")
    places = {variant: place for place, variant in enumerate(in_study_order(name.split("/")[0] for name in found))}
    order = sorted(runs or found, key=lambda name: (places[name.split("/")[0]], int(name.rpartition("seed")[2])))
    return {name: found[name] for name in order}


def run_name(folder: Path) -> str:
    """``variant/seedN`` of a run's folder, or of a published drafter's, whose description says which seed it is."""
    if re.fullmatch(r"seed\d+", folder.name):
        return f"{folder.parent.name}/{folder.name}"
    return f"{folder.name}/seed{read_json(folder / DESCRIPTION, 'restore it with git').get('seed', 0)}"
