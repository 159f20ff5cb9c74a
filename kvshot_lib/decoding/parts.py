"""Where decoding's time goes, part by part: for a pass of its own, since reading clocks slows a pass down.

prefill      the target over the prompt
verify       the target over the newest token and the drafts
draft        the drafter's steps, LM head included
project      the target's state of accepted tokens -> the drafter's prefix entries
bookkeeping  building and choosing drafts, tree masks, rolling the cache back
sampling     choosing tokens and accepting drafts
rest         the loop itself
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..target.load import Target
from . import decode as decoding
from . import propose as tree
from . import propose_block as block_drafts
from .decode import Drafting
from .verify import TargetRun

PARTS = ("prefill", "verify", "draft", "project", "bookkeeping", "sampling", "rest")
# What is called where, and to which part it belongs; time in a call within a call belongs to the inner one.
CALLS = (
    (TargetRun, "prefill", "prefill"),
    (TargetRun, "verify", "bookkeeping"),  # but for the forward within
    (TargetRun, "keep", "bookkeeping"),
    (Drafting, "extend", "project"),
    (Drafting, "propose", "bookkeeping"),  # but for the drafter's steps within
    (tree, "run_frontier", "draft"),
    (block_drafts, "slot_logits", "draft"),
    (decoding, "accept", "sampling"),
)


class PartClock:
    """Seconds by part; every moment belongs to the part that was entered last and not left yet."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.open = device, dict.fromkeys(PARTS, 0.0), ["rest"]
        self.last = self.now()

    def now(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self, part: str) -> None:
        self._book()
        self.open.append("prefill" if self.open[-1] == "prefill" else part)  # whatever a prefill calls is prefill

    def leave(self) -> None:
        self._book()
        self.open.pop()

    def _book(self) -> None:
        now = self.now()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now


@contextmanager
def timed_parts(target: Target) -> Iterator[PartClock]:
    """Within it one `decode` fills the clock's seconds; afterwards everything is called as before."""
    clock = PartClock(target.device)
    with ExitStack() as stack:
        for owner, name, part in (*CALLS, (target.model, "forward", "verify")):
            stack.enter_context(_replaced(owner, name, _timed(getattr(owner, name), part, clock)))
        yield clock
        clock.enter("rest")  # books what ran since the last call
        clock.leave()


def _timed(function: Callable, part: str, clock: PartClock) -> Callable:
    def call(*given, **named):
        clock.enter(part)
        try:
            return function(*given, **named)
        finally:
            clock.leave()

    return call


@contextmanager
def _replaced(owner: object, name: str, value: Callable) -> Iterator[None]:
    """``owner.name`` is ``value`` within the block."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own) if own is not None else delattr(owner, name)
