"""Tables of earlier versions of the study, converted once: another form, and other names of variants.

python -m kvshot_lib.study.convert TABLES_DIR
"""

import csv
import io
import lzma
import sys
from pathlib import Path

import pandas as pd

from ..drafters.variants import current_name
from ..errors import StudyError
from ..metrics import tables


def convert(tables_dir: str | Path) -> list[Path]:
    """Rewrite every table of the folder in its present form and with present names; gives the files written."""
    written = []
    for name, schema in tables.SCHEMAS.items():
        old = [Path(tables_dir) / f"{name}.{form}" for form in (*tables.OLD_FORMS, "csv")]
        path = next((path for path in old if path.is_file()), None)
        if path is None:
            continue
        table = _read(path, {column: "str" for column, kind in schema.items() if kind == "str"})
        for column in {"variant", "init_from"} & set(table):
            table[column] = [name if pd.isna(name) else current_name(name) for name in table[column]]
        written.append(tables.write(tables_dir, name, tables.check(table, name, path)))
        if path != written[-1]:
            path.unlink()
    if not written:
        raise StudyError(f"{tables_dir} holds no table of the study; nothing was converted")
    return written


def _read(path: Path, text: dict[str, str]) -> pd.DataFrame:
    """A table as it was: CSV, its columns one a line (``.columns.xz``), or compressed CSV."""
    if path.name.endswith(".columns.xz"):
        lines = lzma.decompress(path.read_bytes()).decode()
        columns = {name: values for name, *values in csv.reader(io.StringIO(lines))}
        table = pd.DataFrame(columns, dtype="str").replace("", pd.NA)
        return table.assign(**{name: pd.to_numeric(table[name]) for name in table if name not in text})
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])


if __name__ == "__main__":
    try:
        print(*convert(sys.argv[1]), sep="\n")
    except StudyError as error:
        sys.exit(f"error: {error}")
