"""How much of the target's true query can be read, by a linear map, from a drafter's state before its attention?

The state is what the query projection reads (after the norm), so no training of that projection could do better
in R² than the best linear map. The label is the target's true query at the same position t+1+k in the reused
layers, all heads, with its RoPE taken off: a linear map of a state that holds no position could not turn it.

    R² = 1 - Σ ‖q - q̂‖² / Σ ‖q - mean‖²        mean: of the documents that the map was fitted on

Ridge regression on one half of the documents (even or odd), scored on the other, and the other way round, so
that every document is scored by a map that has not seen it. The penalty is the best of ``PENALTIES`` on a part
of the fitted half. Channels are standardised. The floor is the same with the labels of the fitted half
shuffled: 0 or a little less.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..drafters.drafter import Drafter
from ..training.anchors import Anchors
from .attention import watch

PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0)
ANCHORS = 64  # of a document, evenly spaced among those valid at every draft step: bounds the memory


def probe_anchors(anchors: Anchors) -> Tensor:
    """[m] which anchors of one document: valid at every draft step, at most ``ANCHORS``, evenly spaced."""
    rows = anchors.valid[0].all(-1).nonzero()[:, 0]
    return rows[torch.linspace(0, max(0, len(rows) - 1), min(ANCHORS, len(rows)), device=rows.device).round().long()]


def probe_data(drafter: Drafter, features, anchors: Anchors, steps: Sequence[int], labels: Tensor) -> dict:
    """(layer, draft step) -> states [m, width] and true queries [m, S, H · D] at the `probe_anchors` of one document.

    labels : [n, S, H · D], from `target_rows.plain_queries`.
    """
    rows = probe_anchors(anchors)
    if not len(rows):
        return {}
    few = Anchors(anchors.index[:, rows], anchors.valid[:, rows], anchors.weight[:, rows])
    calls = watch(drafter, features, few, steps)
    return {(c.key, c.draft_step): (c.inputs.float(), labels[c.places(len(labels))]) for c in calls}


def fit(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, ...]:
    """Ridge regression: means and spreads of x, mean of y, weights; ``penalty`` in units of the mean eigenvalue."""
    mean, spread, centre = x.mean(0), x.std(0).clamp(min=1e-6), y.mean(0)
    z = (x - mean) / spread
    gram = z.T @ z
    gram.diagonal().add_(penalty * gram.trace() / len(gram))
    return mean, spread, centre, torch.linalg.solve(gram, z.T @ (y - centre), left=True)


def squares(x: Tensor, y: Tensor, fitted: tuple[Tensor, ...]) -> Tensor:
    """Squared errors of the fit and of its mean alone, summed over channels: y [m, S, out] -> [m, S, 2]."""
    mean, spread, centre, weights = fitted
    flat = y.flatten(1)
    guess = (x - mean) / spread @ weights + centre
    return torch.stack([(flat - guess).square(), (flat - centre).square()], -1).unflatten(1, y.shape[1:]).sum(2)


def probe(x: Tensor, y: Tensor, document: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Squared errors by a map fitted on the other half: with true labels and shuffled ones, [m, S, 2] each.

    x [m, width], y [m, S, out], document [m] which document each row is of.
    """
    found, flat = [torch.zeros(*y.shape[:2], 2) for _ in range(2)], y.flatten(1)
    for half in (0, 1):
        fitted, scored = document % 2 == half, document % 2 != half
        if not fitted.any() or not scored.any():
            continue
        penalty = best_penalty(x[fitted], y[fitted], document[fitted] // 2)
        order = torch.randperm(int(fitted.sum()), generator=torch.Generator().manual_seed(seed + half))
        for place, labels in enumerate((flat[fitted], flat[fitted][order.to(x.device)])):
            found[place][scored.cpu()] = squares(x[scored], y[scored], fit(x[fitted], labels, penalty)).cpu()
    return found[0], found[1]


def best_penalty(x: Tensor, y: Tensor, document: Tensor) -> float:
    """The penalty whose fit on three of every four documents has the smallest squared error on the fourth."""
    kept = document % 4 != 3
    if not kept.any() or kept.all():
        return 1e-1
    error = lambda penalty: float(squares(x[~kept], y[~kept], fit(x[kept], y[kept].flatten(1), penalty))[..., 0].sum())
    return min(PENALTIES, key=error)


def probe_rows(data: list[tuple[int, dict]], layers: Sequence[int], seed: int = 0) -> list[dict]:
    """Rows of ``query_probe`` (without variant and seed) from (document, `probe_data`) of every document."""
    rows = []
    for layer, step in sorted({key for _, found in data for key in found}):
        own = [(document, *found[layer, step]) for document, found in data if found]
        document = torch.cat([torch.full((len(x),), number) for number, x, _ in own])
        x, y = (torch.cat(parts) for parts in list(zip(*own, strict=True))[1:])
        for labels, errors in zip(("true", "shuffled"), probe(x, y, document.to(x.device), seed), strict=True):
            for number in document.unique().tolist():
                sums = errors[document == number].sum(0).tolist()
                for target_layer, (residual, total) in zip(layers, sums, strict=True):
                    names = {"document": number, "layer": layer, "target_layer": target_layer, "draft_step": step}
                    rows.append({"labels": labels, **names, "residual": residual, "total": total})
    return rows
