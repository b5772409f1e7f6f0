"""What the integers of a program stand for where it has real numbers rounded: multipliers and reciprocals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from calibration.integerize.scales import Scales
from calibration.sites import Edge


@dataclass(frozen=True, slots=True, eq=False)
class RowDivision:
    """The division of a product of probabilities by the sums of their rows.

    The program multiplies with ``floor(numerator / sum)`` where ``exact / sum`` is meant. Both broadcast from the right
    to the sample shape of the product.

    Args:
        numerator: int64.
        exact: float64.
    """

    numerator: npt.NDArray[np.int64]
    exact: Scales


@dataclass(frozen=True, slots=True, eq=False)
class Multipliers:
    """How results of operations differ from what their scales say.

    One shift serves a tensor and both sides of a sum, so that a side with much finer steps, int32 sums beside a 16-bit
    residual, has a multiplier of fewer bits. What it stands for differs from the ratio of the scales by a factor.

    Args:
        factors: by operation float64 arrays that broadcast from the right to the sample shape of its result: one for
            each side of a sum, one for the result of any other operation.
        edges: factors of operands, likewise, of results that several formats are made of with a multiplier for each.
        rows: by operation, of products that are divided by the sums of rows.
    """

    factors: Mapping[str, tuple[Scales, ...]] = field(default_factory=dict)
    edges: Mapping[Edge, Scales] = field(default_factory=dict)
    rows: Mapping[str, RowDivision] = field(default_factory=dict)
