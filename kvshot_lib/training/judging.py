"""Acceptance under teacher forcing: which drafts equal the target's argmax, document by document."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..drafters.drafter import Drafter
from ..features.spec import Features
from .ttt import Anchors, find_anchors, predict

Predictor = Callable[[Features, Anchors, int], Tensor]
"""(features, anchors, K) -> drafted token ids [B, M, K]"""


def judge(predictions: Tensor, features: Features, anchors: Anchors) -> Tensor:
    """match_{t,k}: does the token drafted at anchor t, step k equal argmax p_{t+1+k}?

    ``predictions`` [B, M, K] token ids -> [B, M, K] bool, False where not valid. The target's argmax is over its whole vocabulary,
    so one that the drafter can't draft counts as a rejection.
    """
    steps = torch.arange(predictions.shape[2], device=predictions.device)
    places = (anchors.index[..., None] + 1 + steps).clamp(max=features.tokens.shape[1] - 1)
    wanted = features.target_argmax.gather(1, places.flatten(1)).view(places.shape)
    return (predictions == wanted) & anchors.valid


@torch.no_grad()
def match_documents(
    source, predictor: Drafter | Predictor, ttt_steps: int, *, documents: Sequence[int] | None = None,
    batch_documents: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Match and validity of every anchor of every document.

    Parameters
    ----------
    source : `StoredFeatures` or `LiveFeatures`.
    predictor : a drafter, or any function that drafts tokens.
    documents : which ones; all by default. batch_documents : 8 at a time, or 64 on a GPU; it changes nothing but the speed.

    Returns
    -------
    Per document ``match`` and ``valid``, bool [anchors, K], in the order of ``documents``.
    """
    state = ("target_argmax",)
    if isinstance(predictor, Drafter):
        state, predictor = (*state, *predictor.reads), partial(predict, predictor)
    else:
        state = (*state, "final_hidden")
    batch_documents = batch_documents or (8 if torch.device(device).type == "cpu" else 64)
    wanted = range(len(source)) if documents is None else documents
    order, found = sorted(wanted, key=lambda i: source.lengths[i]), {}
    for start in range(0, len(order), batch_documents):
        indices = order[start : start + batch_documents]
        features = source.batch(indices, state).to(device, dtype)
        anchors = find_anchors(features.answer_mask, ttt_steps)
        match = judge(predictor(features, anchors, ttt_steps), features, anchors).cpu().numpy()
        valid = anchors.valid.cpu().numpy()
        found |= {index: (match[row], valid[row]) for row, index in enumerate(indices)}
    kept = {index: valid[:, 0] for index, (_, valid) in found.items()}
    return [tuple(part[kept[index]] for part in found[index]) for index in wanted]


def anchor_places(source, documents: Sequence[int] | None = None) -> list[np.ndarray]:
    """Where the anchors of each document lie, in the order in which `match_documents` gives them.

    An anchor t has a generated offset, the answer tokens of its span at positions ≤ t, and a context length, t + 1:

        position           0 1 2 3 4 5 6
        answer mask        0 0 0 1 1 1 1
        anchor                 t t t        (two answer tokens or more must follow)
        generated offset       0 1 2        (0: on the last token before the answer)
        context length         3 4 5

    Returns
    -------
    Per document int64 [anchors, 2], the columns of ``metrics.AXES``.
    """
    found = []
    for index in range(len(source)) if documents is None else documents:
        answer_mask = source.batch([index], ("target_argmax",)).answer_mask.cpu()
        anchors = find_anchors(answer_mask, 1)
        places = anchors.index[anchors.valid[..., 0]]
        position = torch.arange(answer_mask.shape[1])
        last_outside = (
            torch.where(answer_mask[0], -1, position).cummax(0).values
        )  # the last token at or before t outside an answer
        found.append(torch.stack([places - last_outside[places], places + 1], dim=1).numpy())
    return found


def outside_vocabulary(source, drafter: Drafter, documents: Sequence[int] | None = None) -> float:
    """Share of drafted positions whose target argmax is outside the draft vocabulary: no drafter can be right there."""
    known, outside, total = drafter.to_draft.cpu() >= 0, 0, 0
    for index in range(len(source)) if documents is None else documents:
        features = source.batch([index], ("target_argmax",)).to("cpu")
        anchors = find_anchors(features.answer_mask, 1)
        wanted = features.target_argmax[0, anchors.index[anchors.valid[..., 0]] + 1]
        outside, total = outside + int((~known[wanted]).sum()), total + len(wanted)
    return outside / max(1, total)


def greedy_agreement(source, documents: Sequence[int] | None = None) -> float:
    """Share of answer tokens x_{t+1} that equal argmax p_t: 1 for greedy answers, up to near-ties that round differently."""
    equal, total = 0, 0
    for index in range(len(source)) if documents is None else documents:
        features = source.batch([index], ("target_argmax",)).to("cpu")
        answers = features.answer_mask[0, 1:]
        same = features.target_argmax[0, :-1] == features.tokens[0, 1:]
        equal, total = equal + int(same[answers].sum()), total + int(answers.sum())
    return equal / max(1, total)
