"""The target's own greedy answers to prompts, a drafter's right guesses along them, and what these are counted by.

Of an answer y_0 y_1 …, guess k of anchor i is compared with y_{i+1+k}. Decoding's first round begins at anchor 0, and
after a accepted drafts the next one at i + a + 1:

    answer     y0 y1 y2 y3 y4 y5 y6       rounds that accept 2, 0 and 1 drafts: y1 y2 y3 | y4 | y5 y6
    anchors    0  1  2  3  4  5           they begin at anchors 0, 3 and 4
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..decoding.decode import decode
from ..decoding.propose import Chain
from ..drafters.drafter import Drafter
from ..metrics.acceptance import bin_low, bin_names, count_document
from ..target.chat import turn_ids
from ..target.load import Target
from ..text.corpus import Document, cut_repetition
from ..text.prompts import Prompt, encode_turn

SHARE, MAT, OUTSIDE, DIFFER = "mean_acceptance", "measured_mat", "outside_vocabulary", "differing_rounds"
BEGUN, SAME, ENDS = "teacher-forced, where rounds begin", "decoded, the same rounds", "decoded, ends of answers too"


def answered(target: Target, prompt: Prompt, most: int) -> pd.DataFrame:
    """A row: the first turn of a prompt as the target sees it and by itself, and its answer, cut where it repeats."""
    turn = prompt.turns[0]
    ids = encode_turn(target, [turn])
    tokens = np.array([*ids, *decode(target, None, ids, max_new_tokens=most).tokens], np.int32)
    answer = cut_repetition(Document(tokens, np.arange(len(tokens)) >= len(ids))).answer
    plain = ids if isinstance(turn, Document) else turn_ids(target.tokenizer, turn)
    return pd.DataFrame([{"category": prompt.category, "prompt": ids, "plain": plain, "answer": answer}])


def accepted_drafts(target: Target, drafter: Drafter, row, draft_length: int) -> pd.DataFrame:
    """What each round of a chain accepts while this answer is decoded again."""
    found = decode(target, drafter, row.prompt.tolist(), Chain(draft_length), max_new_tokens=len(row.answer))
    return pd.DataFrame({"accepted": found.accepted})


def documents_of(answers: pd.DataFrame, prompt: str = "prompt") -> list[Document]:
    """Prompt (or ``plain`` prompt) and answer of every row, as one document each."""
    both = [(row[prompt], row["answer"]) for _, row in answers.iterrows()]
    return [Document(np.concatenate(pair), np.arange(sum(map(len, pair))) >= len(pair[0])) for pair in both]


@dataclass(frozen=True)
class Judged:
    """match_{t,k} of every anchor of every answer, and whether it counts: bool [anchors, K] each."""

    documents: list[tuple[np.ndarray, np.ndarray]]

    def rows(self, name: str, chosen: Iterable[np.ndarray] = ()) -> Iterator[dict]:
        """Rows for `draw_ratios` of all anchors, or of the ``chosen`` of each document (bool [anchors])."""
        chosen = chosen or [np.ones(len(valid), bool) for _, valid in self.documents]
        for document, ((match, valid), kept) in enumerate(zip(self.documents, chosen, strict=True)):
            if kept.any():
                counts, (complete, accepted) = count_document(match[kept], valid[kept])
                yield ratio(name, document, SHARE, None, counts[:, 1].sum(), counts[:, 0].sum())
                yield ratio(name, document, MAT, None, complete + accepted, complete)
                for step, (anchors, matches, reached, chain) in enumerate(counts):
                    yield ratio(name, document, "step_acceptance", step, matches, anchors)
                    yield ratio(name, document, "chain_acceptance", step, chain, reached)

    def by_context(self, answers: pd.DataFrame, trained: int) -> dict[str, list[np.ndarray]]:
        """Anchors by context length in tokens: in bins, and on both sides of the ``trained`` length."""
        starts = answers["prompt"].map(len)
        lengths = [start + np.arange(len(valid)) for start, (_, valid) in zip(starts, self.documents, strict=True)]
        lows = sorted({*bin_low(np.concatenate(lengths))})
        found = {f"context {name}": [bin_low(n) == low for n in lengths] for low, name in zip(lows, bin_names(lows))}
        if max(n.max() for n in lengths) > trained:
            found[f"context up to {trained}"] = [n <= trained for n in lengths]
            found[f"context beyond {trained}"] = [n > trained for n in lengths]
        return found

    def by_category(self, names: Iterable[str]) -> dict[str, list[np.ndarray]]:
        """Anchors by category of prompt, in the order in which these come first."""
        sizes = [len(valid) for _, valid in self.documents]
        return {name: [np.full(size, own == name) for own, size in zip(names, sizes)] for name in dict.fromkeys(names)}

    def decoded(self, rounds: Mapping[int, Iterable[int]]) -> Iterator[dict]:
        """Rows of the drafts that ``rounds`` accepted, by document, and of the same anchors teacher-forced.

        Both only where a whole chain fits into the answer; ends of answers count in `ENDS` alone.
        """
        for document, accepted in rounds.items():
            match, valid = self.documents[document]
            at, run = 0, np.logical_and.accumulate(match & valid, axis=1).sum(1)
            for number in accepted:
                yield ratio(ENDS, document, MAT, None, 1 + number, 1)
                if at < len(valid) and valid[at, -1]:
                    yield ratio(BEGUN, document, MAT, None, 1 + run[at], 1)
                    yield ratio(SAME, document, MAT, None, 1 + number, 1)
                    yield ratio(SAME, document, DIFFER, None, run[at] != number, 1)
                at += number + 1


def outside(answers: pd.DataFrame, drafter: Drafter, name: str) -> Iterator[dict]:
    """Rows of the share of answer tokens that the drafter can't draft."""
    known = (drafter.to_draft >= 0).cpu().numpy()
    for document, answer in enumerate(answers["answer"]):
        yield ratio(name, document, OUTSIDE, None, (~known[answer[1:]]).sum(), len(answer) - 1)


def ratio(name: str, document: int, metric: str, step: int | None, top: float, bottom: float) -> dict:
    """A row for `draw_ratios`."""
    labels = {"variant": name, "seed": 0, "document": document, "metric": metric, "draft_step": step}
    return {**labels, "top": float(top), "bottom": float(bottom)}
