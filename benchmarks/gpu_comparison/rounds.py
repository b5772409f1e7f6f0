"""Interleaved rounds by the device's clock: every engine takes one turn in each, in another order each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Samples of a turn; the median of them is the round's value.
SAMPLES = 3
MOST_RUNS = 64
#: The device's milliseconds for a run, of as many as asked for in a row.
Time = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Rounds:
    """What was measured.

    Args:
        turns: for each engine one a round: ``ms`` of each sample, and ``runs`` in a sample.
        problems: why engines dropped out; they have no turns.
    """

    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def take_rounds(engines: Mapping[str, Time], may_fail: frozenset[str], rounds: int, turn_ms: float) -> Rounds:
    """Time engines.

    Args:
        engines: by name.
        may_fail: engines that drop out where they raise; errors of the others go to the caller.
        rounds: turns of each.
        turn_ms: about how long a turn takes the device; a slow engine runs less often in it.
    """
    found, runs = Rounds(), {}

    def attempt(name: str, count: int) -> float | None:
        try:
            return engines[name](count)
        # A peer may break in ways of its own; the others are still worth comparing.
        except Exception as error:
            if name not in may_fail:
                raise
            found.problems[name] = first_line(error)
            found.turns.pop(name, None)
            return None

    for name in engines:
        once = attempt(name, 1)
        if once is not None:
            runs[name] = max(1, min(MOST_RUNS, int(turn_ms / SAMPLES / max(once, 1e-6))))
    for number in range(rounds):
        names = list(engines)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if name in found.problems:
                continue
            samples = [attempt(name, runs[name]) for _ in range(SAMPLES) if name not in found.problems]
            if name not in found.problems:
                found.turns.setdefault(name, []).append({"ms": samples, "runs": runs[name]})
    return found


def first_line(error: Exception) -> str:
    """Return kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
