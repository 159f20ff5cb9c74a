"""A training step's loss and gradients as CUDA graphs.

A step starts thousands of small kernels, which keeps a fast GPU waiting for the processor most of the time. Recorded
once for each padded length of a batch, they start together.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..drafters.drafter import Drafter
from ..features.spec import Features
from .config import TrainConfig
from .loss import Draw, Loss, draw_parts, loss_of_parts, with_gradients

LENGTHS = 64  # batches are padded to a multiple of so many tokens: one recording each


@dataclass(frozen=True)
class Recording:
    """A graph, the tensors that it reads, and the loss that it leaves."""

    graph: torch.cuda.CUDAGraph
    read: list[Tensor]
    loss: Loss


def can_be_recorded(drafter: Drafter) -> bool:
    """A compiled drafter on a GPU, whose RoPE does not look at positions to choose its angles."""
    return drafter.compiled and drafter.norm.weight.is_cuda and drafter.rotary.rope_type not in ("dynamic", "longrope")


class LossGraphs:
    """`training_loss` and its gradients, recorded when a batch of its length is there for the second time.

    Anchors are drawn outside, with shapes that follow from the batch's: padding is computed, and counts for nothing.
    All recordings share their memory, so what one leaves is gone with the next.
    """

    def __init__(self, drafter: Drafter, config: TrainConfig, dtype: torch.dtype):
        self.drafter, self.config, self.dtype = drafter, config, dtype
        self.pool, self.recordings = torch.cuda.graph_pool_handle(), {}
        self.trained: dict[tuple, list[nn.Parameter]] = {}  # by shape, the parameters that get a gradient
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def __call__(self, features: Features, step: int, generator: torch.Generator) -> Loss:
        """The loss of optimiser step ``step`` (from 0), its gradients in the parameters, which have none yet."""
        features = features.lengthened(LENGTHS)
        parts = draw_parts(self.drafter, features, self.config, step, generator, fixed=True)
        shape = *features.tokens.shape, *parts
        if shape not in self.trained:  # the first time it compiles, and shows what is trained
            loss = self.backward(features, parts)
            self.trained[shape] = [own for own in self.drafter.parameters() if own.grad is not None]
            self.gradients |= {own: torch.zeros_like(own) for own in self.trained[shape] if own not in self.gradients}
            return loss
        for parameter in self.trained[shape]:
            parameter.grad = self.gradients[parameter]
        if shape not in self.recordings:
            self.recordings[shape] = self.record(features, parts, self.trained[shape])
        recording = self.recordings[shape]
        for place, given in zip(recording.read, tensors((features, *parts.values())), strict=True):
            place.copy_(given)
        recording.graph.replay()
        return recording.loss

    def backward(self, features: Features, parts: dict[str, Draw]) -> Loss:
        """The loss itself, its gradients added to the parameters'."""
        work = partial(loss_of_parts, self.drafter, features, self.config, parts)
        return with_gradients(work, features.tokens.device, self.dtype)

    def record(self, features: Features, parts: dict[str, Draw], trained: list[nn.Parameter]) -> Recording:
        """Everything from empty gradients to full ones."""
        features, parts = copy.deepcopy((features, parts))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # NCCL's threads go on
            torch._foreach_zero_([parameter.grad for parameter in trained])
            loss = self.backward(features, parts)
        return Recording(graph, [*tensors((features, *parts.values()))], loss)


def tensors(value: object) -> Iterator[Tensor]:
    """Those in nested dataclasses and tuples, always in the same order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple) or is_dataclass(value):
        for part in value if isinstance(value, tuple) else vars(value).values():
            yield from tensors(part)
