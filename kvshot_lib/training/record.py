"""What a training records of itself: gradient and Adam step of every matrix, and the hybrid's gate.

Ten to forty records a training read what the optimiser step makes anyway, and change no number. Rows of gradients.csv:

    quantity        of what                                             draft_step  document
    grad_norm       a matrix's gradient in this step, before clipping
    adam_step_norm  lr · m̂ / (√v̂ + ε) of this step: what Adam moved it, weight decay aside
    gate_mean       sigmoid of the gate, mean over anchors, channels    k           validation document

All norms are Frobenius norms; a gradient is as the optimiser gets it, so ``kv_grad_scale`` is in it. ``branch`` is
``self`` or ``cross`` for an attention's matrices, ``layer`` for what both share, ``drafter`` (and no layer) for what
stands around them.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ..drafters.drafter import Drafter
from ..drafters.hooks import watching
from .anchors import Anchors, find_anchors
from .ttt import draft_steps

STEPS_A_RECORD = 40  # or more, for a record costs about a third of a step: less than a hundredth of the training in all
GATE_DOCUMENTS, GATE_ANCHORS, GATE_STRIDE = 8, 4, 8  # a fixed batch that costs a fraction of an optimiser step
COLUMNS = ["layer", "branch", "matrix", "draft_step", "document", "quantity", "value"]


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
    rows = []
    for key, own in matrices(drafter).items():
        moved = _norm(adam_step(optimiser, p) for p in own if p in optimiser.state)
        rows += [_row(key, "grad_norm", gradients[key]), _row(key, "adam_step_norm", moved)]
    return rows


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
    rows, used, steps = [], anchors.valid[..., -1], Counter()

    def around(layer: int, mix: Callable, inputs: Tensor, *branches: Tensor) -> Tensor:
        gates = torch.sigmoid(drafter.layers[layer].gate(inputs)).float()
        for document in used.any(1).nonzero().flatten().tolist():
            mean = gates[document][used[document]].mean().item()
            rows.append(_row((layer, "layer", "gate"), "gate_mean", mean, steps[layer], document))
        steps[layer] += 1
        return mix(inputs, *branches)

    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with watching(dict(enumerate(drafter.layers)), "mix", around), autocast:
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
