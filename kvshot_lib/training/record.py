"""What a training records of itself: norm, gradient and Adam step of every matrix, and the hybrid's gate.

Ten to forty records a training read what the optimiser step makes anyway, and change no number. Rows of gradients.csv:

    quantity        of what                                             draft_step  document
    grad_norm       a matrix's gradient in this step, before clipping
    grad_norm       matrix ``output``: ∂L/∂s, ∂L/∂c of both branches    k
    weight_norm     a matrix after this step
    adam_step_norm  lr · m̂ / (√v̂ + ε) of this step: what Adam moved it, weight decay aside
    numel           its parameters
    gate_mean       sigmoid of the gate, mean over anchors, channels    k           validation document
    gate_spread     its standard deviation over the same                k           validation document

All norms are Frobenius norms; a gradient is as the optimiser gets it, so ``kv_grad_scale`` is in it. ``branch`` is
``self`` or ``cross`` for an attention's matrices, ``layer`` for what both share, ``drafter`` (and no layer) for what
stands around them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from .. import parallel
from ..drafters.drafter import Drafter
from ..drafters.hooks import watching
from .anchors import Anchors, find_anchors
from .ttt import draft_steps

STEPS_A_RECORD = 40  # or more, for a record costs about a third of a step: less than a hundredth of the training in all
GATE_DOCUMENTS, GATE_ANCHORS, GATE_STRIDE = 8, 4, 8  # a fixed batch that costs a fraction of an optimiser step
COLUMNS = ["layer", "branch", "matrix", "draft_step", "document", "quantity", "value"]


class Recorder:
    """Records a training of ``total`` optimiser steps; ``rows`` is the list that it adds to."""

    def __init__(self, drafter: Drafter, optimiser: torch.optim.Optimizer, total: int, rows: list[dict]):
        self.drafter, self.optimiser, self.total, self.rows = drafter, optimiser, total, rows

    @contextmanager
    def step(self, step: int, trained_tokens: int) -> Iterator[None]:
        """Around forward and backward of optimiser step ``step`` (from 1); the optimiser's own completes the record."""
        if not recorded(step, self.total):
            yield
            return
        with branch_gradients(self.drafter) as branches:
            yield
        gradients = gradient_norms(self.drafter)
        whole = parallel.norms([row["value"] for row in branches])

        def complete(*_) -> None:
            handle.remove()
            rows = matrix_rows(self.drafter, self.optimiser, gradients)
            rows += [row | {"value": value} for row, value in zip(branches, whole, strict=True)]
            self._keep(step, trained_tokens, rows)

        handle = self.optimiser.register_step_post_hook(complete)

    def gate(self, step: int, trained_tokens: int, validation, ttt_steps: int, dtype: torch.dtype) -> None:
        """Add the gate after optimiser step ``step``, on a few validation documents."""
        if recorded(step, self.total):
            self._keep(step, trained_tokens, gate_rows(self.drafter, validation, ttt_steps, dtype))

    def _keep(self, step: int, trained_tokens: int, rows: list[dict]) -> None:
        self.rows += [{"step": step, "trained_tokens": trained_tokens, **row} for row in rows]


