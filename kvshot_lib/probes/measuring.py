"""What every measuring of trained drafters shares: runs and features opened, parts made once, tables written."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..drafters.runs import DESCRIPTION, find_runs, run_name
from ..errors import StudyError
from ..features.spec import check_origin
from ..features.store import StoredFeatures
from ..files import read_json
from ..metrics import tables
from ..parts import Parts
from ..provenance import provenance
from ..target.load import Target, load_target
from ..training.anchors import find_anchors


@dataclass(frozen=True)
class Results:
    """The finished runs of a results folder (``variant/seedN`` -> folder), their target, its evaluation features."""

    folder: Path
    runs: dict[str, Path]
    target: Target
    source: StoredFeatures

    @property
    def draft_length(self) -> int:
        """Draft steps K that the runs were judged on."""
        counts = pd.read_csv(next(iter(self.runs.values())) / "counts.csv")
        return int(counts["draft_step"].max()) + 1

    @property
    def hashes(self) -> str:
        """What the features are: target and documents."""
        return f"{self.target.hash} {self.source.documents_hash}"


def open_results(results_dir: str | Path, runs: Sequence[str] = ()) -> Results:
    """Open a results folder, its target in float32.

    Raises
    ------
    StudyError : no such finished run; features of another target.
    """
    folder = Path(results_dir)
    found = find_runs(folder, runs)
    source = StoredFeatures(folder / "features/evaluation")
    target = load_target(source.spec.target, dtype="float32")
    check_origin(source.spec, target, f"the features in {folder} were recorded")
    return Results(folder, found, target, source)


def visit(source, told: str, reads: Sequence[str], draft_length: int, device) -> Iterator:
    """Documents of a source one by one: number, features in float32 and their anchors."""
    for document in tqdm(range(len(source)), desc=told, mininterval=5):
        features = source.batch([document], reads).to(device, torch.float32)
        yield document, features, find_anchors(features.answer_mask, draft_length)


def described(folder: Path) -> dict:
    """What a run's ``drafter.json`` says."""
    return read_json(folder / DESCRIPTION, f"delete {folder} and train again")


@dataclass(frozen=True)
class Part:
    """One part of a measurement: rows of ``table``, about the run in ``folder`` (None: about the target alone)."""

    table: str
    name: str
    make: Callable[[], pd.DataFrame]
    folder: Path | None = None


def measure_parts(kept: Path, depends: str, parts: Iterable[Part]) -> dict[str, pd.DataFrame]:
    """Every table of some parts; what folder ``kept`` has of them, of the same ``depends``, is not made again.

    The weights' hash is in a part's name, so that a retrained run is measured anew.
    """
    done, found = Parts(kept, depends), {}
    for part in parts:
        folder, name = part.folder, part.name
        if folder is not None:
            name = f"{run_name(folder).replace('/', '.')}.{described(folder)['weights_sha256'][:8]}.{name}"

        def make(part=part, name=name) -> pd.DataFrame:
            print(name, file=sys.stderr, flush=True)
            return table_of(part.table, part.make(), part.folder)

        found.setdefault(part.table, []).append(done.table(name, make))
    return {table: pd.concat(own, ignore_index=True) for table, own in found.items()}


def table_of(name: str, rows: pd.DataFrame, folder: Path | None = None) -> pd.DataFrame:
    """Rows with the columns, types and digits of table ``name``; variant and seed are those of a run's folder.

    Raises
    ------
    StudyError : no rows.
    """
    if rows.empty:
        raise StudyError("no anchors in the evaluation documents: extract documents with longer answers")
    if folder is not None:
        variant, _, seed = run_name(folder).partition("/seed")
        rows = rows.assign(variant=variant, seed=int(seed))
    return tables.rounded(rows[list(tables.SCHEMAS[name])].astype(tables.SCHEMAS[name]))


def facts_of(results: Results, seconds: float, **more) -> pd.DataFrame:
    """One row: what was measured, on what, by which code."""
    target, source = results.target, results.source
    found = {"target": target.name, "target_hash": target.hash, "runs": " ".join(results.runs)}
    found |= {"documents": len(source), "documents_hash": source.documents_hash}
    found |= {"dtype": str(target.dtype).removeprefix("torch."), "seconds": round(seconds, 1)}
    return pd.DataFrame([{**found, **provenance(target.device), **more}])


def write_tables(results_dir: str | Path, made: Mapping[str, pd.DataFrame]) -> dict[str, Path]:
    """Write tables into RESULTS_DIR/tables."""
    return {name: tables.write(Path(results_dir) / "tables", name, table) for name, table in made.items()}
