"""The rounding of real values to codes: to the nearest integer, ties to the even one.

Stated once, here; ``docs/numerics.md`` lists every other rounding of the project.
"""

from __future__ import annotations

from torch import Tensor


def round_half_even(values: Tensor) -> Tensor:
    """Round to the nearest integer, exact ties to the even neighbour: 0.5 to 0, 1.5 and 2.5 to 2."""
    return values.round()