def recorded(step: int, total: int) -> bool:
    """Whether optimiser step ``step`` (1 … total) is recorded: the first, and those that end a tenth of the training.

    Trainings of 800 steps and more record every twentieth, thirtieth or (from 1,600 on) fortieth part.
    """
    points = 10 * min(4, max(1, total // (10 * STEPS_A_RECORD)))
    return step == 1 or step * points // total > (step - 1) * points // total


def matrices(drafter: nn.Module) -> dict[tuple[int | None, str, str], list[nn.Parameter]]:
    """(layer, branch, matrix) -> its parameters; an MLP's, a gate's and a layer's norms are taken together."""
    found: dict[tuple[int | None, str, str], list[nn.Parameter]] = {}
    for name, parameter in drafter.named_parameters():
        parts = name.split(".")
        inside = parts[0] == "layers"
        layer, rest = (int(parts[1]), parts[2:]) if inside else (None, parts)
        branch, matrix = "layer" if inside else "drafter", rest[0]
        if "norm" in name:
            matrix = "norms"
        elif rest[0] in ("attention", "cross"):
            branch, matrix = branch_of(drafter.layers[layer], rest[0]), rest[1]
        elif rest[0] == "fusion":
            branch, matrix = "cross", f"fusion.{rest[1]}"
        found.setdefault((layer, branch, matrix), []).append(parameter)
    return found


def branch_of(layer: nn.Module, attention: str) -> str:
    """Of one of a layer's attentions: a `kv` layer's only one is ``cross``, for its prefix is the target's KV."""
    return "self" if attention == "attention" and layer.reads_state else "cross"


def gradient_norms(drafter: Drafter) -> dict[tuple, float]:
    """Norm of every matrix's gradient as it stands in ``.grad``."""
    return {key: _norm(p.grad for p in own if p.grad is not None) for key, own in matrices(drafter).items()}


def adam_step(optimiser: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """lr · m̂ / (√v̂ + ε) of the optimiser's last step (Kingma and Ba 2015, algorithm 1), in the parameter's shape."""
    group = next(g for g in optimiser.param_groups if any(p is parameter for p in g["params"]))
    state = optimiser.state[parameter]
    first, second = (1 - beta ** state["step"].item() for beta in group["betas"])
    return group["lr"] * (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])


@torch.no_grad()
def matrix_rows(drafter: Drafter, optimiser: torch.optim.Optimizer, gradients: dict[tuple, float]) -> list[dict]:
    """Rows of every matrix, right after the optimiser's step; ``gradients`` are the norms before clipping."""
    rows, grouped = [], matrices(drafter)
    for key, own in grouped.items():
        moved = _norm(adam_step(optimiser, p) for p in own if p in optimiser.state)
        norms = {"grad_norm": gradients[key], "weight_norm": _norm(own), "adam_step_norm": moved}
        rows += [_row(key, name, value) for name, value in norms.items()]
    return rows + [_row(key, "numel", float(sum(p.numel() for p in own))) for key, own in grouped.items()]


def watched_gates(drafter: Drafter, see: Callable) -> AbstractContextManager[None]:
    """Within it ``see(layer, draft step, inputs, s, c)`` is called whenever a gated layer mixes its branches."""
    gated = {i: layer for i, layer in enumerate(drafter.layers) if getattr(layer, "gate", None) is not None}
    steps = Counter()

    def around(layer: int, mix: Callable, *given: Tensor) -> Tensor:
        see(layer, steps[layer], *given)
        steps[layer] += 1
        return mix(*given)

    return watching(gated, "mix", around)


@contextmanager
def branch_gradients(drafter: Drafter) -> Iterator[list[dict]]:
    """Within it a backward pass fills rows with the norms of ∂L/∂s and ∂L/∂c, by draft step; none without a gate."""
    rows: list[dict] = []

    def see(layer: int, k: int, _inputs: Tensor, own: Tensor, cross: Tensor) -> None:
        for branch, output in (("self", own), ("cross", cross)):
            row = _row((layer, branch, "output"), "grad_norm", 0.0, k)
            rows.append(row)
            output.register_hook(lambda gradient, row=row: row.update(value=gradient.detach().float().norm().item()))

    with watched_gates(drafter, see):
        yield rows


@torch.no_grad()
def gate_rows(drafter: Drafter, source, ttt_steps: int, dtype: torch.dtype = torch.float32) -> list[dict]:
    """The gate on a small fixed batch of ``source``, by draft step and document; none for drafters without a gate."""
    if getattr(drafter.layers[0], "gate", None) is None:
        return []
    device, documents = drafter.norm.weight.device, range(min(GATE_DOCUMENTS, len(source)))
    features = source.batch(documents, drafter.reads).to(device, dtype)
    anchors = few_anchors(find_anchors(features.answer_mask, ttt_steps))
    length = int(anchors.index.max()) + ttt_steps + 1  # x_{t+K} is the last token read, and a prefix needs a successor
    kept = {n: t[:, :length] for n, t in vars(features).items() if t is not None and t.dim() > 1}
    rows, used = [], anchors.valid[..., -1]

    def see(layer: int, k: int, inputs: Tensor, _own: Tensor, _cross: Tensor) -> None:
        gates = torch.sigmoid(drafter.layers[layer].gate(inputs)).float()
        for document in used.any(1).nonzero().flatten().tolist():
            gate = gates[document][used[document]]
            for name, value in (("gate_mean", gate.mean()), ("gate_spread", gate.std(unbiased=False))):
                rows.append(_row((layer, "layer", "gate"), name, value.item(), k, document))

    with watched_gates(drafter, see), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in draft_steps(drafter, replace(features, **kept), anchors, ttt_steps):
            pass
    return rows


def few_anchors(anchors: Anchors) -> Anchors:
    """Every eighth of each document's anchors that are valid at all draft steps, four at most."""
    complete = anchors.valid[..., -1]
    rank = complete.cumsum(1) - 1
    kept = complete & (rank % GATE_STRIDE == 0) & (rank < GATE_ANCHORS * GATE_STRIDE)
    order = torch.argsort(~kept, dim=1, stable=True)[:, :GATE_ANCHORS]
    real = kept.gather(1, order)
    valid = real[..., None].expand(-1, -1, anchors.valid.shape[2])
    return Anchors(torch.where(real, anchors.index.gather(1, order), 0), valid, real.float())


def recorded_gradients(checkpoint: str | Path, variant: str, seed: int) -> pd.DataFrame | None:
    """The rows of ``gradients.csv`` in a training's checkpoint; None without a checkpoint, or a record in it."""
    if not Path(checkpoint).exists():
        return None
    rows = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["progress"].get("gradients")
    if not rows:
        return None
    order = ["variant", "seed", "step", "trained_tokens", *COLUMNS]
    table = pd.DataFrame(rows).assign(variant=variant, seed=seed)[order]
    return table.astype({"layer": "Int64", "draft_step": "Int64", "document": "Int64"})


def _norm(tensors: Iterable[Tensor]) -> float:
    """Norm of all of them together; 0 of none."""
    norms = [tensor.detach().float().norm() for tensor in tensors]
    return torch.stack(norms).norm().item() if norms else 0.0


def _row(key: tuple, quantity: str, value: float, draft_step: int | None = None, document: int | None = None) -> dict:
    return dict(zip(COLUMNS, (*key, draft_step, document, quantity, value), strict=True))
