"""The start of the pipeline (notebooks/Snakefile), and figures drawn anew from recorded tables."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ..errors import StudyError
from ..parts import MARK
from .fingerprints import covered
from .notebooks import locked, run_notebook
from .profiles import DRAWING, FOLDER, NOTEBOOKS, Profile, checked_profile, load_profile

DRY = {"-n", "--dry-run", "--dryrun"}


def run_study(profile: str, words: Sequence[str]) -> int:
    """Check the profile, run the pipeline and say how it ended; gives Snakemake's exit status.

    Snakemake runs in this very process, so the lock on the results lasts as long as both. (Its own lock would outlive a
    kill and block the next run.)
    """
    from snakemake.cli import main as snakemake

    loaded = checked_profile(profile)
    results = loaded.results
    for step in loaded.notebooks:
        covered(step)  # what is wrong with its code is told here; in the Snakefile it would be lost in the quiet
    if not DRY & set(words):
        check_foreign_runs(loaded, results)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with locked(results / ".lock"):
        try:
            snakemake([*snakemake_words(loaded, profile, words), *words])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    if status:
        print("the run stopped early; what was finished is kept, the same command goes on from there", file=sys.stderr)
    elif not words:
        print(f"{results} is complete and up to date: see its notebooks/, tables/ and figures/")
    return status


def snakemake_words(profile: Profile, given: str, words: Sequence[str]) -> list[str]:
    """Options of Snakemake: at most ``parallel_trainings`` of the profile side by side, what a kill left made anew."""
    cores = max(os.cpu_count(), profile.parallel_trainings)
    limit = profile.parallel_trainings or cores
    return [
        *("--snakefile", "notebooks/Snakefile", "--config", f"profile={given}"),
        *("--quiet", "rules" if DRY & set(words) else "all", "--cores", str(cores), "--resources", f"training={limit}"),
        *("--rerun-incomplete", "--nolock", "--keep-going"),
    ]


def check_foreign_runs(profile: Profile, results: Path) -> None:
    """Refuse to train anew, and so to remove, runs that something else than the pipeline has finished in its folder."""
    folders = [results / f"runs/{variant}/seed{seed}" for variant in profile.drafters for seed in profile.seeds]
    foreign = [folder for folder in folders if (folder / "run.json").exists() and not (folder / MARK).exists()]
    if foreign:
        raise StudyError(
            f"{len(foreign)} runs in {results} were not trained by the pipeline ({foreign[0]}, ...), which would "
            f"replace them; to use them: python -m kvshot_lib collect {results}; to train anew: move {results}/runs"
        )


def redraw(profiles: Sequence[str] = ()) -> None:
    """Draw figures/PROFILE anew from data/recorded/PROFILE, for all recorded profiles or those that are named.

    Raises
    ------
    StudyError : nothing recorded under a name, or a notebook that failed.
    """
    jobs = [job for name in profiles or recorded_profiles() for job in drawings(name)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:  # papermill changes the folder of its whole process
        list(pool.map(run_notebook, *zip(*jobs, strict=True)))


def drawings(name: str) -> list[tuple[Path, Path, dict]]:
    """The drawing notebooks of a recorded profile, each with its output and parameters; one left out is named."""
    tables = Path("data/recorded") / name
    if not tables.is_dir():
        recorded = ", ".join(recorded_profiles()) or "nothing yet"
        raise StudyError(f"there are no tables in {tables}; recorded: {recorded}")
    known = (FOLDER / f"{name}.yaml").exists()  # or else recorded by hand
    profile, found = load_profile(name) if known else Profile(name), []
    for key in DRAWING:
        parameters, notebook = profile.notebooks.get(key), Path(NOTEBOOKS[key])
        if known and parameters is None:
            print(f"{notebook.name}: not drawn for {name}, whose profile has no '{key}'")
            continue
        folders = {"tables_dir": f"../{tables}", "figures_dir": f"../figures/{name}"}
        output = profile.results / f"notebooks/{notebook.stem}.recorded.ipynb"
        found.append((notebook, output, (parameters or {}) | folders))
    return found


def recorded_profiles() -> list[str]:
    """Names of the folders in data/recorded."""
    return sorted(path.name for path in Path("data/recorded").glob("*/"))
