"""One user turn decoded every way, and one step at several prefixes: the measurements of `speed`, as table rows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd
import torch

from ..drafters.drafter import Drafter
from ..target.load import Target
from ..text.prompts import Prompt, encode_turn
from .decode import decode
from .parts import PARTS, timed_parts
from .peers import Peer, generate
from .propose import Chain, Tree

ALONE = ("alone", "-")  # mode and plan of the target alone, whoever runs it
STEP_CHAIN = 4  # drafts of the chain whose steps are timed at several prefixes


@dataclass(frozen=True)
class Settings:
    """What every number depends on; another setting starts anew.

    new_tokens : at most, of an answer. repeats : timed passes; their median counts.
    """

    new_tokens: int = 64
    repeats: int = 3


@dataclass(frozen=True)
class Turn:
    """A user turn to be answered, with what went before it: ``tokens`` are the whole dialogue so far."""

    prompt: str
    turn: int
    category: str
    tokens: list[int]


def dialogue_turns(target: Target, prompts: Sequence[Prompt], new_tokens: int) -> list[Turn]:
    """Every turn of every prompt; earlier answers are the target's own, of at most ``new_tokens`` each."""
    found = []
    for prompt in prompts:
        history: list = []
        for number, text in enumerate(prompt.turns):
            if number:
                history.append(decode(target, None, found[-1].tokens, max_new_tokens=new_tokens).tokens)
            history.append(text)
            found.append(Turn(prompt.id, number, prompt.category, encode_turn(target, history).tolist()))
    return found


def first_of_each(prompts: Sequence[Prompt], per_category: int) -> list[Prompt]:
    """The first ``per_category`` prompts of each category, in the order of the file."""
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.category] = seen.get(prompt.category, 0) + 1
        if seen[prompt.category] <= per_category:
            kept.append(prompt)
    return kept


def plans_of(drafter: Drafter, chains: Sequence[int], tree: Tree | None) -> dict[tuple[str, str], Chain | Tree]:
    """(mode, plan) as tables name them -> plan; a block's chains end at its last slot."""
    most = drafter.config.block_size - 1 if drafter.config.paradigm == "block" else max(chains)
    found = {("chain", str(length)): Chain(length) for length in sorted({min(length, most) for length in chains})}
    if tree is not None:
        found["tree", f"{tree.depth}/{tree.top_k}/{tree.total}"] = tree
    return found


def elapsed(device: torch.device, work: Callable) -> tuple[object, float]:
    """What ``work()`` returns, and the seconds that it took."""
    waits = device.type == "cuda"
    if waits:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = work()
    if waits:
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - started


def take_turns(
    device: torch.device, ways: dict[tuple, Callable], repeats: int
) -> dict[tuple, tuple[object, list[float]]]:
    """Run every way once, then every way again, ``repeats`` times -> what each returned last, and its seconds."""
    found, seconds = {}, {way: [] for way in ways}
    for _ in range(repeats):
        for way, work in ways.items():
            found[way], took = elapsed(device, work)
            seconds[way].append(took)
    return {way: (found[way], seconds[way]) for way in ways}


def measure_drafter(target: Target, drafter: Drafter, plans: dict, turn: Turn, settings: Settings) -> pd.DataFrame:
    """Rows of one turn: the target alone (mode ``alone``), then each plan."""

    def way(plan, timed=False):
        own = drafter if plan is not None else None
        given = {} if plan is None else {"plan": plan}
        return lambda: decode(target, own, turn.tokens, **given, max_new_tokens=settings.new_tokens, timed=timed)

    plans = {ALONE: None, **plans}
    timed = take_turns(target.device, {name: way(plan) for name, plan in plans.items()}, settings.repeats)
    rows, alone = [], timed[ALONE][0].tokens
    for (mode, plan), (out, seconds) in timed.items():
        with timed_parts(target) as clock:
            way(plans[mode, plan])()
        facts = {"forwards": out.target_forwards, "drafted": sum(out.drafted), "accepted": sum(out.accepted)}
        parts = {f"{part}_s": clock.seconds[part] for part in PARTS}
        rows.append(_row(mode, plan, turn, out.tokens, alone, seconds) | facts | parts)
    return pd.DataFrame(rows)


def measure_peers(target: Target, ways: Sequence[Peer], turn: Turn, settings: Settings) -> pd.DataFrame:
    """Rows of one turn by transformers' `generate`; its drafts and parts can't be seen from outside."""
    calls = {
        (peer.mode, peer.plan): lambda peer=peer: generate(target, turn.tokens, peer, settings.new_tokens)
        for peer in ways
    }
    timed = take_turns(target.device, calls, settings.repeats)
    alone = timed[ALONE][0][0]
    return pd.DataFrame(
        _row(*name, turn, tokens, alone, seconds) | {"forwards": forwards - 1}
        for name, ((tokens, forwards), seconds) in timed.items()
    )


def _row(mode: str, plan: str, turn: Turn, tokens: list[int], alone: list[int], seconds: list[float]) -> dict:
    equal = [mine == theirs for mine, theirs in zip(tokens, alone)]
    return {
        "mode": mode, "plan": plan, "prompt": turn.prompt, "turn": turn.turn, "category": turn.category,
        "prompt_tokens": len(turn.tokens), "new_tokens": len(tokens),
        "same_tokens": (equal + [False]).index(False),
        "seconds": median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds), "repeats": len(seconds),
    }  # fmt: skip


def step_costs(
    target: Target, drafter: Drafter, plans: dict, text: Sequence[int], prefix: int, tokens: int
) -> pd.DataFrame:
    """Milliseconds of one step after ``prefix`` tokens of ``text``, by part: the target alone, the chain of ``STEP_CHAIN``, the tree."""
    length = min(STEP_CHAIN, max(plan.length for plan in plans.values() if isinstance(plan, Chain)))
    chosen = {ALONE: None, ("chain", str(length)): Chain(length)}
    chosen |= {name: plan for name, plan in plans.items() if name[0] == "tree"}
    rows = []
    for (mode, name), plan in chosen.items():
        given = {} if plan is None else {"plan": plan}
        own = drafter if plan is not None else None
        for warming in (True, False):
            with timed_parts(target) as clock:
                out = decode(
                    target, own, text[:prefix], **given, max_new_tokens=3 if warming else tokens, eos_token_ids=(), timed=False
                )  # fmt: skip
        for part in PARTS:
            if part != "prefill":
                milliseconds = 1000 * clock.seconds[part] / out.target_forwards
                rows.append([mode, name, prefix, part, milliseconds, out.target_forwards])
    return pd.DataFrame(rows, columns=["mode", "plan", "prefix_tokens", "part", "milliseconds", "steps"])
