"""The token corpus: dialogues that the target wrote itself, split by document into train, validation and evaluation.

On disk a corpus is a folder with one ``<split>.npz`` per split and a ``provenance.json`` that tells where the documents
come from and the SHA-256 of each file. Lengths are ragged, so a file holds all tokens end to end (see `save_corpus`).
"""

import lzma
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import StudyError
from ..files import read_json, sha256, write_atomically, write_json

SPLITS = ("train", "validation", "evaluation")
CORPORA = {name: Path(__file__).parents[2] / "data/corpus" / name for name in ("selfgen", "sealed", "gemma-sealed")}
SCHEMA_VERSION = 1
OPENED = "OPENED.txt"
REPEAT_TOKENS = 16
MIN_ANSWER_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Document:
    """A dialogue, most often of one user turn and one answer, or a text whose beginning stands for the turn.

    tokens : int32 [n], chat markers included.
    answer_mask : bool [n], True on assistant tokens: from the first token after an assistant header to the closing
        end-of-turn token, if the answer came to its end.
    origin : name of its corpus, and what its provenance says; empty for documents of one's own.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray
    origin: Mapping = field(default_factory=dict)

    def until(self, tokens: int) -> "Document":
        """Its first tokens, at most so many."""
        return replace(self, tokens=self.tokens[:tokens], answer_mask=self.answer_mask[:tokens])

    @property
    def answer(self) -> np.ndarray:
        """The answer's token ids, int32 [answer tokens]."""
        return self.tokens[self.answer_mask]

    @property
    def prompt(self) -> np.ndarray:
        """Everything before the first answer: header, user turn, assistant header."""
        return self.tokens[: self.answer_mask.argmax() if self.answer_mask.any() else None]


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a corpus. ``provenance`` is the whole ``provenance.json``."""

    name: str
    split: str
    documents: list[Document]
    provenance: dict


def load_corpus(name: str | Path, split: str, *, whole_answers: bool = False) -> Corpus:
    """Read one split.

    Parameters
    ----------
    name : ``selfgen`` (tracked in ``data/corpus``), ``tiny`` (made up on the spot, for tests) or a corpus folder.
    split : one of ``SPLITS``. Documents come in a random order, so the first N are a fair sample.
    whole_answers : give every document as stored. By default a greedy answer ends where it starts to repeat itself
        (`repetition_start`), and documents left with fewer than 16 answer tokens are dropped: 16 tokens hold nine
        chains of seven draft steps (a chain needs x_{t+1} … x_{t+8} in the answer).

    Raises
    ------
    StudyError : unknown corpus or split, missing or altered file.

    Notes
    -----
    A sealed set says on stderr when it was opened (``OPENED.txt`` in its folder).
    """
    if split not in SPLITS:
        raise StudyError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if name == "tiny":
        made_up = {"name": "tiny", "vocab_size": 512}
        return Corpus("tiny", split, [replace(d, origin=made_up) for d in _tiny_documents()[split]], made_up)
    folder = CORPORA.get(str(name), Path(name))
    facts = folder / "provenance.json"
    if not facts.is_file():
        if str(name) in CORPORA:
            raise StudyError(f"the texts {name} aren't in {folder}; data/experiments has the command that writes them")
        known = ", ".join([*CORPORA, "tiny"])
        raise StudyError(f"unknown corpus {str(name)!r}; choose {known} or a folder that `kvshot generate` finished")
    provenance = read_json(facts, "fetch or generate the corpus again")
    if provenance.get("schema_version") != SCHEMA_VERSION or split not in provenance.get("splits", {}):
        raise StudyError(f"{facts} describes no {split!r} split in format {SCHEMA_VERSION}; make the corpus anew")
    of_split = provenance["splits"][split]
    path = folder / of_split["file"]
    if not path.is_file() or sha256(path) != of_split["sha256"]:
        raise StudyError(f"{path} is missing or is not the file its provenance.json describes; make the corpus anew")
    if (opened := folder / OPENED).is_file():  # a sealed set: whoever reads it again should know
        told = f"{name} is a sealed set that was opened. {opened.read_text().strip()}"
        print(f"{told} What is chosen since then must be judged on other documents.", file=sys.stderr)
    origin = provenance | {"name": str(name)}
    documents = [replace(document, origin=origin) for document in read_documents(path)]
    if not whole_answers:
        if of_split["answers"] == "greedy":
            documents = [cut_repetition(document) for document in documents]
        documents = [document for document in documents if len(document.answer) >= MIN_ANSWER_TOKENS]
    return Corpus(str(name), split, documents, provenance)


def save_corpus(
    folder: str | Path, splits: Mapping[str, Sequence[Document]], provenance: dict, *, greedy: Sequence[str]
) -> Path:
    """Write the splits and their ``provenance.json`` (last, so that a corpus that has one is whole).

    Parameters
    ----------
    splits : documents by split name; no user turn may occur twice, in one split or in two.
    provenance : what to tell about the corpus; this adds schema version, counts and hashes.
    greedy : the splits whose answers are greedy continuations.
    """
    folder = Path(folder)
    check_disjoint(splits)
    facts = {}
    for split, documents in splits.items():
        path = write_atomically(folder / f"{split}.npz", lambda p, documents=documents: write_documents(p, documents))
        facts[split] = {
            "file": path.name,
            "sha256": sha256(path),
            "answers": "greedy" if split in greedy else "sampled",
            "documents": len(documents),
            "tokens": int(sum(len(d.tokens) for d in documents)),
            "answer_tokens": int(sum(d.answer_mask.sum() for d in documents)),
        }
    write_json(folder / "provenance.json", {"schema_version": SCHEMA_VERSION, **provenance, "splits": facts})
    return folder


def check_disjoint(splits: Mapping[str, Sequence[Document]]) -> None:
    """Refuse a corpus in which a prompt, and so a user turn, occurs twice."""
    home: dict[bytes, str] = {}
    for split, documents in splits.items():
        for document in documents:
            key = prompt_key(document)
            if key in home:
                raise StudyError(f"the same user turn is in {home[key]} and in {split}; drop one of the two documents")
            home[key] = split


def check_tokenizer(target, documents: Sequence[Document]) -> None:
    """Refuse documents whose ids mean other text to this target."""
    for origin in {id(document.origin): document.origin for document in documents if document.origin}.values():
        name, theirs = origin["name"], origin.get("tokenizer_hash")
        if theirs is None and name != "tiny":
            print(f"the corpus {name} doesn't say what tokenizer wrote it; read as {target.name}'s", flush=True)
        if theirs not in (None, target.tokenizer_hash):
            raise StudyError(
                f"the corpus {name} was written with the tokenizer of {origin.get('target')}, not with that of "
                f"{target.name} ({theirs[:8]}…, not {target.tokenizer_hash[:8]}…); set corpus to dialogues that "
                f"{target.name} wrote (notebook 00_generate_corpus)"
            )
    ids = np.concatenate([document.tokens for document in documents])
    strange = ids[(ids < 0) | (ids >= target.vocab_size)]
    if len(strange):
        raise StudyError(
            f"the corpus has token id {strange[0]}, target {target.name} only {target.vocab_size}; "
            "use a corpus made with this target"
        )


def prompt_key(document: Document) -> bytes:
    """What tells user turns apart: headers are the same in all documents, so equal prompts are equal user turns."""
    return document.prompt.astype("<i4").tobytes()


def write_documents(path: Path, documents: Sequence[Document]) -> None:
    """Write documents end to end as an ``.npz`` file that `numpy.load` reads; equal documents make equal files.

    ``tokens`` holds all documents end to end, ``lengths`` [documents] the tokens of each, ``answer_mask`` one bit a
    token. The tracked corpora have a ``prefix`` too: the chat header, which all of their documents begin with.
    """
    empty = Document(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))
    tokens = np.concatenate([d.tokens for d in (empty, *documents)])
    arrays = {
        "tokens": tokens.astype(np.min_scalar_type(int(tokens.max(initial=0)))),
        "lengths": np.array([len(d.tokens) for d in documents], dtype=np.int32),
        "answer_mask": np.packbits(np.concatenate([d.answer_mask for d in (empty, *documents)])),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as handle:
                np.lib.format.write_array(handle, array, allow_pickle=False)


def read_documents(path: str | Path) -> list[Document]:
    """Undo `write_documents`; its parts carry checksums, so an altered file is refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            flat, lengths = arrays["tokens"].astype(np.int32), arrays["lengths"]
            mask = np.unpackbits(arrays["answer_mask"], count=len(flat)).astype(bool)
            prefix = arrays["prefix"].astype(np.int32) if "prefix" in arrays else flat[:0]
    except _UNREADABLE as error:
        raise StudyError(f"{path} can't be read ({type(error).__name__}); delete it and make it again") from error
    if lengths.sum() != len(flat):
        raise StudyError(f"{path}: {len(flat)} tokens, but its documents hold {lengths.sum()}; make the corpus anew")
    ends, unmasked = np.cumsum(lengths, dtype=np.int64), np.zeros(len(prefix), dtype=bool)
    return [
        Document(np.concatenate([prefix, flat[a:b]]), np.concatenate([unmasked, mask[a:b]]))
        for a, b in zip(ends - lengths, ends)
    ]


