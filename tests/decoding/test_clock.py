"""Where time goes: every moment belongs to one part, and nothing reads a clock unasked."""

import time

import pytest
import torch
from blocks import block_drafter
from examples import drafter, target

from kvshot_lib.decoding import clock as clocks
from kvshot_lib.decoding.clock import PARTS, part, timed_parts
from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.propose import Chain, Tree

CPU = torch.device("cpu")


def test_every_moment_belongs_to_the_innermost_part(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    @part("draft")
    def inner():
        passes(2)

    @part("bookkeeping")
    def outer():
        passes(3)
        inner()
        passes(1)

    with timed_parts(CPU) as clock:
        passes(5)
        outer()
    inner()  # outside, nothing is booked
    wanted = {"draft": 2, "bookkeeping": 4, "rest": 5}
    assert clock.seconds == dict.fromkeys(PARTS, 0.0) | wanted


@pytest.mark.parametrize("plan, variant", [(Chain(3), "hybrid"), (Tree(2, 3, 8), "kv_1"), (Chain(3), "block_kv_1")])
def test_parts_add_up_and_change_nothing(plan, variant):
    built = block_drafter(variant) if variant.startswith("block") else drafter(variant)
    started = time.perf_counter()
    with timed_parts(CPU) as clock:
        out = decode(target(), built, [5, 6, 7], plan, max_new_tokens=12, eos_token_ids=())
    took = time.perf_counter() - started
    assert 0.5 * took < sum(clock.seconds.values()) <= took + 1e-3
    assert all(clock.seconds[name] > 0 for name in PARTS)
    assert out == decode(target(), built, [5, 6, 7], plan, max_new_tokens=12, eos_token_ids=())


def test_no_clock_runs_after_an_error():
    with pytest.raises(ZeroDivisionError), timed_parts(CPU):
        1 / 0  # noqa: B018
    assert clocks._running is None
