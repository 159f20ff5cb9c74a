"""Where decoding's time goes, part by part; on a GPU in a pass of its own, which waits for the device at every part.

prefill      the target over the prompt
verify       the target over the newest token and the drafts
draft        the drafter's steps, LM head included
project      the target's state of accepted tokens -> the drafter's prefix entries
bookkeeping  building and choosing drafts, tree masks, rolling the cache back
sampling     choosing tokens and accepting drafts
rest         the loop itself
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

PARTS = ("prefill", "verify", "draft", "project", "bookkeeping", "sampling", "rest")


class Clock:
    """Seconds by part; every moment belongs to the part that was entered last and not left yet."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.open = device, dict.fromkeys(PARTS, 0.0), ["rest"]
        self.last = time.perf_counter()

    def book(self) -> None:
        """Give the time since the last call to the part that is open, when the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Within it the part is ``name``."""
        self.book()
        self.open.append(name)
        try:
            yield
        finally:
            self.book()
            self.open.pop()


_running: Clock | None = None


@contextmanager
def timed_parts(device: torch.device) -> Iterator[Clock]:
    """Within it decoding fills the clock's seconds; nothing reads a clock otherwise."""
    global _running
    _running = clock = Clock(device)
    try:
        yield clock
        clock.book()
    finally:
        _running = None


def is_timed() -> bool:
    """Whether a clock runs."""
    return _running is not None


def part(name: str) -> Callable[[Callable], Callable]:
    """Decorator: what the function takes is booked as ``name``, but for calls of other parts within it."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*given, **named):
            with _running.inside(name) if _running else nullcontext():
                return function(*given, **named)

        return call

    return decorate