_UNREADABLE = (zipfile.BadZipFile, lzma.LZMAError, ValueError, KeyError, EOFError, OSError, NotImplementedError)


def answer_token_counts(documents: Sequence[Document], vocab_size: int) -> np.ndarray:
    """How often each id occurs in the answers, int [vocab_size]."""
    return np.bincount(np.concatenate([d.answer for d in documents]), minlength=vocab_size)


def repetition_start(answer: np.ndarray, repeat_tokens: int = REPEAT_TOKENS) -> int:
    """Where an answer starts to repeat itself; ``len(answer)`` if nowhere.

    It is the first position whose next ``repeat_tokens`` tokens stand, in this order, earlier in the answer too.
    With ``repeat_tokens=3`` a b c d a b c e is cut at 4. Occurrences may overlap, so that a loop keeps its first
    round: x a b a b a b is cut at 3. Two tokens that come back are left alone: a b c a b d has no repetition.
    """
    seen = set()
    for start in range(len(answer) - repeat_tokens + 1):
        stretch = answer[start : start + repeat_tokens].tobytes()
        if stretch in seen:
            return start
        seen.add(stretch)
    return len(answer)


def cut_repetition(document: Document, repeat_tokens: int = REPEAT_TOKENS) -> Document:
    """End the document where its answer starts to repeat itself (it then has no closing end-of-turn token)."""
    answer = document.answer
    return document.until(len(document.tokens) - len(answer) + repetition_start(answer, repeat_tokens))


