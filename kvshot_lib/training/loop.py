"""Training a drafter: batches, optimiser, validation, checkpoints that resume to the same weights."""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .. import parallel
from ..drafters.drafter import Drafter
from ..errors import StudyError
from ..features.spec import Features
from ..files import check_seal, write_sealed
from ..metrics.acceptance import COUNTS, count_document
from .judging import match_documents
from .objective import check_objective, parameter_groups, training_loss
from .record import branch_gradients, gate_rows, gradient_norms, matrix_rows, recorded


@dataclass(frozen=True)
class TrainConfig:
    """How a drafter is trained; what it is, says `DrafterConfig`.

    epochs : passes over the training documents. max_steps : stop earlier (0: don't); the schedule ends there too.
    batch_documents : documents an optimiser step. anchor_fraction : ρ, share of anchors that draft steps k ≥ 1 run on.
    step_decay : λ of the loss. learning_rate falls to 0 along a cosine after warmup_fraction of all steps.
    validate_every : optimiser steps between validations (0: only at the end). checkpoint_every_s : seconds.
    branch_warmup_steps, branch_loss_weight, branch_learning_rate_scale, kv_lag_augment_tokens : see `objective`.
    """

    seed: int = 0
    epochs: int = 2
    max_steps: int = 0
    batch_documents: int = 2
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.03
    weight_decay: float = 0.01
    clip_norm: float = 0.5
    ttt_steps: int = 7
    step_decay: float = 0.8
    anchor_fraction: float = 0.2
    validate_every: int = 50
    checkpoint_every_s: float = 60.0
    branch_warmup_steps: int = 0
    branch_loss_weight: float = 0.0
    branch_learning_rate_scale: float = 1.0
    kv_lag_augment_tokens: int = 0

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "batch_documents",
            "learning_rate",
            "clip_norm",
            "ttt_steps",
            "step_decay",
            "branch_learning_rate_scale",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise StudyError(f"{name}={getattr(self, name)} must be above 0")
        cures = ("branch_warmup_steps", "branch_loss_weight", "kv_lag_augment_tokens")
        for name in ("max_steps", "validate_every", "weight_decay", "warmup_fraction", *cures):
            if getattr(self, name) < 0:
                raise StudyError(f"{name}={getattr(self, name)} must be 0 or more")
        if not 0 < self.anchor_fraction <= 1:
            raise StudyError(f"anchor_fraction={self.anchor_fraction} must be above 0 and at most 1")


