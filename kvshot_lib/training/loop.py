"""Training a drafter: steps, validation, and checkpoints that resume to the same weights."""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from .. import parallel
from ..drafters.drafter import Drafter
from ..errors import StudyError
from ..features.spec import Features
from ..files import check_records, write_handle
from ..metrics.acceptance import COUNTS, count_document
from .config import TrainConfig, batches, check_training, learning_rate, total_steps
from .curves import curves
from .graphs import LossGraphs, can_be_recorded
from .judging import match_documents
from .loss import Loss, training_loss, with_gradients
from .record import gate_rows, gradient_norms, matrix_rows, recorded

CHECKED_STEPS = 16  # a GPU is waited for so often; in between it always has work


def train(
    drafter: Drafter, source, validation, config: TrainConfig, run_dir: str | Path, *,
    dtype: torch.dtype = torch.float32, log_to: str = "",
) -> pd.DataFrame:  # fmt: skip
    """Train ``drafter`` in place, by TTT or block-wise, going on from ``run_dir/checkpoint.pt`` if it is there.

    Parameters
    ----------
    source, validation : `StoredFeatures` or `LiveFeatures`.
    dtype : bfloat16 computes under autocast with float32 weights.
    log_to : where else the history goes (`curves`).

    Returns
    -------
    History: one row per (step, split, draft_step); train rows average since the last report. `trained_tokens` counts
    the tokens of the documents passed through, each pass anew; `seconds` leaves validation and the gate's record out.

    Raises
    ------
    StudyError : a training that this drafter can't have; a checkpoint of another set-up; a loss, gradient or weight
        that is not finite, before a weight or a file takes it up (the last good checkpoint is kept).

    Notes
    -----
    There is no ambient randomness: batches and sampled anchors are functions of (seed, step), so that step, weights and
    optimiser are the whole state.
    """
    training = Training(drafter, source, validation, config, run_dir, dtype)
    for _ in training.steps(log_to):
        pass
    return training.history()


@dataclass
class Progress:
    """Where a training stands; saved whole in each checkpoint.

    ``window`` sums (loss, matches, pairs) [3, K] since the last report; ``gradients`` holds the rows of `record`.
    """

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    gradients: list[dict] = field(default_factory=list)
    window: torch.Tensor | None = None
    window_steps: int = 0

    def advance(self, counted: torch.Tensor, tokens: int) -> None:
        """One optimiser step more, with its (loss, matches, pairs) [3, K]."""
        self.window = counted if self.window is None else self.window + counted
        self.window_steps += 1
        self.step += 1
        self.trained_tokens += tokens

    def record(self, rows: list[dict]) -> None:
        """Keep rows of `record` with the step and tokens of this moment."""
        self.gradients += [{"step": self.step, "trained_tokens": self.trained_tokens, **row} for row in rows]


