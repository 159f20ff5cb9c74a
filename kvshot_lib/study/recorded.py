"""Tables and figures that are kept in the repository: recorded from a study's results, and brought up to date."""

import csv
import io
import lzma
import shutil
from pathlib import Path

import pandas as pd

from ..drafters.variants import current_name
from ..errors import StudyError
from ..metrics import tables
from ..metrics.collect import thin


def record(profile: str) -> str:
    """Copy tables and figures of results/PROFILE to data/recorded/PROFILE and figures/PROFILE, as they are published.

    Raises
    ------
    StudyError : no tables there.
    """
    results, to, figures = Path("results") / profile, Path("data/recorded") / profile, Path("figures") / profile
    names = [name for name in tables.SCHEMAS if tables.path_of(results / "tables", name).is_file()]
    if not names:
        raise StudyError(f"there are no tables in {results}/tables; make them with: make study PROFILE={profile}")
    for name in names:
        tables.write(to, name, tables.read(results / "tables", name))
    thin(to)
    figures.mkdir(parents=True, exist_ok=True)
    for path in results.glob("figures/*"):
        if not path.name.startswith("training_"):  # of one run each: training.png shows them together
            shutil.copy(path, figures)
    return f"{to}: {len(names)} tables; {figures}: {len(list(figures.glob('*.png')))} figures"


def convert(tables_dir: str | Path) -> list[Path]:
    """Bring tables of earlier versions into their present form, with present names; gives the files written.

    Raises
    ------
    StudyError : no table of the study there.
    """
    written = []
    for name, schema in tables.SCHEMAS.items():
        forms = (Path(tables_dir) / f"{name}.{form}" for form in (*tables.OLD_FORMS, "csv"))
        if (path := next(filter(Path.is_file, forms), None)) is None:
            continue
        table = _read_old(path, [column for column, kind in schema.items() if kind == "str"])
        for column in {"variant", "init_from"} & set(table):
            table[column] = [name if pd.isna(name) else current_name(name) for name in table[column]]
        written.append(tables.write(tables_dir, name, tables.check(table, name, path)))
        if path != written[-1]:
            path.unlink()
    if not written:
        raise StudyError(f"{tables_dir} holds no table of the study; nothing was converted")
    return written


def _read_old(path: Path, words: list[str]) -> pd.DataFrame:
    """A table as it was: CSV, compressed CSV, or (``.columns.xz``) CSV a line a column; ``words`` are text."""
    source = path
    if path.name.endswith(".columns.xz"):
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
        columns = {name: values for name, *values in csv.reader(lines)}
        source = io.StringIO(pd.DataFrame(columns).to_csv(index=False))
    return pd.read_csv(source, dtype=dict.fromkeys(words, "str"), keep_default_na=False, na_values=[""])
