"""Latency of several backends in one run: rounds are interleaved, so that noise on the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

#: Seconds of calls that wake a backend's threads, and of those that count, in each turn.
_WARM_S, _TIMED_S = 0.01, 0.03
_STEP_S, _QUIET_STEPS, _LONGEST_WAIT_S = 0.002, 5, 1.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one call.

    Args:
        backend: what ran.
        batch: images in a call.
        threads: worker threads.
        median_ms: median of the rounds.
        p10_ms: tenth percentile.
        p90_ms: ninetieth percentile.
    """

    backend: str
    batch: int
    threads: int
    median_ms: float
    p10_ms: float
    p90_ms: float


def time_backends(
    runs: Mapping[str, Callable[[Tensor], object]], images: Tensor, threads: int, rounds: int
) -> list[Timing]:
    """Time each backend on the same images, one turn of each a round.

    A turn begins when no thread of this process works any more: the pools of torch, TVM and onnxruntime spin for up to
    120 ms after the last call, and would take the processors from whoever is timed next. Calls that do not count then
    wake the backend's own threads, and the median of those that count is the round's time.

    Args:
        runs: by name, functions of images.
        images: float32 (batch, channels, height, width).
        threads: what the backends were told; reported only.
        rounds: turns of each.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(images)
    for _ in range(rounds):
        for name, run in runs.items():
            _wait_until_idle()
            _repeat(run, images, _WARM_S)
            samples[name].append(1000 * float(np.median(_repeat(run, images, _TIMED_S))))
    return [
        Timing(name, len(images), threads, *(float(np.percentile(values, p)) for p in (50, 10, 90)))
        for name, values in samples.items()
    ]


def _repeat(run: Callable[[Tensor], object], images: Tensor, seconds: float) -> list[float]:
    """Call at least once and until some seconds have passed; return what each call took."""
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while not times or time.perf_counter() < ends:
        started = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - started)
    return times


def _wait_until_idle() -> None:
    """Sleep until the threads of this process have come to rest, a second at the longest."""
    ends, quiet = time.perf_counter() + _LONGEST_WAIT_S, 0
    # One quiet step may be a thread that waits for its turn on a busy machine.
    while quiet < _QUIET_STEPS and time.perf_counter() < ends:
        used = time.process_time()
        time.sleep(_STEP_S)
        quiet = quiet + 1 if time.process_time() - used < _STEP_S / 20 else 0
