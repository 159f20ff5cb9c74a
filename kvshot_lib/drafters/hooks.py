"""Standing around methods of a drafter's modules, to see or change what goes through: how records and probes get in."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

Around = Callable[..., object]
"""(key, method, *arguments, **named) -> what the caller gets; ``method(*arguments, **named)`` would change nothing."""


@contextmanager
def watching(modules: Mapping[Hashable, nn.Module], method: str, around: Around) -> Iterator[None]:
    """Within it calls of ``module.method(…)`` become ``around(key, module.method, …)``; it is undone after errors too.

    Parameters
    ----------
    modules : by a key that tells ``around`` whose method was called.
    method : its name; ``forward`` for the module's own call.

    Notes
    -----
    Meanwhile compiled methods (`layers.COMPILED`) run as they were written, so that what they call is seen too. Several
    may stand around one method, the last one outermost.

    Seeing every layer's output, and stopping its gradient::

        def seen(layer, forward, *arguments):
            output, chains = forward(*arguments)
            outputs[layer] = output
            return output.detach(), chains

        with watching(dict(enumerate(drafter.layers)), "forward", seen):
            ...
    """
    before = {key: vars(module)[method] for key, module in modules.items() if method in vars(module)}
    try:
        for key, module in modules.items():
            setattr(module, method, partial(around, key, getattr(module, method)))
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for key, module in modules.items():
            vars(module).pop(method, None)
            if key in before:
                setattr(module, method, before[key])
