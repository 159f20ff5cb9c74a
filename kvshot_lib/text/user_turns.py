"""First user turns of public dialogues, for a target to answer: UltraChat, ShareGPT, or a local file of either form.

A source is a ``.jsonl`` or ``.json`` file (read as it is), or anything else that `datasets.load_dataset` knows,
with the split after a colon: ``HuggingFaceH4/ultrachat_200k:train_sft``. Several are joined by commas. Only the
first user turn of a dialogue is taken; the answer in the data set is thrown away, for the target writes its own.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import StudyError
from .corpus import SPLITS

FORMS = "messages/conversations of role/from and content/value (UltraChat, ShareGPT), or prompt"


def read_user_turns(sources: str) -> list[str]:
    """First user turns of all sources, in their order, each once.

    Raises
    ------
    StudyError : a source that can't be had or read, no package ``datasets`` for it, or a form that isn't known.
    """
    turns = dict.fromkeys(
        turn for source in sources.split(",") for record in _records(source.strip()) if (turn := first_turn(record))
    )
    if not turns:
        raise StudyError(f"no user turns in {sources}; a record holds {FORMS}")
    return list(turns)


def first_turn(record: dict) -> str:
    """The first user turn of one record, stripped; empty if the dialogue does not begin with one.

    >>> first_turn({"conversations": [{"from": "human", "value": " Hello. "}, {"from": "gpt", "value": "Hi!"}]})
    'Hello.'
    """
    messages = record.get("messages") or record.get("conversations")
    if isinstance(messages, Sequence) and messages and isinstance(messages[0], dict):
        said = [(m.get("role") or m.get("from"), m.get("content") or m.get("value")) for m in messages]
        speaker, text = next((turn for turn in said if turn[0] != "system"), ("", ""))
        return str(text or "").strip() if speaker in ("user", "human") else ""
    return record["prompt"].strip() if isinstance(record.get("prompt"), str) else ""


def turns_hash(turns: Iterable[str]) -> str:
    """SHA-256 of all turns, in order."""
    digest = hashlib.sha256()
    for turn in turns:
        digest.update(turn.encode() + b"\0")
    return digest.hexdigest()


def by_split(sources: str) -> dict[str, list[str]]:
    """User turns of every split: of twenty in the list the first is for validation, the second for evaluation."""
    turns = read_user_turns(sources)
    places = {"validation": (0,), "evaluation": (1,), "train": range(2, 20)}
    return {split: [turn for number, turn in enumerate(turns) if number % 20 in places[split]] for split in SPLITS}


def _records(source: str) -> Iterator[dict]:
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        yield from _local(path)
        return
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise StudyError(f"{source} needs pip install datasets; a local .jsonl file of dialogues doesn't") from error
    name, _, split = source.partition(":")
    try:
        yield from load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises a dozen kinds
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise StudyError(
            f"could not load {source}: {why}; give a name:split of the hub or a local .jsonl file"
        ) from error


def _local(path: Path) -> Iterator[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise StudyError(
            f"could not read dialogues from {path} ({error}); give JSON in UTF-8, a record a line in .jsonl"
        ) from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise StudyError(f"{path} is not a list of records; a record holds {FORMS}")
    yield from records
