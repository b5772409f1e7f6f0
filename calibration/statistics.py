"""Streaming statistics of an activation: exact extremes and a histogram, independent of the order of the data.

Bins are ``2^e`` wide and start at multiples of it. When a larger value arrives, neighbouring bins merge
and the width doubles; since ``floor(floor(x / w) / 2) = floor(x / 2w)``, the counts are those that the
final width would have given from the start. Memory is constant in the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Bins on each side of zero; 8-bit codes then span at least 8 bins a step.
_HALF = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Statistics of all values seen.

    Args:
        count: how many values; 0 means that nothing was seen.
        low: lowest value.
        high: highest value.
        exponent: bins are ``2^exponent`` wide; None while all values are zero.
        counts: int64 (4096,), bin ``i`` starts at ``(i - 2048) 2^exponent``.
    """

    count: int
    low: float
    high: float
    exponent: int | None
    counts: Tensor

    def centers(self) -> npt.NDArray[np.float64]:
        """Return the middle of each bin, float64 (4096,)."""
        width = 2.0 ** (self.exponent if self.exponent is not None else 0)
        middles: npt.NDArray[np.float64] = np.arange(2 * _HALF, dtype=np.float64) - (_HALF - 0.5)
        return middles * width

    def filled(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the middles and the counts of the bins that hold values."""
        counts = self.counts.numpy()
        held = counts > 0
        return self.centers()[held], counts[held].astype(np.float64)


def empty() -> Histogram:
    """Return the statistics of no value."""
    return Histogram(0, float("inf"), float("-inf"), None, torch.zeros(2 * _HALF, dtype=torch.int64))


def update(stats: Histogram, values: Tensor) -> Histogram:
    """Return statistics that include float32 values of any shape, all finite."""
    low, high = (float(v) for v in values.aminmax())
    held = values.to("cpu")
    peak = max(-low, high)
    exponent = stats.exponent
    if peak > 0:
        # frexp: peak < 2^E, so that values / 2^(E - 11) lie inside (-2048, 2048). The floor keeps the
        # division by the width exact for values near the smallest float32.
        needed = max(int(np.frexp(peak)[1]) - _HALF.bit_length() + 1, -126)
        exponent = needed if exponent is None else max(exponent, needed)
    counts = _coarsen(stats.counts, (exponent or 0) - (stats.exponent if stats.exponent is not None else exponent or 0))
    # In float32 the quotient of a tiny negative value could underflow to zero, which lies in the next bin.
    index = (held.reshape(-1).to(torch.float64) * 2.0 ** -(exponent or 0)).floor().to(torch.int64) + _HALF
    counts = counts + torch.bincount(index, minlength=2 * _HALF)
    return Histogram(stats.count + values.numel(), min(stats.low, low), max(stats.high, high), exponent, counts)


def _coarsen(counts: Tensor, doublings: int) -> Tensor:
    for _ in range(min(doublings, _HALF.bit_length())):
        merged = counts.reshape(-1, 2).sum(1)
        counts = torch.zeros_like(counts)
        counts[_HALF // 2 : _HALF // 2 + _HALF] = merged
    return counts
