"""Latency of several backends in one run: rounds are interleaved, so that noise on the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_WARM_UPS = 3


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
    """Time each backend on the same images, one call of each a round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(_WARM_UPS):
            run(images)
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(images)
            samples[name].append(1000 * (time.perf_counter() - started))
    return [
        Timing(name, len(images), threads, *(float(np.percentile(values, p)) for p in (50, 10, 90)))
        for name, values in samples.items()
    ]
