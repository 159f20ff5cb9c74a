"""Acceptance under teacher forcing: which drafts equal the target's argmax, document by document."""

import numpy as np
import torch
from torch import Tensor

from ..drafters.drafter import Drafter
from ..features.spec import Features
from .anchors import Anchors, find_anchors
from .ttt import draft_steps


@torch.no_grad()
def predict(drafter: Drafter, features: Features, anchors: Anchors, ttt_steps: int) -> Tensor:
    """Greedy drafts under teacher forcing: argmax q_{t,k} as target token ids, [B, M, K] (rubbish where not valid)."""
    predictions = torch.zeros(anchors.valid.shape, dtype=torch.int64, device=anchors.index.device)
    for k, _, output in draft_steps(drafter, features, anchors, ttt_steps):
        document, row = anchors.valid[..., k].nonzero(as_tuple=True)
        for part in torch.arange(len(row), device=row.device).split(2048):
            hidden = drafter.norm(output[document[part], row[part]])
            best = drafter.logits(hidden).argmax(-1)
            predictions[document[part], row[part], k] = drafter.draft_ids[best]
    return predictions


def judge(predictions: Tensor, features: Features, anchors: Anchors) -> Tensor:
    """match_{t,k}: does the token drafted at anchor t, step k equal argmax p_{t+1+k}?

    ``predictions`` [B, M, K] token ids -> [B, M, K] bool, False where not valid. The target's argmax is over its whole
    vocabulary, so one that the drafter can't draft counts as a rejection.
    """
    steps = torch.arange(predictions.shape[2], device=predictions.device)
    places = (anchors.index[..., None] + 1 + steps).clamp(max=features.tokens.shape[1] - 1)
    wanted = features.target_argmax.gather(1, places.flatten(1)).view(places.shape)
    return (predictions == wanted) & anchors.valid


@torch.no_grad()
def match_documents(
    source, drafter: Drafter, ttt_steps: int, *, batch_documents: int = 0,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Match and validity of every anchor of every document.

    Parameters
    ----------
    source : `StoredFeatures` or `LiveFeatures`.
    batch_documents : 8 at a time, or 64 on a GPU; it changes nothing but the speed.
    dtype : bfloat16 computes under autocast.

    Returns
    -------
    Per document ``match`` and ``valid``, bool [anchors, K].
    """
    kind, state = torch.device(device).type, ("target_argmax", *drafter.reads)
    batch_documents = batch_documents or (8 if kind == "cpu" else 64)
    order, found = sorted(range(len(source)), key=lambda i: source.lengths[i]), {}
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        for start in range(0, len(order), batch_documents):
            indices = order[start : start + batch_documents]
            features = source.batch(indices, state).to(device, dtype)
            anchors = find_anchors(features.answer_mask, ttt_steps)
            match = judge(predict(drafter, features, anchors, ttt_steps), features, anchors).cpu().numpy()
            valid = anchors.valid.cpu().numpy()
            for row, index in enumerate(indices):
                used = valid[row, :, 0]
                found[index] = match[row, used], valid[row, used]
    return [found[index] for index in range(len(source))]


def anchor_places(source, document: int) -> np.ndarray:
    """Where the anchors of a document lie, in the order in which `match_documents` gives them.

    An anchor t has a generated offset, the answer tokens of its span at positions ≤ t, and a context length, t + 1:

        position           0 1 2 3 4 5 6
        answer mask        0 0 0 1 1 1 1
        anchor                 t t t        (two answer tokens or more must follow)
        generated offset       0 1 2        (0: on the last token before the answer)
        context length         3 4 5

    Returns
    -------
    int64 [anchors, 2], the columns of ``metrics.AXES``.
    """
    answer_mask = source.batch([document], ()).answer_mask.cpu()
    anchors = find_anchors(answer_mask, 1)
    places = anchors.index[anchors.valid[..., 0]]
    position = torch.arange(answer_mask.shape[1])
    last_outside = torch.where(answer_mask[0], -1, position).cummax(0).values  # at or before t, outside an answer
    return torch.stack([places - last_outside[places], places + 1], dim=1).numpy()


def outside_vocabulary(source, drafter: Drafter) -> float:
    """Share of drafted positions whose target argmax is outside the draft vocabulary: no drafter can be right there."""
    known, outside, total = drafter.to_draft.cpu() >= 0, 0, 0
    for index in range(len(source)):
        features = source.batch([index], ("target_argmax",)).to("cpu")
        anchors = find_anchors(features.answer_mask, 1)
        wanted = features.target_argmax[0, anchors.index[anchors.valid[..., 0]] + 1]
        outside, total = outside + int((~known[wanted]).sum()), total + len(wanted)
    return outside / max(1, total)
