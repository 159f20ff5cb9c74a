"""First user turns of public dialogues, for a target to answer: UltraChat, ShareGPT, or a local file of either form.

A source is a ``.jsonl`` or ``.json`` file (read as it is), or anything else that `datasets.load_dataset` knows,
with the split after a colon: ``HuggingFaceH4/ultrachat_200k:train_sft``. Several are joined by commas. Only the
first user turn of a dialogue is taken; the answer in the data set is thrown away, for the target writes its own.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import StudyError
from .corpus import SPLITS
from .records import first_turn, read_records

HOLDS = "a record holds messages, conversation(s) or prompt, of role/from and content/value (UltraChat, ShareGPT)"


def read_user_turns(sources: str) -> list[str]:
    """First user turns of all sources, in their order, each once.

    Raises
    ------
    StudyError : a source that can't be had or read, no package ``datasets`` for it, or a form that isn't known.
    """
    records = (record for source in sources.split(",") for record in _records(source.strip()))
    turns = [turn for turn in dict.fromkeys(first_turn(record, where) for where, record in records) if turn]
    if not turns:
        raise StudyError(f"no user turns in {sources}; {HOLDS}")
    return turns


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


def _records(source: str) -> Iterator[tuple[str, dict]]:
    if Path(source).suffix in (".jsonl", ".json"):
        yield from read_records(source, HOLDS)
        return
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise StudyError(f"{source} needs pip install datasets; a local .jsonl file of dialogues doesn't") from error
    name, _, split = source.partition(":")
    try:
        records = load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises a dozen kinds
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise StudyError(
            f"could not load {source}: {why}; give a name:split of the hub or a local .jsonl file"
        ) from error
    yield from ((f"{source}, record {number}", record) for number, record in enumerate(records, start=1))
