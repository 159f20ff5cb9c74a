"""How a target's chat template writes a dialogue: prompts, what stands around turns, what ends them, a turn's own ids.

Text is tokenised together with what the template puts around it, for many tokenizers join the two: the ids are those
of the tokenizer's own ``apply_chat_template``. Only added tokens are places where no tokenizer joins anything.
"""

import re
from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import StudyError

# What the default target and the tiny ones write where their files bring no template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("USERTURN", "REPLY")
PROBES = ("USERTURN", "7 of 9?", "¿Qué?", '"So" it is.', "(a) x")  # turns that begin and end unlike one another
DATE = "26 Jul 2024"  # what Llama's templates name without a clock; prompts must not change from day to day


def chat_headers(tokenizer: PreTrainedTokenizerFast, thinking: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What stands before a user turn, and between it and the answer (the user's end-of-turn token first); int32 ids.

    For SmolLM2: ``<|im_start|>system…<|im_end|>\\n<|im_start|>user\\n`` and ``<|im_end|>\\n<|im_start|>assistant\\n``.
    Without ``thinking``, Qwen3's template closes an empty thought there. An id that holds part of the turn (``▁Hi``) is
    the turn's.

    Raises
    ------
    StudyError : the tokenizer has no chat template, or one that writes a turn otherwise than once.
    """
    heads, tails = [], []
    for probe in PROBES:
        before, body, after = _pieces(tokenizer, [probe], thinking)
        found = tokenizer(before + body + after, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.array(found["offset_mapping"]).T
        outside = (ends <= len(before)).argmin(), (starts[::-1] >= len(before + body)).argmin()
        heads.append(found["input_ids"][: outside[0]])
        tails.append(found["input_ids"][::-1][: outside[1]])
    written = _pieces(tokenizer, MARKS)[2]
    left_out = written.removeprefix(after)
    if not after or (left_out != written and left_out.strip()):
        raise StudyError(
            f"the chat template of {_name(tokenizer)} leaves out {left_out!r} where an answer is to begin; choose "
            "another target, or mend its add_generation_prompt"
        )
    return np.array(_common(heads), np.int32), np.array(_common(tails)[::-1], np.int32)


def dialogue_ids(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], thinking: bool = False) -> np.ndarray:
    """User turn, answer, user turn, … up to the next answer, int32 [tokens], as ``apply_chat_template`` gives it.

    But a chat marker that is written in a turn stays text.

    Raises
    ------
    StudyError : as `chat_headers`; a template that rewrites turns, or a marker that this tokenizer can't keep as text.
    """
    return _encode(tokenizer, _pieces(tokenizer, turns, thinking))


def next_turn_ids(tokenizer: PreTrainedTokenizerFast, turn: str, thinking: bool = False) -> np.ndarray:
    """What follows on an answer before the next: from its end-of-turn token on, with this user turn; int32 [tokens].

    Raises
    ------
    StudyError : as `dialogue_ids`, or the template ends answers with words, which would join with theirs.
    """
    between, *rest = _pieces(tokenizer, [*MARKS, turn], thinking)[4:]
    if _leading_token(tokenizer, between) is None:
        raise StudyError(
            f"the chat template of {_name(tokenizer)} ends an answer with {between[:20]!r}, which is no token of its "
            "own; give dialogues of one turn"
        )
    return _encode(tokenizer, [between.lstrip(), *rest])


def turn_header(tokenizer: PreTrainedTokenizerFast, thinking: bool = False) -> np.ndarray:
    """What stands between an answer and the next user turn, its end-of-turn token first; int32 ids.

    For SmolLM2: ``<|im_end|>\\n<|im_start|>user\\n``. Raises what `next_turn_ids` raises.
    """
    return np.array(_common([next_turn_ids(tokenizer, probe, thinking) for probe in PROBES]), np.int32)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that the chat template puts behind an answer; None without a template, or if it is no added token."""
    return _leading_token(tokenizer, _pieces(tokenizer, MARKS)[-1]) if tokenizer.chat_template else None


def turn_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Ids of a text by itself, int32; a chat marker written in it is split up like any other word."""
    return _ids(tokenizer, text, split_special_tokens=True)


def _pieces(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], thinking: bool = False) -> list[str]:
    """The dialogue as the template writes it, in pieces: frame, turn, frame, …, turn, frame."""
    marks = [f"TURN{number:03}" for number in range(len(turns))]
    frames, bodies, rest = [], [], _render(tokenizer, marks, thinking)
    for mark in marks:
        if rest.count(mark) != 1:
            raise StudyError(
                f"the chat template of {_name(tokenizer)} writes a turn's text {rest.count(mark)} times, not once in "
                "its place; choose another target, or mend the template"
            )
        frame, _, rest = rest.partition(mark)
        frames.append(frame)
    frames.append(rest)
    rest = _render(tokenizer, turns, thinking)
    for turn, frame, after in zip(turns, frames, frames[1:]):
        rest = rest.removeprefix(frame)
        body = next((text for text in (turn, turn.strip()) if rest.startswith(text + after)), None)
        if body is None:
            raise StudyError(f"the chat template of {_name(tokenizer)} rewrites the turn {turn[:40]!r}; leave it out")
        bodies.append(body)
        rest = rest.removeprefix(body)
    return [*(piece for pair in zip(frames, bodies) for piece in pair), frames[-1]]


def _render(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str], thinking: bool) -> str:
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    if not tokenizer.chat_template:
        raise StudyError(
            f"{_name(tokenizer)} has no chat template to write dialogues with; in text mode a base model writes plain "
            "text (text_prefix_tokens=32), and a corpus folder gives prompts; or put the template that it was trained "
            "with into chat_template.jinja beside it"
        )
    options = {"add_generation_prompt": len(turns) % 2 == 1, "enable_thinking": thinking, "date_string": DATE}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        raise StudyError(
            f"the chat template of {_name(tokenizer)} can't write a dialogue of user and assistant "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}); choose another target, or mend the template"
        ) from error


def _encode(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[str]) -> np.ndarray:
    """Ids of frames and turns, alternating, written in one go; markers in turns stay text."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    marker = next((content for content in special for turn in pieces[1::2] if content in turn), None)
    if marker is None:
        return _ids(tokenizer, "".join(pieces))
    markers = [number for number in special.values() if number != tokenizer.unk_token_id]
    ids = _cut(tokenizer, pieces, special)
    plain = ["Hi" if number % 2 else piece for number, piece in enumerate(pieces)]
    joined = _ids(tokenizer, "".join(plain))  # cut or not must make no difference, and no marker more come out of it
    same = np.array_equal(_cut(tokenizer, plain, special), joined)
    if not same or np.isin(ids, markers).sum() != np.isin(joined, markers).sum():
        raise StudyError(f"{_name(tokenizer)} can't keep the marker {marker!r} as text; take it out of the turn")
    return ids


def _cut(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[str], special: dict[str, int]) -> np.ndarray:
    """Ids of frames and turns, cut at the frames' special tokens only."""
    longest_first = sorted(special, key=len, reverse=True)
    sections = [""]  # text, special token, text, …
    for number, piece in enumerate(pieces):
        first, *others = [piece] if number % 2 else re.split(f"({'|'.join(map(re.escape, longest_first))})", piece)
        sections = [*sections[:-1], sections[-1] + first, *others]
    ids = [[special[text]] if n % 2 else turn_ids(tokenizer, text) for n, text in enumerate(sections)]
    return np.concatenate(ids).astype(np.int32)


def _leading_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int | None:
    """The added token that a text begins with, white space aside."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    found = [content for content in added if text.lstrip().startswith(content)]
    return added[max(found, key=len)] if found else None


def _common(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def _ids(tokenizer: PreTrainedTokenizerFast, text: str, **options) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=np.int32)


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