def batch_plan(lengths: list[int], batch_documents: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one pass, every document once, as a function of its arguments alone.

    Documents are shuffled, sorted by length within runs of 16 batches (little padding), and the batches shuffled again.
    """
    random = np.random.default_rng([seed, epoch])
    order, batches = random.permutation(len(lengths)), []
    for start in range(0, len(order), 16 * batch_documents):
        run = sorted(order[start : start + 16 * batch_documents].tolist(), key=lambda i: lengths[i])
        batches += [run[i : i + batch_documents] for i in range(0, len(run), batch_documents)]
    return [batches[i] for i in random.permutation(len(batches))]


@dataclass
class Progress:
    """Where a training stands; saved whole in each checkpoint.

    ``window`` sums (loss, matches, pairs) [3, K] since the last report; ``gradients`` holds rows of `gradient_record`.
    """

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    gradients: list[dict] = field(default_factory=list)
    window: torch.Tensor | None = None
    window_steps: int = 0


def train(
    drafter: Drafter,
    source,
    validation,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> pd.DataFrame:
    """Train ``drafter`` in place, by TTT or block-wise, going on from ``run_dir/checkpoint.pt`` if it is there.

    Parameters
    ----------
    source, validation : `StoredFeatures` or `LiveFeatures`.
    dtype : bfloat16 computes under autocast with float32 weights.

    Returns
    -------
    History: one row per (step, split, draft_step); train rows average since the last report. `trained_tokens` counts the tokens of
    the documents passed through, each pass anew; `seconds` leaves validation and the gate's record out.

    Raises
    ------
    StudyError : a training that this drafter can't have; a checkpoint of another set-up; a loss that is not finite (the last good checkpoint is kept).

    Notes
    -----
    There is no ambient randomness: batches and sampled anchors are functions of (seed, step), so that step, weights and optimiser
    are the whole state.
    """
    path = Path(run_dir) / "checkpoint.pt"
    total = total_steps(config, len(source))
    check_objective(drafter.config, config)
    if config.branch_warmup_steps >= total:
        raise StudyError(
            f"branch_warmup_steps={config.branch_warmup_steps} must be below the {total} optimiser steps of the run"
        )
    optimiser = torch.optim.AdamW(
        parameter_groups(drafter, config),
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )
    identity = _identity(drafter, source, config, dtype)
    progress = load_checkpoint(path, drafter, optimiser, identity) if path.exists() else Progress()
    saved = time.perf_counter()
    hidden = None if parallel.is_main() else True  # one bar
    with tqdm(total=total, initial=progress.step, unit="step", desc="train", mininterval=2, disable=hidden) as bar:
        for indices in batches(source.lengths, config, progress.step, total):
            started = time.perf_counter()
            _train_step(drafter, optimiser, source, indices, config, progress, total, dtype, path)
            progress.seconds += time.perf_counter() - started
            bar.update()
            if recorded(progress.step, total):
                _record(progress, gate_rows(drafter, validation, config.ttt_steps, dtype))
            if progress.step == total or (config.validate_every and progress.step % config.validate_every == 0):
                rows = _report(drafter, validation, config, progress, optimiser.param_groups[0]["lr"], dtype)
                progress.history += rows
                bar.set_postfix_str(_headline(rows))
            due = progress.step == total or time.perf_counter() - saved > config.checkpoint_every_s
            if due and parallel.is_main():
                save_checkpoint(path, drafter, optimiser, identity, progress)
                saved = time.perf_counter()
    return pd.DataFrame(progress.history)


def total_steps(config: TrainConfig, documents: int) -> int:
    """Optimiser steps of the whole run."""
    steps = config.epochs * math.ceil(documents / config.batch_documents)
    return min(steps, config.max_steps) if config.max_steps else steps


def batches(lengths: list[int], config: TrainConfig, first: int, total: int) -> Iterator[list[int]]:
    """Batches of optimiser steps ``first`` … ``total`` - 1."""
    a_pass = math.ceil(len(lengths) / config.batch_documents)
    for epoch in range(first // a_pass, config.epochs):
        for place, batch in enumerate(batch_plan(lengths, config.batch_documents, config.seed, epoch), epoch * a_pass):
            if first <= place < total:
                yield batch


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero at ``total``."""
    warm = max(1, round(config.warmup_fraction * total))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _train_step(
    drafter, optimiser, source, indices, config: TrainConfig, progress: Progress, total: int, dtype, path: Path
) -> None:
    """One optimiser step on one batch, of which each process takes its share; advances ``progress``."""
    record = recorded(progress.step + 1, total)
    device = drafter.norm.weight.device
    features = share_of_batch(source, indices, (*drafter.reads, "final_hidden", "target_argmax")).to(device, dtype)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + progress.step)
    with branch_gradients(drafter) if record else nullcontext([]) as branches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            result = training_loss(drafter, features, config, progress.step, generator)
        if not math.isfinite(parallel.summed(result.loss.detach()).item()):
            kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written before it"
            raise StudyError(
                f"the loss is not finite at optimiser step {progress.step + 1}; {kept}; try a lower learning_rate"
            )
        result.loss.backward()
    parallel.sum_gradients(drafter)
    norms = gradient_norms(drafter) if record else {}
    torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.clip_norm)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, progress.step, total) * group.get("scale", 1.0)
    optimiser.step()
    optimiser.zero_grad()
    counted = parallel.summed(torch.stack([result.step_loss, result.matches, result.pairs]).double()).cpu()
    progress.window = counted if progress.window is None else progress.window + counted
    progress.window_steps += 1
    progress.step += 1
    progress.trained_tokens += sum(source.lengths[i] for i in indices)
    if record:
        whole = parallel.norms([row["value"] for row in branches])
        branches = [row | {"value": value} for row, value in zip(branches, whole, strict=True)]
        _record(progress, matrix_rows(drafter, optimiser, norms) + branches)


def share_of_batch(source, indices: list[int], state: tuple[str, ...]) -> Features:
    """This process's documents of a batch; one without answers, so nothing to learn from, if there are fewer documents than processes."""
    if own := parallel.share(indices):
        return source.batch(own, state)
    features = source.batch(indices[:1], state)
    return replace(features, answer_mask=torch.zeros_like(features.answer_mask))


