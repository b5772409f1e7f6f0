"""The Pareto front of choices of widths, cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.mixed_precision.solver import Array, Choice, choose_front, choose_widths
from ptq.mixed_precision.accuracy import Drop
from ptq.mixed_precision.costs import Costs
from ptq.mixed_precision.goal import Goal
from quantizers.errors import UsageError


@dataclass(frozen=True, slots=True)
class Point:
    """A choice of widths.

    Args:
        widths: bits by weight.
        error: predicted squared error of the network's result that weights bring, as a share of its square.
        bundle_bytes: of all weights in a compiled bundle.
        artifact_bytes: of all weights in an artifact.
        ratio: how many times less the weights take than at 8 bits, where the search counts bytes.
        milliseconds: of all kernels at batch 1.
        drop: measured with weights chosen for the search; None where it was not.
        final: measured after a calibration with the point's recipe; None where it was not.
    """

    widths: Mapping[str, int]
    error: float
    bundle_bytes: int
    artifact_bytes: int
    ratio: float
    milliseconds: float
    drop: Drop | None = None
    final: Drop | None = None


class Table:
    """Errors and costs of every weight at every width, as the solver takes them.

    Args:
        sensitivities: error by weight and width.
        costs: of the same weights, and of 8 bits.
        widths: to choose from.
        store: where bytes are counted.
    """

    def __init__(
        self, sensitivities: Mapping[str, Mapping[int, float]], costs: Costs, widths: Sequence[int], store: str
    ) -> None:
        self.sensitivities, self.costs, self.widths, self.store = sensitivities, costs, tuple(widths), store
        self.names = tuple(sensitivities)
        self._error = self._array(lambda name, width: sensitivities[name][width])
        self._size = self._array(lambda name, width: costs.weights[name][width].stored(store))
        self._time = self._array(lambda name, width: costs.weights[name][width].milliseconds)
        self.bytes_at_8_bits = sum(entry[8].stored(store) for entry in costs.weights.values())

    def _array(self, value: Callable[[str, int], float]) -> Array:
        return np.array([[value(name, width) for width in self.widths] for name in self.names], np.float64)

    def front(self, points: int, *, by_time: bool = False) -> tuple[Point, ...]:
        """Return the front over bytes, or over time.

        Args:
            points: at most this many.
            by_time: whether its budgets are milliseconds.
        """
        cost = self._time if by_time else self._size
        return tuple(self.point(chosen) for chosen in choose_front(self._error, cost, points))

    def within(self, goal: Goal) -> Point:
        """Return the point with the least error within a budget of size or time.

        Raises:
            UsageError: the budget is impossible; says what the least is.
        """
        if goal.latency_budget is not None:
            others = self.costs.other_milliseconds
            # The solver sees what it can choose; messages speak of the whole network.
            _require(goal.latency_budget, others + float(self._time.min(1).sum()), "--latency-budget", "ms")
            return self.point(choose_widths(self._error, self._time, goal.latency_budget - others))
        assert goal.size_budget is not None
        least = float(self._size.min(1).sum()) / self.bytes_at_8_bits
        _require(goal.size_budget, least, "--size-budget", "of the bytes at 8 bits")
        return self.point(choose_widths(self._error, self._size, goal.size_budget * self.bytes_at_8_bits))

    def point(self, chosen: Choice) -> Point:
        """Return a choice with what it costs."""
        widths = {name: self.widths[column] for name, column in zip(self.names, chosen, strict=True)}
        costs = [self.costs.weights[name][width] for name, width in widths.items()]
        return Point(
            widths,
            sum(self.sensitivities[name][width] for name, width in widths.items()),
            sum(cost.bundle_bytes for cost in costs),
            sum(cost.artifact_bytes for cost in costs),
            self.bytes_at_8_bits / sum(cost.stored(self.store) for cost in costs),
            self.costs.other_milliseconds + sum(cost.milliseconds for cost in costs),
        )


def _require(budget: float, least: float, option: str, unit: str) -> None:
    if budget < least:
        # Rounded up, so that what the message says is possible.
        shown = math.ceil(least * 1e4) / 1e4
        raise UsageError(f"{option} is {budget:g} {unit}, the least that these widths reach is {shown:.4f}")
