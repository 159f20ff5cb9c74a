"""The pipeline's profiles (notebooks/profiles/*.yaml), its start, and what makes its results out of date.

python -m kvshot_lib.study.pipeline [PROFILE] [-n ...]        run notebooks/Snakefile; what follows PROFILE goes to Snakemake
python -m kvshot_lib.study.pipeline --figures [PROFILE ...]   redraw figures/PROFILE from data/recorded/PROFILE (all of them)
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from ..errors import StudyError
from ..metrics.tables import path_of
from .notebooks import locked, run_notebook
from .profiles import (
    NOTEBOOKS,
    Profile,
    check_drafters,
    check_profile,
    load_profile,
)

# The table that a notebook draws first, where not every study has it.
DRAWN_FROM = {
    "queries": "attention_overlap", "gradients": "gradients", "prefix": "attention_shift", "decode": "decoding", "beyond": "compute",
}  # fmt: skip
MARK = ".fingerprint"  # in every folder that a notebook of the pipeline owns (`notebooks.claim`)
DRY = {"-n", "--dry-run", "--dryrun"}


































def run_snakemake(profile: str, parallel_trainings: int, words: list[str], lock: int) -> int:
    """Run notebooks/Snakefile in the current folder; returns the exit status. Ctrl-C is left to Snakemake.

    Snakemake holds ``lock`` too, so that it stays held if this process alone is killed. Snakemake's own lock outlives
    a kill and would block the next run.
    """
    cores = max(os.cpu_count(), parallel_trainings)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        "notebooks/Snakefile",
        "--config",
        f"profile={profile}",
    ]
    command += ["--quiet", "rules" if DRY & set(words) else "all"]
    command += ["--cores", str(cores), "--resources", f"training={parallel_trainings or cores}"]
    command += ["--rerun-incomplete", "--nolock", "--keep-going"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen([*command, *words], pass_fds=[lock], env=os.environ | {"PATH": path})
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def overview(profile: Profile, results: Path) -> str:
    """The profile's trainings, a line a drafter: which seeds have finished a run, up to date or not, and which have none."""
    lines = [f"{profile.name}: {len(profile.drafters)} drafters, seeds {', '.join(map(str, profile.seeds))}"]
    for variant in profile.drafters:
        seeds = {True: [], False: []}
        for seed in profile.seeds:
            seeds[(results / f"runs/{variant}/seed{seed}/run.json").exists()].append(str(seed))
        told = [
            f"{word} {' '.join(seeds[done])}" for done, word in ((True, "finished"), (False, "not yet")) if seeds[done]
        ]
        lines.append(f"  {variant:20} {', '.join(told)}")
    return "\n".join(lines)


def check_foreign_runs(profile: Profile, results: Path) -> None:
    """Refuse to train anew, and so to remove, runs that something else than the pipeline has finished in its folder."""
    folders = [results / f"runs/{variant}/seed{seed}" for variant in profile.drafters for seed in profile.seeds]
    foreign = [folder for folder in folders if (folder / "run.json").exists() and not (folder / MARK).exists()]
    if foreign:
        raise StudyError(
            f"{len(foreign)} runs in {results} were not trained by the pipeline ({foreign[0]}, ...), which would replace them; "
            f"to use them: python -m kvshot_lib.metrics.tables collect {results}; to train anew, move {results}/runs away"
        )


def redraw(name: str) -> None:
    """Draw figures/<name> anew from data/recorded/<name> by notebooks 03 to 09: those of its profile whose tables are recorded, with its parameters.

    Raises
    ------
    StudyError : nothing recorded under that name, or a notebook that failed.
    """
    tables = Path("data/recorded") / name
    if not tables.is_dir():
        known = ", ".join(recorded_profiles()) or "nothing yet"
        raise StudyError(f"there are no tables in {tables}; recorded: {known}")
    known = Path(f"notebooks/profiles/{name}.yaml").exists()  # or else recorded by hand
    profile = load_profile(name) if known else Profile(name)
    for key in ("decay", "queries", "gradients", "prefix", "decode", "scorecard", "beyond"):
        parameters, notebook = getattr(profile, key), Path(NOTEBOOKS[key])
        recorded = not known or key not in DRAWN_FROM or path_of(tables, DRAWN_FROM[key]).is_file()
        if notebook.exists() and recorded and (parameters is not None or not known):
            folders = {"tables_dir": f"../{tables}", "figures_dir": f"../figures/{name}"}
            folders |= {"profile": name} if key == "beyond" else {}
            output = Path(f"results/{name}/notebooks/{notebook.stem}.recorded.ipynb")
            run_notebook(notebook, output, (parameters or {}) | folders)


def recorded_profiles() -> list[str]:
    """Names of the folders in data/recorded."""
    return sorted(path.name for path in Path("data/recorded").glob("*/"))


def main(words: list[str] | None = None) -> int:
    """Redraw figures, or check the profile, run the pipeline and say how it ended; returns the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        if words[:1] == ["--figures"]:
            for name in words[1:] or recorded_profiles():
                redraw(name)
            return 0
        profile = words.pop(0) if words and not words[0].startswith("-") else "laptop"
        return study(profile, words)
    except (StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def study(profile: str, words: list[str]) -> int:
    """Check the profile, run the pipeline and say how it ended; returns Snakemake's exit status."""
    loaded = load_profile(profile)
    check_profile(loaded)
    check_drafters(loaded)
    results = Path("results") / loaded.name
    if DRY & set(words):
        print(overview(loaded, results), flush=True)
    else:
        check_foreign_runs(loaded, results)
    with locked(results / ".lock") as lock:
        status = run_snakemake(profile, loaded.parallel_trainings, words, lock)
    if status:
        print(
            "the run stopped early; what was finished is kept, and the same command goes on from there", file=sys.stderr
        )
    elif not words:
        print(f"{results} is complete and up to date: see its notebooks/, tables/ and figures/")
    return status


if __name__ == "__main__":
    sys.exit(main())
