"""Several processes, started by Hugging Face Accelerate, that train or extract together; alone, nothing happens here.

Process r of P takes documents r, r + P, … of every batch. A training is the same for any P, up to rounding: a mean's
denominator is summed over all processes before anything is divided by it, so gradients are summed, not averaged; and
each process draws the random numbers of the *whole* batch and keeps its rows.
"""

import datetime
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def begin() -> None:
    """Join the processes that `accelerate launch` or `notebook_launcher` has started.

    The first one judges a trained drafter while the others wait, which may take longer than torch's usual ten minutes.
    """
    from accelerate import PartialState

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS")  # accelerate tells how many threads it gives each process
        PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(hours=24))


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes what all of them made."""
    return rank() == 0


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        dist.barrier()


def share(batch: Sequence[int]) -> list[int]:
    """This process's documents of a batch; it may be empty."""
    return list(batch[rank() :: count()])


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in each of them."""
    if count() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(module: nn.Module) -> None:
    """Make every gradient that of the whole batch."""
    if count() == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def draw(make: Callable[[int, int], Tensor], rows: int, columns: int = 1) -> Tensor:
    """This process's rows of ``make(rows, columns)`` for the whole batch, however many processes share it.

    ``make`` fills its tensor row by row from a seeded generator that all processes have alike, [rows, columns].
    """
    if count() == 1:
        return make(rows, columns)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    whole = torch.tensor([rank() + (rows - 1) * count() + 1, columns], device=device)
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return make(*whole.tolist())[rank() :: count()][:rows, :columns]
