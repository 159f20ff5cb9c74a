"""One user turn decoded every way: measurements as table rows.

On each turn the target alone, through the same code and cache, and every plan take turns, ``repeats`` times
over; the median counts. A `Clock` says where the time of the last pass goes; on a GPU, which it would slow
down, that of one pass more. Batch size 1, greedy.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import pandas as pd
import torch
from transformers import GenerationConfig

from ..drafters.drafter import Drafter
from ..target.load import Target
from ..text.prompts import Prompt, encode_turn
from .clock import PARTS, Clock, timed_parts
from .decode import Decoded, decode
from .propose import ALONE, Chain, Tree

Plan = Chain | Tree


@dataclass(frozen=True)
class Turn:
    """A user turn to be answered, with what went before it: ``tokens`` are the whole dialogue so far."""

    prompt: str
    turn: int
    category: str
    tokens: tuple[int, ...]


def dialogue_turns(target: Target, prompts: Sequence[Prompt], new_tokens: int) -> list[Turn]:
    """Every turn of every prompt; earlier answers are the target's own, of at most ``new_tokens`` each."""
    found = []
    for prompt in prompts:
        history: list = []
        for number, text in enumerate(prompt.turns):
            if number:
                history.append(decode(target, None, found[-1].tokens, max_new_tokens=new_tokens).tokens)
            history.append(text)
            found.append(Turn(prompt.id, number, prompt.category, tuple(encode_turn(target, history).tolist())))
    return found


def plans_of(drafter: Drafter, chains: Sequence[int], tree: Tree | None) -> list[Plan]:
    """The chains and the tree that are measured with a drafter; a block's chains end at its last slot."""
    most = drafter.config.block_size - 1 if drafter.config.paradigm == "block" else max(chains, default=0)
    return [*map(Chain, sorted({min(length, most) for length in chains})), *([tree] if tree else [])]


def take_turns(device: torch.device, ways: dict[Hashable, Callable], repeats: int) -> dict[Hashable, tuple]:
    """Run every way once, then every way again, ``repeats`` times -> what each returned last, and its seconds.

    On a GPU, once more before that: graphs are recorded for every new length of a sequence.
    """
    found, seconds = {}, {way: [] for way in ways}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for work in ways.values() if device.type == "cuda" else ():
        work()
    for _ in range(repeats):
        for way, work in ways.items():
            wait()
            started = time.perf_counter()
            found[way] = work()
            wait()
            seconds[way].append(time.perf_counter() - started)
    return {way: (found[way], seconds[way]) for way in ways}


def turn_rows(
    target: Target, drafter: Drafter, plans: Sequence[Plan], turn: Turn, new: int, repeats: int
) -> pd.DataFrame:
    """Rows of ``decode_prompts``, of ``new`` tokens at most: the target alone (mode ``alone``), then each plan."""
    apart = target.device.type == "cuda"  # a clock waits for a GPU at every part; elsewhere it costs nothing

    def decoded(plan: Plan, clocked: bool) -> tuple[Decoded, Clock | None]:
        with timed_parts(target.device) if clocked else nullcontext() as clock:
            return decode(target, drafter, turn.tokens, plan, max_new_tokens=new), clock

    ways = {plan: partial(decoded, plan, not apart) for plan in (ALONE, *plans)}
    timed = take_turns(target.device, ways, repeats)
    rows, alone = [], timed[ALONE][0][0].tokens
    for plan, ((out, clock), seconds) in timed.items():
        parts = (decoded(plan, True)[1] if apart else clock).seconds
        facts = {"forwards": out.target_forwards, "drafted": sum(out.drafted), "accepted": sum(out.accepted)}
        row = _row(plan.label, turn, out.tokens, alone, seconds)
        rows.append(row | facts | {f"{part}_s": parts[part] for part in PARTS})
    return pd.DataFrame(rows)


def generate_rows(target: Target, lookup_tokens: int, turn: Turn, new: int, repeats: int) -> pd.DataFrame:
    """The same of transformers' own ``generate``, whose drafts and parts can't be seen from outside.

    Alone, and with prompt lookup: its drafts are copied from where the last tokens occurred before.
    """
    given = {ALONE.label: {}, ("prompt_lookup", str(lookup_tokens)): {"prompt_lookup_num_tokens": lookup_tokens}}
    ways = {name: partial(generate, target, turn.tokens, new, **rules) for name, rules in given.items()}
    timed = take_turns(target.device, ways, repeats)
    alone = timed[ALONE.label][0][0]
    return pd.DataFrame(
        _row(name, turn, tokens, alone, seconds) | {"forwards": forwards - 1}
        for name, ((tokens, forwards), seconds) in timed.items()
    )


@torch.inference_mode()
def generate(target: Target, prompt: Sequence[int], max_new_tokens: int, **given) -> tuple[list[int], int]:
    """Greedy answer by ``generate``, and how many forwards of the target it took, that over the prompt included."""
    forwards, ids = [], torch.tensor([list(prompt)], device=target.device)
    ends = {"eos_token_id": list(target.stop_ids), "pad_token_id": target.eos_token_id}
    rules = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **ends, **given)
    counting = target.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        out = target.generate(ids, torch.ones_like(ids), rules)
    finally:
        counting.remove()
    return out[0, len(prompt) :].tolist(), len(forwards)


def _row(name: tuple[str, str], turn: Turn, tokens: list[int], alone: list[int], seconds: list[float]) -> dict:
    equal = [mine == theirs for mine, theirs in zip(tokens, alone)]
    return {
        "mode": name[0], "plan": name[1], "prompt": turn.prompt, "turn": turn.turn, "category": turn.category,
        "prompt_tokens": len(turn.tokens), "new_tokens": len(tokens),
        "same_tokens": (equal + [False]).index(False),
        "seconds": median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds), "repeats": len(seconds),
    }  # fmt: skip
