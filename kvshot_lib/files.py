"""Writing files so that a kill or a full disk never leaves half a file behind, and an altered one is not read as good.

JSON objects carry the SHA-256 of the rest of them, and listed files stand in a ``SHA256SUMS`` beside them, as
`sha256sum --check` reads it; older files have none and are read unchecked. Checkpoints are zips, with a CRC a record.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

from .errors import StudyError

SEAL = "sha256_of_the_rest"  # key of a JSON object
SUMS = "SHA256SUMS"
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())
os.umask(_UMASK := os.umask(0))  # it can only be read by setting it


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
    temporary = path.with_name(f".{path.stem}.{_HOST}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # safetensors lets nobody else read its files
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if (reason := disk_trouble(error)) is None:
            raise
        raise StudyError(
            f"could not write {path}: {reason}; free some space or choose another folder, then run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that can't be written can't be tidied either
            temporary.unlink(missing_ok=True)
    return path


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes of this machine left of earlier attempts at this file."""
    for left in path.parent.glob(f".{path.stem}.{_HOST}.*.tmp{path.suffix}"):
        try:
            os.kill(int(left.name.removeprefix(f".{path.stem}.{_HOST}.").split(".")[0]), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OSError):
            pass


def disk_trouble(error: BaseException | None) -> str | None:
    """What is wrong with the disk, or None if it is something else (libraries wrap OSErrors, or hide them)."""
    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            if number == code or os.strerror(code) in text or f"os error {code}" in text:
                return os.strerror(code).lower()
        error = error.__cause__ or error.__context__
    return None


def write_json(path: str | Path, value: object) -> Path:
    """Write ``value`` as indented JSON, atomically; an object with the SHA-256 of its other keys."""
    if isinstance(value, dict):
        value = {**value, SEAL: _json_hash(value)}
    return write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path: str | Path, remedy: str) -> dict:
    """Read an object that `write_json` wrote; what is not there, no object, or altered is refused with ``remedy``."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StudyError(f"{path} can't be read ({str(error).splitlines()[0]}); {remedy}") from error
    if not isinstance(value, dict):
        raise StudyError(f"{path} is damaged: no JSON object; {remedy}")
    if (seal := value.pop(SEAL, None)) is not None and seal != _json_hash(value):
        raise StudyError(f"{path} is damaged: it is not what was written; {remedy}")
    return value


def _json_hash(value: dict) -> str:
    read_back = json.loads(json.dumps({name: part for name, part in value.items() if name != SEAL}))
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def write_csv(path: str | Path, table, *, listed: bool = False) -> Path:
    """Write a pandas DataFrame without its index, atomically; ``listed`` in the folder's ``SHA256SUMS``, if wanted."""

    def write(temporary: Path) -> None:
        table.to_csv(temporary, index=False, lineterminator="\n")
        if listed:
            list_file(path, temporary)

    return write_atomically(path, write)


def list_file(path: str | Path, content: Path) -> None:
    """Write into ``SHA256SUMS`` beside ``path`` what its bytes will be: those of ``content``.

    A kill before the file itself is in place leaves a list that refuses the old one: made again it fits.
    """
    sums = Path(path).with_name(SUMS)
    handle = os.open(sums.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        known = dict(line.split("  ")[::-1] for line in _lines(sums) if line.count("  ") == 1)
        known[Path(path).name] = sha256(content)
        text = "".join(f"{digest}  {name}\n" for name, digest in sorted(known.items()))
        write_atomically(sums, lambda p: p.write_text(text))
    finally:
        os.close(handle)


def check_listed(path: str | Path, remedy: str) -> None:
    """Refuse a file that the ``SHA256SUMS`` beside it, if there is one, does not vouch for."""
    path = Path(path)
    sums = path.with_name(SUMS)
    if sums.exists() and f"{sha256(path)}  {path.name}" not in _lines(sums):
        raise StudyError(f"{path} is damaged: its SHA-256 is not the one in {sums.name}; {remedy}")


def _lines(sums: Path) -> list[str]:
    return sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.exists() else []


def write_handle(path: str | Path, save: Callable[[object], object]) -> Path:
    """Call ``save(handle)`` with a binary file to write to; atomically. (Given a path, torch hides a full disk.)"""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as handle:
            save(handle)

    return write_atomically(path, write)


def check_records(path: str | Path) -> None:
    """Raise BadZipFile for a zip, as torch writes, with a record that its CRC does not fit. (torch looks at none.)"""
    with zipfile.ZipFile(path) as records:
        if broken := records.testzip():
            raise zipfile.BadZipFile(f"{broken} was altered")


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
