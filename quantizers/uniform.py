"""Uniform affine quantization: ``code = clip(round_half_even(x / scale) + zero_point, qmin, qmax)``.

=====================  =======  ========  ==========  ============================
tensor                 qmin     qmax      zero point  scale from a range [lo, hi]
=====================  =======  ========  ==========  ============================
weight, b bits         1 - h    h - 1     0           max(-lo, hi) / (h - 1)
activation, symmetric  -h       h - 1     0           max(-lo, hi) / (h - 1)
activation, affine     -h       h - 1     integer     (hi - lo) / (2h - 1)
heads, affine          -h       h - 1     integer z   max(-lo / (z + h), hi / (h - 1 - z))
=====================  =======  ========  ==========  ============================

with ``h = 2^(b-1)``. Heads have one zero point, that with which their scales exceed those of their own best zero
points least, in the mean square of the ratios. Scales are float32 values, so that every format that stores them
stores the same. A range of zero width has no scale of its own; it gets scale 1, or among heads their largest: any
scale codes zero exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantizers.rounding import round_half_even
from quantizers.spec import QuantSpec

#: Where the heads of an operand ``(..., heads, M, K)`` of an attention product lie.
HEAD_AXIS = -3
#: Ranges narrower than this count as zero: their scales would leave the range of multipliers.
_SMALLEST_RANGE = 2.0**-60


@dataclass(frozen=True, slots=True)
class UniformQParams:
    """Parameters of one tensor.

    Args:
        scale: positive float32 values; one for a tensor, or one for each index of an axis.
        zero_point: the code of real zero.
        qmin: lowest code.
        qmax: highest code.
        axis: where several scales lie: 0, the output channels of a weight, or counted from the end, as the heads
            of an operand (..., heads, M, K) are axis -3.
    """

    scale: tuple[float, ...]
    zero_point: int
    qmin: int
    qmax: int
    axis: int = 0

    @property
    def dtype(self) -> str:
        """Smallest integer type of the program that holds the codes."""
        if self.qmin < 0:
            return "int8" if self.qmin >= -128 and self.qmax <= 127 else "int16"
        return "uint8"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (self.qmax - self.qmin).bit_length()

    def scales(self) -> npt.NDArray[np.float64]:
        """Return the scales as float64.

        Returns:
            Shape (1,) or, along axis 0, (N,). An axis that counts from the end has extents of 1 behind it, as in
            (heads, 1, 1) for -3, so that the scales broadcast from the right.
        """
        scale = np.asarray(self.scale, np.float64)
        return scale if scale.size == 1 else scale.reshape(-1, *(1,) * (-self.axis - 1))


def bounds(spec: QuantSpec) -> tuple[int, int]:
    """Return the lowest and highest code of a spec."""
    half = 1 << (spec.bits - 1)
    return (1 - half if spec.granularity == "channel" else -half), half - 1


def qparams_from_range(low: npt.ArrayLike, high: npt.ArrayLike, spec: QuantSpec) -> UniformQParams:
    """Choose scale and zero point for values in ``[low, high]``.

    Args:
        low: lowest values, scalar or (N,); raised to 0 where positive, so that zero has a code.
        high: highest values, same shape; lowered to 0 where negative.
        spec: width, symmetry, and with granularity ``head`` the axis of the scales.
    """
    lows = np.minimum(np.atleast_1d(np.asarray(low, np.float64)), 0.0)
    highs = np.maximum(np.atleast_1d(np.asarray(high, np.float64)), 0.0)
    qmin, qmax = bounds(spec)
    width = np.maximum(-lows, highs) / qmax if spec.symmetric else (highs - lows) / (qmax - qmin)
    zero_point = 0
    if not spec.symmetric and len(width) > 1:
        zero_point, width = _common_zero_point(lows, highs, qmin, qmax)
    heads, empty = spec.granularity == "head", width * qmax < _SMALLEST_RANGE
    # Heads share the shift of a multiplier, and one scale far above the others would leave these few bits.
    substitute = width[~empty].max() if heads and not empty.all() else 1.0
    scale = np.where(empty, substitute, width).astype(np.float32)
    if not spec.symmetric and len(width) == 1:
        zero_point = int(np.clip(qmin + np.rint(-lows[0] / float(scale[0])), qmin, qmax))
    return UniformQParams(tuple(float(s) for s in scale), zero_point, qmin, qmax, HEAD_AXIS if heads else 0)


def _common_zero_point(
    lows: npt.NDArray[np.float64], highs: npt.NDArray[np.float64], qmin: int, qmax: int
) -> tuple[int, npt.NDArray[np.float64]]:
    """Return the zero point and the scales with which every range fits, and which are least too coarse."""
    own = (highs - lows) / (qmax - qmin)
    codes = np.arange(qmin, qmax + 1)
    # A range without values below zero needs no code below the zero point.
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(lows < 0, -lows / (codes - qmin)[:, None], 0.0)
        above = np.where(highs > 0, highs / (qmax - codes)[:, None], 0.0)
        widths = np.maximum(below, above)
        coarseness = np.where(own > 0, widths / own, 1.0)
    chosen = int(np.square(coarseness).mean(1).argmin())
    return int(codes[chosen]), widths[chosen]


def quantize(x: Tensor, qparams: UniformQParams) -> Tensor:
    """Return codes as float32 integers, same shape as ``x``."""
    scale = _shaped(qparams, x)
    return (round_half_even(x / scale) + qparams.zero_point).clamp(qparams.qmin, qparams.qmax)


def dequantize(codes: Tensor, qparams: UniformQParams) -> Tensor:
    """Return the real values of codes."""
    return (codes - qparams.zero_point) * _shaped(qparams, codes)


def fake_quantize(x: Tensor, qparams: UniformQParams) -> Tensor:
    """Return the nearest representable values: quantize, then dequantize."""
    return dequantize(quantize(x, qparams), qparams)


def _shaped(qparams: UniformQParams, x: Tensor) -> Tensor:
    scale = torch.tensor(qparams.scale, dtype=torch.float32, device=x.device)
    behind = (x.ndim if qparams.axis == 0 else -qparams.axis) - 1
    return scale if scale.numel() == 1 else scale.reshape(-1, *(1,) * behind)
