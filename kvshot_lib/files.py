"""Writing files so that a kill or a full disk never leaves half a file behind."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from .errors import StudyError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary_path)``, flush it to disk and rename it to ``path``.

    Parameters
    ----------
    path : the file to make; its folder is made if need be. What stood there before stays until the new file is whole.
    write : receives a temporary path in the same folder (same suffix) and writes the file there.

    Raises
    ------
    StudyError : no space left, or a folder that can't be written; the old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise StudyError(
            f"could not write {path}: {reason}; free some space or choose another folder, then run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def disk_trouble(error: BaseException) -> str | None:
    """Name what is wrong with the disk, or None if ``error`` is about something else (libraries wrap OSErrors)."""
    number, text = getattr(error, "errno", None), str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
        if number == code or os.strerror(code) in text or f"os error {code}" in text:
            return os.strerror(code).lower()
    return None


def write_json(path: str | Path, value: object) -> Path:
    """Write ``value`` as indented JSON, atomically."""
    return write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def write_csv(path: str | Path, table) -> Path:
    """Write a pandas DataFrame as CSV without its index, atomically."""
    return write_atomically(path, lambda p: table.to_csv(p, index=False, lineterminator="\n"))


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
