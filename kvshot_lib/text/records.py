"""Dialogues as people write them down: JSON lines or a JSON list, and every form of message of public data sets."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import StudyError

MESSAGES = ("messages", "conversations", "conversation", "prompt")
USERS = ("user", "human")


def read_records(path: str | Path, holds: str) -> Iterator[tuple[str, dict]]:
    """Records of a file with where they stand, for messages: one a line, or in ``.json`` a list of them.

    Raises
    ------
    StudyError : no such file; at some line neither UTF-8 nor JSON, or no object; ``holds`` says what should be there.
    """
    path = Path(path)
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise StudyError(f"could not read {path} ({error.strerror}); {holds}") from error
    if path.suffix == ".json":
        found = _parsed(data, path, 1, holds)
        if not isinstance(found, list):
            raise StudyError(f"{path}: not a list of records; {holds}")
        records = ((f"{path}, record {number}", record) for number, record in enumerate(found, start=1))
    else:
        lines = enumerate(data.split(b"\n"), start=1)  # not splitlines: a JSON string may hold U+2028
        records = ((f"{path}, line {n}", _parsed(line, path, n, holds)) for n, line in lines if line.strip())
    for where, record in records:
        if not isinstance(record, dict):
            raise StudyError(f"{where}: not a JSON object; {holds}")
        yield where, record


def _parsed(data: bytes, path: Path, first_line: int, holds: str) -> object:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise StudyError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save it as UTF-8"
        ) from error
    except ValueError as error:
        line = first_line + getattr(error, "lineno", 1) - 1
        raise StudyError(f"{path}, line {line}: not JSON ({error}); {holds}") from error


def text_of(content: object, where: str) -> str:
    """What a message says: text, or a list of parts, joined.

    Raises
    ------
    StudyError : parts that are no text (images), half a character (a lone surrogate), or nothing of either kind.
    """
    parts = content if isinstance(content, list) else [content]
    kinds = [part.get("type", "text") if isinstance(part, dict) else "text" for part in parts]
    if other := [kind for kind in kinds if kind not in ("text", "input_text")]:
        raise StudyError(f"{where}: a part of type {other[0]!r}; only text can be answered, leave this dialogue out")
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise StudyError(f"{where}: what is said must be text, or a list of parts of text")
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(text[error.start]):04x}"
        raise StudyError(f"{where}: {broken} is half a character; mend the text or leave this dialogue out") from error
    return text


def first_turn(record: dict, where: str) -> str:
    """The first user turn of a record, stripped; empty if the dialogue does not begin with one.

    >>> first_turn({"conversations": [{"from": "human", "value": " Hello. "}, {"from": "gpt", "value": "Hi!"}]}, "")
    'Hello.'
    """
    said = next((record[name] for name in MESSAGES if record.get(name)), "")
    if not isinstance(said, list):
        return text_of(said, where).strip()
    if not all(isinstance(message, dict) and ("role" in message or "from" in message) for message in said):
        raise StudyError(f"{where}: messages must have role and content, or from and value")
    turns = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in said]
    speaker, content = next((turn for turn in turns if turn[0] != "system"), ("", ""))
    return text_of(content or "", where).strip() if speaker in USERS else ""
