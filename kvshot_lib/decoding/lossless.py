"""Whether decoding with trained drafters gives the target's own tokens, token by token: greedy, chain and tree.

The target alone answers every prompt, one token a forward. Each drafter then answers it by a chain and by a
tree, and what differs is counted. A difference is shown with the gap between the two largest logits of the
target where it starts: in float32 all of them are faults, in bfloat16 a forward over several tokens rounds
otherwise than one over a single token, so near ties may tip.

A drafter's answer to a prompt is on disk before the next one starts: the same call goes on from there after
a kill.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from ..errors import StudyError
from ..metrics import tables
from ..provenance import provenance
from ..settings import at_least
from ..text.prompts import load_prompts
from .decode import decode
from .propose import Chain, Tree
from .timing import as_table, load_runs
from .turns import Turn, dialogue_turns

PLANS = {"chain": Chain(7), "tree": Tree(8, 10, 60)}


def verify_lossless(
    results_dir: str, runs: Sequence[str] = (), *, prompts: str = "study", count: int = 105, new_tokens: int = 320,
    device: str = "auto", dtype: str = "float32", threads: int = 0, out: str = "", fingerprint: str = "",
) -> int:  # fmt: skip
    """Decode greedily with trained drafters and compare every token with the target alone: lossless in OUT/tables.

    Answered is the first turn of each of ``count`` prompts. ``out`` is where rows and table go, RESULTS_DIR by default;
    what else is given means what it means in :func:`~timing.measure_speed`.

    Returns
    -------
    The exit status of a command: 1 if a token differs in float32, else 0.

    Raises
    ------
    StudyError : no such run, a target other than the one that a run was trained for, prompts longer than the context.
    """
    at_least(1, new_tokens=new_tokens, count=count)
    trained, folder = load_runs(results_dir, runs, device, dtype, threads), Path(out or results_dir)
    target, firsts = trained.target, [replace(prompt, turns=prompt.turns[:1]) for prompt in load_prompts(prompts)]
    room = target.config.max_position_embeddings - new_tokens
    turns = [turn for turn in dialogue_turns(target, firsts[:count], new_tokens) if len(turn.tokens) <= room]
    if not turns:
        raise StudyError(f"no prompt leaves room for {new_tokens} new tokens; give fewer --new-tokens")
    alone = cache(lambda turn: decode(target, None, turn.tokens, max_new_tokens=new_tokens).tokens)

    def rows(run: str, turn: Turn) -> pd.DataFrame:
        """One drafter's answers by every plan, against the target's own."""
        made = []
        for mode, plan in PLANS.items():
            found = decode(target, trained.drafters[run], turn.tokens, plan, max_new_tokens=new_tokens)
            mismatches, first = differences(alone(turn), found.tokens)
            gap = None if first is None else logit_gap(target, turn.tokens, alone(turn), first)
            row = {"mode": mode, "prompt": turn.prompt, "new_tokens": len(found.tokens)}
            row |= {"accepted": sum(found.accepted), "target_forwards": found.target_forwards}
            made.append(row | {"mismatches": mismatches, "first_mismatch": first, "logit_gap": gap})
        return pd.DataFrame(made).assign(**provenance(target.device))

    found = trained.measured(folder / "lossless", turns, rows, fingerprint, new_tokens)
    table = as_table("lossless", found)
    told = {"new_tokens": "sum", "mismatches": "sum", "logit_gap": "max"}
    print(table.groupby(["variant", "mode", "dtype"], sort=False).agg(told).to_string())
    print(tables.write(folder / "tables", "lossless", table))
    exact = table[table["dtype"] == "float32"]
    print(f"{exact['mismatches'].sum()} mismatches in float32, of {exact['new_tokens'].sum():,} tokens")
    return int(exact["mismatches"].any())


def differences(expected: Sequence[int], found: Sequence[int]) -> tuple[int, int | None]:
    """Tokens that differ, missing and surplus ones too, and the place of the first one.

    >>> differences([5, 6, 7], [5, 6, 7]), differences([5, 6, 7], [5, 8])
    ((0, None), (2, 1))
    """
    places = [i for i in range(max(len(expected), len(found))) if expected[i : i + 1] != found[i : i + 1]]
    return len(places), places[0] if places else None


@torch.inference_mode()
def logit_gap(target, prompt: Sequence[int], answer: Sequence[int], place: int) -> float:
    """Largest logit of the target minus its second, before token ``place`` of the answer."""
    ids = torch.tensor([[*prompt, *answer[:place]]], device=target.device)
    first, second = target.model(input_ids=ids, logits_to_keep=1).logits[0, -1].float().topk(2).values.tolist()
    return first - second
