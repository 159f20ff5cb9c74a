"""Let the target write dialogues: first the user's turn, sampled after the bare chat header, then its own answer.

In *text mode*, for base models, a document is plain text: its first tokens are sampled after the start token and
stand for the prompt, all that follow for the answer. Nothing else in the study knows of the difference.

Every batch has a seed of its own and is kept as a part file, so a killed run that is started again goes on where it
was and makes the same documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..errors import StudyError
from ..files import read_json, write_atomically, write_json
from ..provenance import provenance
from ..settings import check_settings, check_value
from ..target.chat import chat_headers, dialogue_ids
from ..target.load import Target, load_target
from ..target.static import STATIC
from ..target.wheels import DEFAULT_TARGET
from .corpus import MIN_ANSWER_TOKENS, SPLITS, Document, prompt_key, read_documents, save_corpus, write_documents
from .multi_turn import write_dialogues
from .rows import rows_at_once, write_rows
from .user_turns import by_split, turns_hash

MAX_EMPTY_BATCHES = 20


@dataclass(frozen=True)
class GeneratorSettings:
    """What decides which documents a target writes (on one kind of machine: sampling follows its arithmetic).

    max_length_tokens : longest dialogue, header included; a longer answer is cut and has no end-of-turn token.
    max_user_tokens : a user turn that has not ended by then is dropped.
    temperature, top_p : of all sampling; no other sampling rule is applied.
    thinking : whether a target that can think aloud before it answers (Qwen3) may; most templates don't know of it.
    text_prefix_tokens : above 0, text mode with prompts of so many tokens (and the start token); 0 for dialogues.
    max_answer_tokens : above 0, dialogues of many turns, up to ``max_length_tokens`` (`multi_turn`); all sampled.
    """

    max_length_tokens: int = 512
    max_user_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 0.95
    batch_size: int = 32
    seed: int = 0
    thinking: bool = False
    text_prefix_tokens: int = 0
    max_answer_tokens: int = 0

    def __post_init__(self):
        check_settings(self)
        for name in ("seed", "text_prefix_tokens", "max_answer_tokens"):
            if getattr(self, name) < 0:
                raise StudyError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.text_prefix_tokens and self.max_answer_tokens:
            raise StudyError("text_prefix_tokens and max_answer_tokens exclude each other; a text has no turns")
        if self.thinking and self.max_answer_tokens:
            raise StudyError("thinking and max_answer_tokens exclude each other; only single answers think first")
        if min(self.batch_size, self.max_user_tokens, self.temperature, self.top_p) <= 0 or self.top_p > 1:
            raise StudyError("batch_size, max_user_tokens, temperature and top_p must be above 0, and top_p at most 1")


def generate(
    out: str, *, target: str = DEFAULT_TARGET, device: str = "auto", dtype: str = "auto", user_turns: str = "",
    train: int = 0, validation: int = 0, evaluation: int = 0, **settings,
) -> Path:  # fmt: skip
    """Let the target write dialogues, or texts; a killed run goes on where it was.

    Parameters
    ----------
    out : corpus folder to make or to go on with
    target : a name of the study, a hub id or a model folder
    user_turns : dialogues whose user turns are answered (default: self-generated)
    train, validation, evaluation : documents to write
    settings : of `GeneratorSettings`
    """
    counts = {"train": train, "validation": validation, "evaluation": evaluation}
    writer = load_target(target, device=device, dtype=dtype)
    return generate_corpus(writer, out, counts, GeneratorSettings(**settings), user_turns=user_turns)


def generate_corpus(
    target: Target, folder: str | Path, counts: Mapping[str, int], settings: GeneratorSettings = GeneratorSettings(),
    *, user_turns: str = "",
) -> Path:  # fmt: skip
    """Write ``counts[split]`` documents for each split into ``folder``; evaluation answers are greedy.

    The target samples the user turns too, unless ``user_turns`` names a source of them (`user_turns`); then they
    are taken in order. No user turn is taken twice. Part files stay in ``folder/parts``: after a kill only the
    batch in hand is lost, and a later call with larger counts adds to what is there.

    Raises
    ------
    StudyError : unknown split; ``folder`` was begun with other settings; the target never ends its turns.
    """
    if unknown := set(counts) - set(SPLITS):
        raise StudyError(f"unknown split {min(unknown)!r}; choose from {', '.join(SPLITS)}")
    if wrong := [count for split, count in counts.items() if check_value(split, count, int) < 0]:
        raise StudyError(f"{wrong[0]} documents can't be written; ask for 0 or more")
    folder = Path(folder)
    facts = {"target": target.name, "target_hash": target.hash, "tokenizer_hash": target.tokenizer_hash}
    facts |= {"vocab_size": target.vocab_size, "dtype": str(target.dtype).removeprefix("torch."), **asdict(settings)}
    turns = by_split(user_turns) if user_turns else {}
    if turns and (settings.text_prefix_tokens or settings.max_answer_tokens):
        raise StudyError("only dialogues of one turn take user_turns; leave them out, or the other mode")
    if turns:
        facts |= {
            "user_turns": user_turns,
            "user_turns_sha256": turns_hash(turn for split in SPLITS for turn in turns[split]),
        }
    if (known := folder / "provenance.json").exists() and not (folder / "parts").exists():
        raise StudyError(f"{folder} is a finished corpus without the parts that it grew from; choose another folder")
    _refuse_to_mix(folder / "parts" / "settings.json", facts)
    if known.exists():  # a split that is there stays
        found = read_json(known, f"delete {folder} and generate again")["splits"]
        counts = {split: max(counts.get(split, 0), found.get(split, {}).get("documents", 0)) for split in SPLITS}
    splits, seen = dict.fromkeys(split for split in SPLITS if counts.get(split)), set()
    for split in reversed(splits):  # what training text grows by leaves the others as they are
        splits[split] = _collect(target, folder / "parts", split, counts[split], settings, seen, turns.get(split))
    origin = {"name": folder.name, "origin": "kvshot_lib.text.generate", **facts, **provenance(target.device)}
    return save_corpus(folder, splits, origin, greedy=[] if settings.max_answer_tokens else ["evaluation"])


def generate_batch(
    target: Target, split: str, number: int, settings: GeneratorSettings, turns: Sequence[str] | None = None
) -> list[Document]:
    """The documents of one batch: fewer than ``batch_size`` where a user turn did not end or a chat marker strayed in.

    ``turns`` are the split's user turns, if they are given; batch ``number`` takes its ``batch_size`` of them.
    """
    seed = np.random.SeedSequence([settings.seed, SPLITS.index(split), number]).generate_state(1)[0]
    with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        if settings.max_answer_tokens:
            how = {"temperature": settings.temperature, "top_p": settings.top_p}
            _headers(target, settings)
            most = settings.max_user_tokens, settings.max_answer_tokens
            return write_dialogues(target, settings.batch_size, settings.max_length_tokens, most, **how)
        if turns is None:
            prompts = write_prompts(target, settings)
        else:
            first = number * settings.batch_size
            prompts = given_prompts(target, turns[first : first + settings.batch_size], settings)
        return write_answers(target, prompts, settings, greedy=split == "evaluation")


def write_prompts(target: Target, settings: GeneratorSettings) -> list[np.ndarray]:
    """Sample ``batch_size`` user turns and give them with both headers around, int32 [prompt tokens] each.

    In text mode a prompt is the start token and what was sampled after it, if that didn't end.
    """
    if settings.text_prefix_tokens:
        start = np.array([target.start_id], dtype=np.int32)
        _check_room(1 + settings.text_prefix_tokens, settings)
        texts = _continue(target, [start] * settings.batch_size, settings, settings.text_prefix_tokens, greedy=False)
        return [np.concatenate([start, text]) for text in texts if int(text[-1]) not in target.special_ids]
    user_header, assistant_header = _headers(target, settings)
    headers = [user_header] * settings.batch_size
    turns = _continue(target, headers, settings, settings.max_user_tokens, greedy=False)
    ends = {*target.stop_ids, int(assistant_header[0])}  # the assistant header brings its own end-of-turn token
    return [
        np.concatenate([user_header, turn[:-1], assistant_header])
        for turn in turns
        if len(turn) > 1 and int(turn[-1]) in ends
    ]


def given_prompts(target: Target, turns: Sequence[str], settings: GeneratorSettings) -> list[np.ndarray]:
    """User turns with both headers around; those longer than ``max_user_tokens`` are dropped."""
    most = sum(map(len, _headers(target, settings))) + settings.max_user_tokens
    prompts = [dialogue_ids(target.tokenizer, [turn], settings.thinking) for turn in turns if turn]
    return [prompt for prompt in prompts if len(prompt) <= most]


def write_answers(
    target: Target, prompts: Sequence[np.ndarray], settings: GeneratorSettings, *, greedy: bool
) -> list[Document]:
    """Answer the prompts (int32 [prompt tokens] each) as one batch, without answers in which a chat marker strayed."""
    if not prompts:
        return []
    room = settings.max_length_tokens - min(map(len, prompts))
    answers = _continue(target, prompts, settings, room, greedy=greedy)
    markers = target.special_ids - {*target.stop_ids}
    documents = []
    for prompt, answer in zip(prompts, answers):
        if int(answer[-1]) not in markers:
            tokens = np.concatenate([prompt, answer])[: settings.max_length_tokens]
            documents.append(Document(tokens, np.arange(len(tokens)) >= len(prompt)))
    return documents


def _headers(target: Target, settings: GeneratorSettings) -> tuple[np.ndarray, np.ndarray]:
    """`chat_headers`, if the longest prompt leaves room for an answer."""
    headers = chat_headers(target.tokenizer, settings.thinking)
    _check_room(sum(map(len, headers)) + settings.max_user_tokens, settings)
    return headers


def _check_room(longest: int, settings: GeneratorSettings) -> None:
    if longest + MIN_ANSWER_TOKENS > settings.max_length_tokens:
        raise StudyError(f"max_length_tokens={settings.max_length_tokens}; a prompt alone may take {longest}; raise it")


@torch.inference_mode()
def _continue(target, prompts, settings, max_new_tokens, *, greedy) -> list[np.ndarray]:
    """Continue each prompt up to and including its first special token, int32 [new tokens] each.

    Prompts are padded on the left and the padding is masked, so that all continuations start in the same column. On a
    GPU they are written in rows of fixed shapes instead (`rows`).
    """
    if target.device.type in STATIC:
        most, drawn = settings.max_length_tokens, {"temperature": settings.temperature, "top_p": settings.top_p}
        given = {"rows": rows_at_once(target, most, settings.batch_size)} | ({} if greedy else drawn)
        texts = write_rows(target, prompts, sorted(target.special_ids), most, max_new_tokens, **given)
        shown = {"desc": "batch in hand", "unit": "text", "delay": 5, "leave": False, "position": 0}
        return [text for _, text in sorted(tqdm(texts, total=len(prompts), **shown), key=lambda pair: pair[0])]
    width, stops, filler = max(map(len, prompts)), sorted(target.special_ids), target.eos_token_id
    padded = np.full((len(prompts), width), filler)  # [B, width]
    for row, prompt in zip(padded, prompts):
        row[width - len(prompt) :] = prompt
    real = np.arange(width) >= width - np.array([[len(prompt)] for prompt in prompts])
    sampling = {} if greedy else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": stops, "pad_token_id": filler}
    rules = GenerationConfig(do_sample=not greedy, **ends, **sampling)
    ids, mask = torch.from_numpy(padded).to(target.device), torch.from_numpy(real).long().to(target.device)
    with tqdm(total=max_new_tokens, desc="batch in hand", unit="token", delay=5, leave=False, position=0) as bar:
        ticker = SimpleNamespace(put=lambda _: bar.update(), end=lambda: None)
        output = target.generate(ids, mask, rules, streamer=ticker)
    new = output[:, width:].cpu().numpy().astype(np.int32)  # [B, new tokens]; after a row's end there is padding
    stopped = np.isin(new, stops)
    lengths = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, new.shape[1])
    return [row[:length] for row, length in zip(new, lengths)]


def _collect(
    target, parts: Path, split: str, count: int, settings, seen: set[bytes], turns: Sequence[str] | None
) -> list[Document]:
    """Read or make batches until ``count`` documents with new user turns are there; adds their keys to ``seen``."""
    documents, number, empty = [], 0, 0
    with tqdm(total=count, desc=split, unit="document") as bar:
        while len(documents) < count:
            if turns is not None and number * settings.batch_size >= len(turns):
                raise StudyError(
                    f"the {len(turns):,} user turns of the {split} split gave {len(documents):,} dialogues, "
                    f"not {count:,}; ask for fewer, raise max_user_tokens, or add a source"
                )
            part = parts / f"{split}-{number:05d}.npz"
            if not part.exists():
                batch = generate_batch(target, split, number, settings, turns)
                write_atomically(part, lambda path, batch=batch: write_documents(path, batch))
            fresh = {key: d for d in read_documents(part) if (key := prompt_key(d)) not in seen}
            taken = dict(list(fresh.items())[: count - len(documents)])
            seen.update(taken)
            documents += taken.values()
            bar.update(len(taken))
            number, empty = number + 1, 0 if taken else empty + 1
            if empty == MAX_EMPTY_BATCHES:
                raise StudyError(
                    f"{empty} batches in a row gave no document; raise max_user_tokens, use a chat model, or text mode"
                )
    return documents


def _refuse_to_mix(path: Path, facts: dict) -> None:
    """Remember in ``path`` what the parts beside it are made with; they are hours of work, so others are refused."""
    if not path.exists():
        write_json(path, facts)
    before = {"text_prefix_tokens": 0, "max_answer_tokens": 0} | read_json(
        path, f"delete {path.parent} and generate again"
    )
    for name in before | facts:
        if before.get(name) != facts.get(name):
            raise StudyError(
                f"{path.parent} was begun with {name}={before.get(name)!r}, not {facts.get(name)!r}; "
                "choose another folder"
            )
