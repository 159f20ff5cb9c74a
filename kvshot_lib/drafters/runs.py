"""Where trainings leave their drafters, `results_dir/runs/<variant>/seed<k>`: found, or told how to be made."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import StudyError
from ..files import read_json
from .variants import VARIANTS, check_current, in_study_order, parameters_of

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
    check_current(name.partition("/")[0] for name in runs)
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


def training_command(folder: Path, **parameters) -> str:
    """The command, for the repository's root, that trains the drafter of ``results_dir/runs/<variant>/seed<k>``.

    ``results_dir`` may be absolute, or relative to the root or to notebooks/; the study's variants bring
    their parameters.
    """
    results_dir, variant, seed = folder.parents[2], folder.parent.name, folder.name.removeprefix("seed")
    inside = Path(*(part for part in results_dir.parts if part != ".."))
    seen = inside if inside.is_absolute() else Path("..") / inside  # from notebooks/, where notebooks run
    output = inside / f"notebooks/03_train_drafter.{variant}.seed{seed}.ipynb"
    values = {"variant": variant, **parameters_of(variant), "seed": seed, **parameters}
    values |= {"results_dir": seen, "figures_dir": seen / "figures"}
    given = [word for name, value in values.items() for word in ("-p", name, str(value))]
    return shlex.join(["python", "-m", "kvshot_lib", "notebook", "run", NOTEBOOK, str(output), *given])


def how_to_train(folder: Path, **parameters) -> str:
    """What to do about a drafter that isn't there; ``parameters`` are known of how it is to be trained."""
    if not (re.fullmatch(r"seed\d+", folder.name) and folder.parent.parent.name == "runs"):
        made = "that notebook 03_train_drafter made: .../runs/<variant>/seed<k>"
        return f"no trained drafter in {folder}; give a folder {made}"
    known = "" if folder.parent.name in VARIANTS else ", what makes it this variant"
    return (
        f"no trained drafter in {folder}; train it first, from the repository's root (add your budget{known}): "
        f"{training_command(folder, **parameters)}"
    )