def _tiny_documents() -> dict[str, list[Document]]:
    """Small made-up dialogues over ids below 512: 1, user turn, 2, answer, 2.

    Words are ids 3 to 511. Each word has one usual successor (four times in five) and one other, so there is
    something to learn. Usual successors form one cycle through all words, so that documents don't fall into loops.
    """
    rng = np.random.default_rng(0)
    successors = np.zeros((512, 2), dtype=np.int32)
    for column in range(2):
        cycle = 3 + rng.permutation(509)
        successors[cycle, column] = np.roll(cycle, -1)
    documents, seen = [], set()
    while len(documents) < 88:
        words = [int(rng.integers(3, 512))]
        user_tokens, answer_tokens = int(rng.integers(4, 9)), int(rng.integers(16, 48))
        while len(words) < user_tokens + answer_tokens:
            words.append(int(successors[words[-1], int(rng.random() < 0.2)]))
        tokens = np.array([1, *words[:user_tokens], 2, *words[user_tokens:], 2], dtype=np.int32)
        document = Document(tokens, np.arange(len(tokens)) >= user_tokens + 2)
        if prompt_key(document) not in seen:
            seen.add(prompt_key(document))
            documents.append(document)
    return {"train": documents[:64], "validation": documents[64:72], "evaluation": documents[72:]}
