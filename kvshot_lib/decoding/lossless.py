"""Whether decoding with trained drafters gives the target's own tokens, token by token: greedy, chain and tree.

The target alone answers every prompt, one token a forward. Each drafter then answers it by a chain and by a
tree, and what differs is counted. A difference is shown with the gap between the two largest logits of the
target where it starts: in float32 all of them are faults, in bfloat16 a forward over several tokens rounds
otherwise than one over a single token, so near ties may tip.

A drafter's answer to a prompt is on disk before the next one starts: the same call goes on from there after
a kill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..errors import StudyError
from ..metrics import tables
from ..parts import Parts
from ..provenance import provenance
from ..text.prompts import encode_turn, load_prompts
from .decode import decode
from .propose import CHAIN, Chain, Tree
from .timing import Trained, load_runs, with_kept

PLANS = {"chain": Chain(7), "tree": Tree(8, 10, 60)}


@dataclass(frozen=True)
class Comparison:
    """What is compared: drafters and their target, prompts as (id, tokens), the longest answer, and where rows lie."""

    trained: Trained
    prompts: list[tuple[str, list[int]]]
    new_tokens: int
    parts: Parts

    def rows(self, number: int) -> pd.DataFrame:
        """Rows of ``lossless``: every drafter's answers to one prompt."""
        alone = self.parts.table(f"alone.prompt{number}", lambda: pd.DataFrame({"token": self.answer(number).tokens}))
        expected, found = alone["token"].tolist(), []
        for run in self.trained.drafters:
            make = lambda: self.compare(run, number, expected)  # noqa: B023 - called at once
            found.append(self.parts.table(self.trained.part(run, f"prompt{number}"), make))
        return pd.concat(found)

    def compare(self, run: str, number: int, expected: list[int]) -> pd.DataFrame:
        """One drafter's answers by every plan, against the target's own."""
        name, prompt = self.prompts[number]
        made = []
        for mode, plan in PLANS.items():
            found = self.answer(number, self.trained.drafters[run], plan)
            mismatches, first = differences(expected, found.tokens)
            gap = None if first is None else logit_gap(self.trained.target, prompt, expected, first)
            row = {"mode": mode, "prompt": name, "new_tokens": len(found.tokens), "accepted": sum(found.accepted)}
            row |= {"target_forwards": found.target_forwards, "mismatches": mismatches, "first_mismatch": first}
            made.append(row | {"logit_gap": gap})
        where = provenance(self.trained.target.device)
        return self.trained.labelled(run, pd.DataFrame(made)).assign(**where)

    def answer(self, number: int, drafter=None, plan=CHAIN):
        """What a drafter and its target, or the target alone, answer to a prompt."""
        _, prompt = self.prompts[number]
        return decode(self.trained.target, drafter, prompt, plan, max_new_tokens=self.new_tokens)


def verify_lossless(
    results_dir: str, runs: Sequence[str] = (), *, prompts: str = "study", count: int = 105, new_tokens: int = 320,
    device: str = "auto", dtype: str = "float32", threads: int = 0, keep: str = "", out: str = "",
    fingerprint: str = "",
) -> int:  # fmt: skip
    """Decode greedily with trained drafters and compare every token with the target alone: lossless in OUT/tables.

    Parameters
    ----------
    runs : VARIANT/seedN; all trained ones by default, or the drafters of a folder of checkpoints.
    prompts : study, human-eval or a .jsonl file; the first turn of each is answered.
    count : the first so many of them.
    new_tokens : at most, of an answer.
    dtype : of target and drafters: float32 or bfloat16.
    threads : of the CPU (PyTorch's own choice by default).
    keep : folder of tables recorded before; rows of theirs that are not measured here are taken over.
    out : where rows and table go (RESULTS_DIR by default).

    Returns
    -------
    The exit status of a command: 1 if a token differs in float32, else 0.

    Raises
    ------
    StudyError : no such run, a target other than the one that a run was trained for, prompts longer than the context.
    """
    trained, folder = load_runs(results_dir, runs, device, dtype, threads), Path(out or results_dir)
    texts = [(prompt.id, encode_turn(trained.target, [prompt.turns[0]])) for prompt in load_prompts(prompts)[:count]]
    room = trained.target.config.max_position_embeddings - new_tokens
    fitting = [(name, tokens.tolist()) for name, tokens in texts if len(tokens) <= room]
    if not fitting:
        raise StudyError(f"no prompt leaves room for {new_tokens} new tokens; give fewer --new-tokens")
    parts = trained.parts(folder / "lossless", fingerprint, new_tokens, fitting)
    comparison = Comparison(trained, fitting, new_tokens, parts)
    rows = [comparison.rows(number) for number in tqdm(range(len(fitting)), unit="prompt", mininterval=2)]
    table = with_kept("lossless", pd.concat(rows, ignore_index=True), keep)
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
