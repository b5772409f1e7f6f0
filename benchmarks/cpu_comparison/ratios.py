"""Statistics of rounds: medians, and ratios of two engines taken within a round before anything is averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the tenth and the ninetieth percentile."""

    median: float
    p10: float
    p90: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values for JSON."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Return median and percentiles.

    Args:
        values: at least one.
    """
    return Spread(*(float(np.percentile(values, p)) for p in (50, 10, 90)))


def round_values(turns: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return one value a round: the median of the calls of its turn, milliseconds."""
    return [float(np.median(turn["ms"])) for turn in turns]


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Return the ratio of each round.

    A load that slows the whole machine for a few rounds meets both engines of a round, so it leaves their ratio alone.

    Args:
        numerator: a value a round.
        denominator: the values of the same rounds.

    Raises:
        ValueError: not the same number of rounds.
    """
    return [above / below for above, below in zip(numerator, denominator, strict=True)]
