"""Processor time of other processes, precise to nanoseconds, so that turns that were disturbed are noticed."""

from __future__ import annotations

import time
from pathlib import Path

_PROC = Path("/proc")
#: Linux: the low bits of the clock of a process that counts its time on processors.
_SCHEDULED = 2
BLIND_S = 0.2


def processor_seconds(process: int) -> float:
    """Return how long a process has run, its threads together; 0 if it is gone or the system has no such clock."""
    try:
        return time.clock_gettime(~process << 3 | _SCHEDULED)
    except OSError:
        return 0.0


def others_seconds(but: frozenset[int]) -> dict[int, float]:
    """Return the processor time of each process except some; nothing where there is no ``/proc``."""
    if not _PROC.is_dir():
        return {}
    processes = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    return {process: processor_seconds(process) for process in processes if process not in but}


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    """Return the seconds of processor time between two answers of :func:`others_seconds`."""
    return sum(max(0.0, seconds - before.get(process, 0.0)) for process, seconds in after.items() if seconds)


def wait_until_idle(processes: list[int], longest_s: float = 1.0, step_s: float = 0.002) -> float:
    """Wait until processes stop using the processor, as pools that spin do some time after the last call.

    Where the system does not tell their time, wait for a fifth of a second, longer than any pool seen so far spins.

    Args:
        processes: whose threads may spin.
        longest_s: give up after this long.
        step_s: they are idle when all of them together ran less than a twentieth of this.

    Returns:
        Seconds waited.
    """
    started = time.perf_counter()
    used = sum(map(processor_seconds, processes))
    if not used:
        time.sleep(BLIND_S)
    while time.perf_counter() - started < longest_s:
        time.sleep(step_s)
        now = sum(map(processor_seconds, processes))
        if now - used < step_s / 20:
            break
        used = now
    return time.perf_counter() - started
