"""What a training records of its gradients: norm and Adam step of every matrix, and the hybrid's gate, some ten to forty times.

Recording reads what the optimiser step makes anyway and changes no number of the training. Its rows are those of ``gradients.csv``:

    quantity        of what                                             draft_step  document
    grad_norm       a matrix's gradient in this step, before clipping
    grad_norm       matrix ``output``: ∂L/∂s, ∂L/∂c of both branches    k
    weight_norm     a matrix after this step
    adam_step_norm  lr · m̂ / (√v̂ + ε) of this step: what Adam moved it, weight decay aside
    numel           its parameters
    gate_mean       sigmoid of the gate, mean over anchors, channels    k           validation document
    gate_spread     its standard deviation over the same                k           validation document

All norms are Frobenius norms; a gradient is as the optimiser gets it, so ``kv_grad_scale`` is in it. ``branch`` is ``self`` or ``cross``
for an attention's matrices, ``layer`` for what both share, ``drafter`` (and no layer) for what stands before and after the layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ..drafters.drafter import Drafter
from ..drafters.layers import HybridLayer
from .ttt import Anchors, draft_steps, find_anchors

STEPS_A_RECORD = 40  # or more, for a record costs about a third of a step: less than a hundredth of the training in all
GATE_DOCUMENTS, GATE_ANCHORS, GATE_STRIDE = 8, 4, 8  # a fixed batch that costs a fraction of an optimiser step
COLUMNS = ["layer", "branch", "matrix", "draft_step", "document", "quantity", "value"]


def recorded(step: int, total: int) -> bool:
    """Whether optimiser step ``step`` (1 … total) is recorded: the first, and those that end a tenth of the training.

    Trainings of 800 steps and more record every twentieth, thirtieth or (from 1,600 on) fortieth part: always the tenths too.
    """
    points = 10 * min(4, max(1, total // (10 * STEPS_A_RECORD)))
    return step == 1 or step * points // total > (step - 1) * points // total


def matrices(drafter: nn.Module) -> dict[tuple[int | None, str, str], list[nn.Parameter]]:
    """(layer, branch, matrix) -> its parameters; an MLP's and the gate's are taken together, and so are a layer's norms."""
    found: dict[tuple[int | None, str, str], list[nn.Parameter]] = {}
    for name, parameter in drafter.named_parameters():
        parts = name.split(".")
        inside = parts[0] == "layers"
        layer, rest = (int(parts[1]), parts[2:]) if inside else (None, parts)
        branch, matrix = "layer" if inside else "drafter", rest[0]
        if rest[0] in ("attention", "cross"):
            branch, matrix = branch_of(drafter.layers[layer], rest[0]), rest[1]
        elif rest[0] == "fusion" and rest[1] != "norm":
            branch, matrix = "cross", f"fusion.{rest[1]}"
        elif "norm" in name:
            matrix = "norms"
        found.setdefault((layer, branch, matrix), []).append(parameter)
    return found


def branch_of(layer: nn.Module, attention: str) -> str:
    """Branch of one of a layer's attentions: a `kv` layer's only one is ``cross``, for its prefix is the target's KV."""
    return "self" if attention == "attention" and layer.reads_state else "cross"


def gradient_norms(drafter: Drafter) -> dict[tuple, Tensor]:
    """Norm of every matrix's gradient as it stands in ``.grad``."""
    return {key: _norm([p.grad for p in own if p.grad is not None], own[0]) for key, own in matrices(drafter).items()}


def adam_step(optimiser: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """lr · m̂ / (√v̂ + ε) of the optimiser's last step (Kingma and Ba 2015, algorithm 1), in the parameter's shape."""
    group = next(g for g in optimiser.param_groups if any(p is parameter for p in g["params"]))
    state = optimiser.state[parameter]
    first, second = (1 - beta ** state["step"].item() for beta in group["betas"])
    return group["lr"] * (state["exp_avg"] / first) / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])


@torch.no_grad()
def matrix_rows(drafter: Drafter, optimiser: torch.optim.Optimizer, gradients: dict[tuple, Tensor]) -> list[dict]:
    """Rows of every matrix, right after the optimiser's step; ``gradients`` from :func:`gradient_norms` before clipping."""
    rows, values = [], []
    for key, own in matrices(drafter).items():
        moved = [adam_step(optimiser, p) for p in own if p in optimiser.state]
        values += [gradients[key], _norm(own, own[0]), _norm(moved, own[0])]
        rows += [_row(key, name) for name in ("grad_norm", "weight_norm", "adam_step_norm")]
    for row, value in zip(rows, torch.stack(values).tolist(), strict=True):  # one wait for the device
        row["value"] = value
    return rows + [
        _row(key, "numel", value=float(sum(p.numel() for p in own))) for key, own in matrices(drafter).items()
    ]