class Training:
    """A drafter in training, how far it has come, and its checkpoint ``run_dir/checkpoint.pt``."""

    def __init__(
        self, drafter: Drafter, source, validation, config: TrainConfig, run_dir: str | Path, dtype: torch.dtype
    ):
        self.drafter, self.source, self.validation, self.config, self.dtype = drafter, source, validation, config, dtype
        self.device, self.path = drafter.norm.weight.device, Path(run_dir) / "checkpoint.pt"
        self.total = total_steps(config, len(source))
        if dtype not in (torch.float32, torch.bfloat16):
            raise StudyError(f"dtype={dtype} is not trained in: gradients would vanish; take float32 or bfloat16")
        check_training(drafter.config, config)
        if (warmup := config.branch_warmup_steps) >= self.total:
            raise StudyError(f"branch_warmup_steps={warmup} must be below the {self.total} optimiser steps of the run")
        groups, decay = parameter_groups(drafter, config.branch_learning_rate_scale), config.weight_decay
        self.optimiser = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=True
        )
        self.graphs = LossGraphs(drafter, config, dtype) if can_be_recorded(drafter) else None
        self.identity = {**identity(drafter, source, config, dtype), "padded_batches": self.graphs is not None}
        self.progress = self.load() if self.path.exists() else Progress()
        self.wrong = torch.zeros(1, dtype=torch.long, device=self.device)  # the first step that `counted` found so

    def steps(self, log_to: str = "") -> Iterator[int]:
        """Train to the end, with reports and checkpoints; gives after each optimiser step how many are done."""
        drafter, config, progress, saved = self.drafter, self.config, self.progress, time.perf_counter()
        run, hidden = "/".join(self.path.parts[-3:-1]), None if parallel.is_main() else True  # one bar
        with (
            tqdm(desc=run, total=self.total, initial=progress.step, unit="step", mininterval=2, disable=hidden) as bar,
            curves(log_to, self.path.parent, progress.step) as log,
        ):
            for indices in batches(self.source.lengths, config, progress.step, self.total):
                started = time.perf_counter()
                self.step(indices)
                last = progress.step == self.total
                reports = last or (config.validate_every and progress.step % config.validate_every == 0)
                if reports or progress.step % CHECKED_STEPS == 0:
                    self.check()
                progress.seconds += time.perf_counter() - started
                bar.update()
                if recorded(progress.step, self.total):
                    progress.record(gate_rows(drafter, self.validation, config.ttt_steps, self.dtype))
                if reports:
                    rows = self.report()
                    bar.set_postfix_str(_headline(rows))
                    log(rows)
                if parallel.is_main() and (last or time.perf_counter() - saved > config.checkpoint_every_s):
                    self.save()
                    saved = time.perf_counter()
                yield progress.step

    def history(self) -> pd.DataFrame:
        """Rows as :func:`train` gives them."""
        return pd.DataFrame(self.progress.history)

    def step(self, indices: list[int]) -> None:
        """One optimiser step on one batch, of which each process takes its share."""
        drafter, config, progress = self.drafter, self.config, self.progress
        tokens = sum(self.source.lengths[i] for i in indices)
        state = (*drafter.reads, "final_hidden", "target_argmax")
        features = share_of_batch(self.source, indices, state).to(self.device, self.dtype)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + progress.step)
        loss = self.loss(features, generator)
        parallel.sum_gradients(drafter)
        gradients = gradient_norms(drafter) if recorded(progress.step + 1, self.total) else {}
        counted = self.counted(loss, nn.utils.clip_grad_norm_(drafter.parameters(), config.clip_norm))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, progress.step, self.total) * group.get("scale", 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        progress.advance(counted, tokens)
        if gradients:
            progress.record(matrix_rows(drafter, self.optimiser, gradients))

    def loss(self, features: Features, generator: torch.Generator) -> Loss:
        """The loss of this step, its gradients in the parameters."""
        if self.graphs:
            return self.graphs(features, self.progress.step, generator)
        work = partial(training_loss, self.drafter, features, self.config, self.progress.step, generator)
        return with_gradients(work, self.device, self.dtype)

    def counted(self, loss: Loss, gradient_norm: torch.Tensor) -> torch.Tensor:
        """(loss, matches, pairs) [3, K] of the whole batch, on the device, which nothing here waits for.

        Where loss or gradient are not finite the optimiser changes nothing, then and later; `check` finds out.
        """
        parts = [loss.step_loss, loss.matches, loss.pairs, loss.loss[None]]
        *counted, total = parallel.summed(torch.cat([part.double() for part in parts])).split(len(loss.pairs))
        now = ~(total + gradient_norm).isfinite() * (self.progress.step + 1)
        self.wrong = torch.where(self.wrong > 0, self.wrong, now)
        self.optimiser.found_inf = self.wrong.any().float()  # as torch's GradScaler tells it
        return torch.stack(counted)

    def check(self) -> None:
        """Wait for the device, and stop a training whose loss or gradient was not finite."""
        step = self.wrong.item()
        self.check_finite("loss or gradient are", not step, step)

    def check_finite(self, what: str, right: bool, step: int) -> None:
        """Stop a training that has gone wrong."""
        if not right:
            there = self.path.exists()
            kept = f"the last good checkpoint is {self.path}" if there else "no checkpoint was written before"
            raise StudyError(f"{what} not finite at optimiser step {step}; {kept}; try a lower learning_rate")

    def report(self) -> list[dict]:
        """History rows of this moment: training since the last report, and acceptance on the validation documents."""
        progress, steps = self.progress, self.config.ttt_steps
        matched = match_documents(self.validation, self.drafter, steps, device=self.device, dtype=self.dtype)
        counts = sum(count_document(*document)[0] for document in matched)
        anchors, matches = (counts[:, COUNTS.index(name)] for name in ("anchors", "matches"))
        loss, right, pairs = progress.window.cpu() / torch.tensor([[progress.window_steps], [1], [1]])
        now = {
            "step": progress.step,
            "trained_tokens": progress.trained_tokens,
            "seconds": round(progress.seconds, 2),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        rows = []
        for k in range(steps):
            seen, held_out = (right[k] / pairs[k]).item(), float(matches[k] / max(1, anchors[k]))
            rows.append({**now, "split": "train", "draft_step": k, "loss": loss[k].item(), "acceptance": seen})
            rows.append({**now, "split": "validation", "draft_step": k, "loss": math.nan, "acceptance": held_out})
        progress.history += rows
        progress.window, progress.window_steps = None, 0
        return rows

    def save(self) -> None:
        """Write everything that a resumed run needs, atomically."""
        self.check()
        self.check_finite("weights are", finite(self.drafter), self.progress.step)
        state = {
            "identity": self.identity,
            "drafter": self.drafter.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": vars(self.progress),
        }
        write_handle(self.path, lambda handle: torch.save(state, handle))

    def load(self) -> Progress:
        """Restore drafter and optimiser; a checkpoint of another set-up is refused by name of what differs."""
        path = self.path
        try:
            check_records(path)
            state = torch.load(path, map_location=self.device, weights_only=True)
            found = state["identity"]
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            why = f"{path} can't be read ({type(error).__name__})"
            raise StudyError(f"{why}; delete it to train from the start") from error
        if differs := [name for name in self.identity if self.identity[name] != found.get(name)]:
            other = f"{path} belongs to another run (differs in {', '.join(differs)})"
            raise StudyError(f"{other}; delete it or choose another results_dir")
        self.drafter.load_state_dict(state["drafter"])
        if not finite(self.drafter):
            raise StudyError(f"{path} holds weights that are not finite; delete it to train from the start")
        self.optimiser.load_state_dict(state["optimiser"])
        return Progress(**state["progress"])


def finite(drafter: Drafter) -> bool:
    """Whether every weight is a finite number."""
    return all(bool(parameter.isfinite().all()) for parameter in drafter.parameters())


def share_of_batch(source, indices: list[int], state: tuple[str, ...]) -> Features:
    """This process's documents of a batch; one without answers, so without a loss, if there are too few for all."""
    if own := parallel.share(indices):
        return source.batch(own, state)
    features = source.batch(indices[:1], state)
    return replace(features, answer_mask=torch.zeros_like(features.answer_mask))


def parameter_groups(drafter: Drafter, branch_scale: float) -> list[dict]:
    """What the optimiser is given: all in one group, or the cross branch in a second one with its own ``scale``."""
    if branch_scale == 1:
        return [{"params": list(drafter.parameters())}]
    branch = set(branch_parameters(drafter))
    rest, own = ([p for p in drafter.parameters() if (p in branch) == inside] for inside in (False, True))
    return [{"params": rest}, {"params": own, "scale": branch_scale}]


def branch_parameters(drafter: Drafter) -> list[nn.Parameter]:
    """A hybrid's cross branch: its attention and the fusion that it reads. The gate belongs to both branches."""
    return [p for layer in drafter.layers for part in (layer.cross, layer.fusion) for p in part.parameters()]


def identity(drafter: Drafter, source, config: TrainConfig, dtype: torch.dtype) -> dict:
    """Everything that a training depends on, by name; ``drafter`` still has its starting weights."""
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
    found = {**described["config"], **spec, **asdict(config), **own}
    del found["checkpoint_every_s"]
    return found


def _headline(rows: list[dict]) -> str:
    """Loss at draft step 0 and validation acceptance at the first, middle and last step, for the progress bar."""
    accepted = [row["acceptance"] for row in rows if row["split"] == "validation"]
    chosen = sorted({0, len(accepted) // 2, len(accepted) - 1})
    return f"loss {rows[0]['loss']:.2f}, accepted " + " ".join(f"[{k}] {accepted[k]:.3f}" for k in chosen)
