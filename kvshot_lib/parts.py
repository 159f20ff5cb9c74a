"""Long work in parts: what is done is kept, and parts that other work left are never read as one's own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from .files import write_atomically

MARK = ".fingerprint"  # says what the contents of a folder depend on


def claim(folder: Path, fingerprint: str) -> None:
    """Make ``folder`` ready for work with this fingerprint: empty it if its contents have another one."""
    mark = folder / MARK
    if not mark.exists() or mark.read_text() != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(mark, lambda path: path.write_text(fingerprint))


class Parts:
    """Tables measured one after the other, each in a file of its own.

    Parameters
    ----------
    folder : where they lie; only this work writes there.
    fingerprint : all that they depend on (code, weights, settings). What another fingerprint left is removed first.
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder = Path(folder)
        claim(self.folder, fingerprint)

    def table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """Part ``name``: read if it is there, else made and kept."""
        path = self.folder / f"{name}.parquet"
        if not path.exists():
            table = make()
            write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
        return pd.read_parquet(path)