@contextmanager
def branch_gradients(drafter: Drafter) -> Iterator[list[dict]]:
    """Within it a backward pass tells ∂L/∂s and ∂L/∂c, the gradients at the outputs of both branches, by draft step.

    Yields
    ------
    The rows, whose values are there after the backward pass (as tensors until the end); none for drafters without a gate.
    """
    rows: list[dict] = []

    def see(layer: int, k: int, _inputs: Tensor, own: Tensor, cross: Tensor) -> None:
        for branch, output in (("self", own), ("cross", cross)):
            row = _row((layer, branch, "output"), "grad_norm", draft_step=k)
            rows.append(row)
            output.register_hook(lambda gradient, row=row: row.update(value=gradient.detach().float().norm()))

    with watched_mixing(drafter, see):
        yield rows
    rows[:] = [row | {"value": float(row["value"] or 0.0)} for row in rows]


@contextmanager
def watched_mixing(drafter: Drafter, see: Callable) -> Iterator[None]:
    """Within it ``see(layer, draft step, inputs, s, c)`` is called whenever a gated layer mixes its branches.

    It stands around the layer's own method, compiled or not (hooks on the gate would be ignored where torch.compile fused it).
    """
    gated = [(i, layer) for i, layer in enumerate(drafter.layers) if isinstance(layer, HybridLayer) and layer.gate]
    before = {i: vars(layer).get("mix") for i, layer in gated}

    def watch(index: int, layer: HybridLayer) -> None:
        mix, calls = layer.mix, [0]

        def watched(*given: Tensor) -> Tensor:
            see(index, calls[0], *given)
            calls[0] += 1
            return mix(*given)

        layer.mix = watched

    try:
        for index, layer in gated:
            watch(index, layer)
        yield
    finally:
        for index, layer in gated:
            vars(layer).pop("mix", None)
            if before[index] is not None:
                layer.mix = before[index]


@torch.no_grad()
def gate_rows(drafter: Drafter, source, ttt_steps: int, dtype: torch.dtype = torch.float32) -> list[dict]:
    """The gate on a small fixed batch of ``source``: rows by draft step and document; none for drafters without a gate."""
    if getattr(drafter.layers[0], "gate", None) is None:
        return []
    device, documents = drafter.norm.weight.device, range(min(GATE_DOCUMENTS, len(source)))
    features = source.batch(documents, drafter.reads).to(device, dtype)
    anchors = few_anchors(find_anchors(features.answer_mask, ttt_steps))
    length = int(anchors.index.max()) + ttt_steps + 1  # x_{t+K} is the last token read, and a prefix needs a successor
    features = replace(
        features, **{n: t[:, :length] for n, t in vars(features).items() if t is not None and t.dim() > 1}
    )
    rows, used = [], anchors.valid[..., -1]

    def see(layer: int, k: int, inputs: Tensor, _own: Tensor, _cross: Tensor) -> None:
        gate = torch.sigmoid(drafter.layers[layer].gate(inputs)).float()
        rows.extend(gate_statistics(gate, used, layer, k))

    with watched_mixing(drafter, see), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in draft_steps(drafter, features, anchors, ttt_steps):
            pass
    return rows


def gate_statistics(gate: Tensor, used: Tensor, layer: int, k: int) -> list[dict]:
    """Mean and standard deviation of the gate [B, M, d] in each document that has used anchors [B, M]."""
    rows = []
    for document in used.any(1).nonzero().flatten().tolist():
        own = gate[document][used[document]]
        for name, value in (("gate_mean", own.mean()), ("gate_spread", own.std(unbiased=False))):
            rows.append(_row((layer, "layer", "gate"), name, k, document, value.item()))
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
    """The rows of ``gradients.csv`` that a finished training's checkpoint holds; None if there is no checkpoint, or no record in it."""
    if not Path(checkpoint).exists():
        return None
    rows = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["progress"].get("gradients")
    if not rows:
        return None
    table = pd.DataFrame(rows).assign(variant=variant, seed=seed)[
        ["variant", "seed", "step", "trained_tokens", *COLUMNS]
    ]
    return table.astype({"layer": "Int64", "draft_step": "Int64", "document": "Int64"})


def _norm(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Norm of all of them together, a scalar on the device of ``like``."""
    if not tensors:
        return torch.zeros((), device=like.device)
    return torch.stack([tensor.detach().float().norm() for tensor in tensors]).norm()


def _row(key: tuple, quantity: str, draft_step: int | None = None, document: int | None = None, value=None) -> dict:
    return dict(zip(COLUMNS, (*key, draft_step, document, quantity, value), strict=True))
