"""One turn of an engine: calls that warm up, then calls that count, for about the same time in each engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_CALLS = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """Times of one turn.

    Args:
        ms: milliseconds of each call that counts.
        busy: processor time of this process over the time of those calls, about the number of threads at work.
    """

    ms: tuple[float, ...]
    busy: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"ms": list(self.ms), "busy": self.busy}


def take_turn(call: Callable[[], object], warm_ms: float, time_ms: float) -> Turn:
    """Call without counting for ``warm_ms``, then count for ``time_ms``; at least one call of each.

    Args:
        call: one answer of the engine.
        warm_ms: enough for threads that slept, and for caches that other engines have filled.
        time_ms: a slow engine is called less often, so that a turn takes about the same time for each.
    """
    deadline = time.perf_counter() + warm_ms / 1000
    call()
    while time.perf_counter() < deadline:
        call()
    started, started_cpu = time.perf_counter(), time.process_time()
    deadline = started + time_ms / 1000
    ms: list[float] = []
    before = started
    while not ms or (before < deadline and len(ms) < MOST_CALLS):
        call()
        now = time.perf_counter()
        ms.append(1000 * (now - before))
        before = now
    return Turn(tuple(ms), (time.process_time() - started_cpu) / (before - started))
