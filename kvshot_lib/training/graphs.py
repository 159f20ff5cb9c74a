"""A training step's loss and gradients as CUDA graphs.

A step starts thousands of small kernels, which keeps a fast GPU waiting for the processor most of the time. Recorded
once for each padded length of a batch, they start together.
"""

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from ..drafters.drafter import Drafter
from ..features.spec import Features
from .config import TrainConfig
from .loss import Loss, draw_parts, loss_of_parts

LENGTHS = 64  # batches are padded to a multiple of so many tokens: one recording each


@dataclass(frozen=True)
class Recording:
    """A graph, the tensors that it reads, the loss that it leaves, and the parameters to which it gives gradients."""

    graph: torch.cuda.CUDAGraph
    read: list[Tensor]
    loss: Loss
    trained: list[nn.Parameter]


class LossGraphs:
    """`training_loss` and its gradients, as recorded when a batch of this length was first seen.

    Anchors are drawn outside, with shapes that follow from the batch's: padding is computed, and counts for nothing.
    All recordings share their memory, so what one leaves is gone with the next.
    """

    def __init__(self, drafter: Drafter, config: TrainConfig, dtype: torch.dtype):
        self.drafter, self.config, self.dtype = drafter, config, dtype
        self.pool, self.recordings = torch.cuda.graph_pool_handle(), {}
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def __call__(self, features: Features, step: int, generator: torch.Generator) -> Loss:
        """The loss of optimiser step ``step`` (from 0), the gradients in the parameters in place of earlier ones."""
        features = features.lengthened(LENGTHS)
        parts = draw_parts(self.drafter, features, self.config, step, generator, fixed=True)
        shape = *features.tokens.shape, *parts
        if shape not in self.recordings:
            self.recordings[shape] = self.record(features, parts)
        recording = self.recordings[shape]
        for place, given in zip(recording.read, tensors((features, parts)), strict=True):
            place.copy_(given)
        for parameter in recording.trained:
            parameter.grad = self.gradients[parameter]
        recording.graph.replay()
        return recording.loss

    def forward(self, features: Features, parts: dict) -> Loss:
        """The loss itself."""
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            return loss_of_parts(self.drafter, features, self.config, parts)

    def record(self, features: Features, parts: dict) -> Recording:
        """Run the step twice to warm up, compile and see which parameters it trains, then record it."""
        features, parts = copy.deepcopy((features, parts))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.drafter.zero_grad()
                self.forward(features, parts).loss.backward()
        torch.cuda.current_stream().wait_stream(side)
        trained = [parameter for parameter in self.drafter.parameters() if parameter.grad is not None]
        for parameter in trained:
            parameter.grad = self.gradients.setdefault(parameter, torch.zeros_like(parameter))
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):  # NCCL's threads go on
            torch._foreach_zero_([parameter.grad for parameter in trained])
            loss = self.forward(features, parts)
            loss.loss.backward()
        return Recording(graph, [*tensors((features, parts))], replace(loss, loss=loss.loss.detach()), trained)


def tensors(value: object) -> Iterator[Tensor]:
    """Those in nested dataclasses, tuples and dictionaries, always in the same order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)
