"""What the verifier knows of a value: its type, bounds that hold for every input, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantizers.integer.program import Node, TensorType


@dataclass(frozen=True, slots=True)
class Interval:
    """All values of a tensor lie in ``[low, high]``."""

    low: int
    high: int

    @property
    def magnitude(self) -> int:
        """Largest absolute value."""
        return max(abs(self.low), abs(self.high))

    def minus(self, offset: int) -> Interval:
        """Return the interval of ``x - offset``."""
        return Interval(self.low - offset, self.high - offset)

    def times(self, other: Interval) -> Interval:
        """Return the interval of the product."""
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(min(corners), max(corners))

    def plus(self, other: Interval) -> Interval:
        """Return the interval of the sum."""
        return Interval(self.low + other.low, self.high + other.high)


@dataclass(frozen=True, slots=True)
class Operand:
    """What the verifier knows of a value: its type, its bounds, its array if constant, its node if not."""

    name: str
    type: TensorType
    interval: Interval
    array: npt.NDArray[np.generic] | None = None
    node: Node | None = None


Checked = tuple[TensorType, Interval]
