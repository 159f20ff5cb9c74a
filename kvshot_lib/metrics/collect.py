"""Finished runs merged into the tables of a study, and recorded tables made smaller.

A run leaves ``run.json`` (its row of ``runs``) and a CSV file for each table of `OF_RUN` in
``RESULTS_DIR/runs/<variant>/seed<seed>/``. Their order in the tables depends on their names alone.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..drafters.runs import find_runs
from ..drafters.variants import MAIN_VARIANTS, in_study_order
from ..errors import StudyError
from ..files import read_json, sha256
from .resampling import acceptance_table
from .tables import TABLES, check, read, read_one, rounded, write

AGAIN = "run notebooks/03_train_drafter.ipynb for this run again"
OF_RUN = ("counts", "run_lengths", "axes", "history", "gradients", "compute")


def collect(
    results_dir: str | Path, runs: Sequence[str] = (), *, samples: int = 2000, seed: int = 0, keep: str | Path = ""
) -> dict[str, Path]:
    """Merge finished runs, all or some, into RESULTS_DIR/tables.

    ``acceptance`` is added: metrics with intervals. Floats keep 6 significant digits: recorded tables stay small.

    Parameters
    ----------
    runs : ``variant/seed0`` …; all by default.
    samples, seed : of the bootstrap.
    keep : a folder of tables collected before; its runs stay, unless ``results_dir`` has trained them again.

    Raises
    ------
    StudyError : no finished run; a run with a missing or malformed file; runs that can't be compared (other evaluation
        documents, draft steps, anchors or target). Tables of an earlier collection stay as they were.
    """
    found = {_key(run): run for run in map(_read_run, find_runs(results_dir, runs).values())}
    if keep:
        kept = {name: read(keep, name) for name in ("runs", *OF_RUN)}
        for variant, number in kept["runs"][["variant", "seed"]].itertuples(index=False, name=None):
            own = {n: t[(t["variant"] == variant) & (t["seed"] == number)] for n, t in kept.items()}
            found.setdefault((variant, number), own)
    place = {variant: i for i, variant in enumerate(in_study_order(variant for variant, _ in found))}
    ordered = [found[key] for key in sorted(found, key=lambda key: (place[key[0]], key[1]))]
    made = {name: pd.concat([run[name] for run in ordered], ignore_index=True) for name in ordered[0]}
    for name in ("counts", "run_lengths"):  # document by document, in which drafters are alike: packs better
        made[name] = made[name].sort_values("document", kind="stable", ignore_index=True)
    _check_one_target(made["runs"], results_dir)
    made["acceptance"] = acceptance_table(made["counts"], made["run_lengths"], samples, seed)
    return {name: write(Path(results_dir) / "tables", name, rounded(table)) for name, table in sorted(made.items())}


def thin(tables_dir: str | Path) -> list[Path]:
    """Leave of the largest recorded tables what is drawn of them.

    ``axes`` keeps the main drafters (all, if none is there); ``gradients`` norms of attention's projections and the
    gate's mean, to four digits.
    """
    axes, gradients = read(tables_dir, "axes"), read(tables_dir, "gradients")
    main_ones = axes[axes["variant"].isin(MAIN_VARIANTS)]
    gradients = gradients.query("quantity == 'gate_mean' or matrix.str.endswith('_proj') and quantity != 'numel'")
    gradients = gradients.assign(value=gradients["value"].map(lambda x: float(f"{x:.4g}")))
    made = {"axes": main_ones if len(main_ones) else axes, "gradients": gradients}
    return [write(tables_dir, name, table) for name, table in made.items()]


def _key(run: dict[str, pd.DataFrame]) -> tuple[str, int]:
    return run["runs"]["variant"].iloc[0], run["runs"]["seed"].iloc[0]


def _read_run(folder: Path) -> dict[str, pd.DataFrame]:
    """The checked tables of one run."""
    record = read_json(folder / "run.json", f"delete {folder} and train again")
    for file, digest in record.pop("files", {}).items():
        if not (folder / file).is_file() or sha256(folder / file) != digest:
            raise StudyError(f"{folder / file} is missing or not what the run wrote: delete {folder} and train again")
    found = {"runs": check(pd.DataFrame([record]), "runs", folder / "run.json")}
    found |= {name: read_one(folder / f"{name}.csv", name, AGAIN) for name in OF_RUN}
    expected = f"{folder.parent.name}/{folder.name}"
    for name, table in found.items():
        inside = sorted({f"{row.variant}/seed{row.seed}" for row in table.itertuples()}) or ["no run"]
        if inside != [expected] and not (table.empty and TABLES[name].optional):
            raise StudyError(f"the {name} in {folder} are of {' and '.join(inside)}: delete {folder} and train again")
    return found


def _check_one_target(runs: pd.DataFrame, results_dir: str | Path) -> None:
    """Refuse runs on different targets in one table: their acceptance says nothing about one another."""
    first = runs.drop_duplicates("target_hash")
    if len(first) > 1:
        named = " and ".join(f"{r.variant} seed {r.seed} ({r.target}, {r.target_hash[:8]})" for r in first.itertuples())
        raise StudyError(f"runs in {results_dir} have different targets: {named}; give each a results_dir of its own")