def _record(progress: Progress, rows: list[dict]) -> None:
    """Keep rows of `gradient_record`, with the step that they are of."""
    progress.gradients += [{"step": progress.step, "trained_tokens": progress.trained_tokens, **row} for row in rows]


def _report(drafter, validation, config: TrainConfig, progress: Progress, rate: float, dtype) -> list[dict]:
    """History rows of this moment: training since the last report, and acceptance on the validation documents."""
    device = drafter.norm.weight.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        matched = match_documents(validation, drafter, config.ttt_steps, device=device, dtype=dtype)
    counts = sum(count_document(*document)[0] for document in matched)
    anchors, matches = (counts[:, COUNTS.index(name)] for name in ("anchors", "matches"))
    loss, right, pairs = progress.window / torch.tensor([[progress.window_steps], [1], [1]])
    now = {
        "step": progress.step,
        "trained_tokens": progress.trained_tokens,
        "seconds": round(progress.seconds, 2),
        "learning_rate": rate,
    }
    rows = []
    for k in range(config.ttt_steps):
        rows.append(
            {
                **now,
                "split": "train",
                "draft_step": k,
                "loss": loss[k].item(),
                "acceptance": (right[k] / pairs[k]).item(),
            }
        )
        rows.append(
            {
                **now,
                "split": "validation",
                "draft_step": k,
                "loss": math.nan,
                "acceptance": float(matches[k] / max(1, anchors[k])),  # a NumPy number would lock the checkpoint
            }
        )
    progress.window, progress.window_steps = None, 0
    return rows


def _headline(rows: list[dict]) -> str:
    """Loss at draft step 0 and validation acceptance at the first, middle and last step, for the progress bar."""
    accepted = [row["acceptance"] for row in rows if row["split"] == "validation"]
    chosen = sorted({0, len(accepted) // 2, len(accepted) - 1})
    return f"loss {rows[0]['loss']:.2f}, accepted " + " ".join(f"[{k}] {accepted[k]:.3f}" for k in chosen)


def _identity(drafter: Drafter, source, config: TrainConfig, dtype: torch.dtype) -> dict:
    """Everything that a training depends on, by name; ``drafter`` still has its starting weights (a warm start's, say)."""
    described, weights = drafter.description(), hashlib.sha256()
    for tensor in drafter.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    own = {
        "draft_vocabulary": hashlib.sha256(drafter.draft_ids.cpu().numpy().tobytes()).hexdigest(),
        "starting_weights": weights.hexdigest(),
        "training_documents": source.documents_hash,
        "dtype": str(dtype),
    }
    spec = {"kv_layer_indices" if name == "kv_layers" else name: value for name, value in described["spec"].items()}
    identity = {**described["config"], **spec, **asdict(config), **own}
    del identity["checkpoint_every_s"]
    return identity


def save_checkpoint(
    path: Path, drafter: Drafter, optimiser: torch.optim.Optimizer, identity: dict, progress: Progress
) -> None:
    """Write everything that a resumed run needs, atomically."""
    state = {
        "identity": identity,
        "drafter": drafter.state_dict(),
        "optimiser": optimiser.state_dict(),
        "progress": vars(progress),
    }
    write_sealed(path, lambda handle: torch.save(state, handle))


def load_checkpoint(path: Path, drafter: Drafter, optimiser: torch.optim.Optimizer, identity: dict) -> Progress:
    """Restore ``drafter`` and ``optimiser``; a checkpoint of another set-up is refused by name of what differs."""
    check_seal(path, "delete it to train from the start")
    try:
        state = torch.load(path, map_location=drafter.norm.weight.device, weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise StudyError(f"{path} can't be read ({type(error).__name__}); delete it to train from the start") from error
    if differs := [name for name in identity if identity[name] != found.get(name)]:
        raise StudyError(
            f"{path} belongs to another run (differs in {', '.join(differs)}); delete it or choose another results_dir"
        )
    drafter.load_state_dict(state["drafter"])
    optimiser.load_state_dict(state["optimiser"])
    progress = state["progress"]
    return Progress(**{**progress, "window": None if progress["window"] is None else progress["window"].cpu()})
