"""Turns of backends do not meet what the turn before has left running."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from ptq.benchmarking import time_backends

#: Longer than pools of threads spin, in seconds.
SPIN = 0.15


def test_a_turn_begins_when_the_one_before_has_come_to_rest() -> None:
    """One backend leaves a thread that spins; while it does, the other one is not called."""
    ends = [0.0]
    met: list[bool] = []

    def spin() -> None:
        while time.perf_counter() < ends[0]:
            pass

    def loud(_: Tensor) -> None:
        ends[0] = time.perf_counter() + SPIN
        threading.Thread(target=spin).start()

    def quiet(_: Tensor) -> None:
        met.append(time.perf_counter() < ends[0])

    timings = time_backends({"loud": loud, "quiet": quiet}, torch.zeros(2, 1, 4, 4), 1, 2)
    # The first calls only load what is loaded lazily.
    assert len(met) > 4
    assert not any(met[1:])
    assert [(timing.backend, timing.batch) for timing in timings] == [("loud", 2), ("quiet", 2)]


def test_times_are_those_of_calls() -> None:
    def slow(_: Tensor) -> None:
        time.sleep(0.02)

    (timing,) = time_backends({"slow": slow}, torch.zeros(1, 1, 4, 4), 1, 3)
    assert 20 <= timing.p10_ms <= timing.median_ms <= timing.p90_ms
