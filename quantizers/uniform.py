"""Uniform affine quantization: ``code = clip(round_half_even(x / scale) + zero_point, qmin, qmax)``.

=====================  =======  ========  ==========  ============================
tensor                 qmin     qmax      zero point  scale from a range [lo, hi]
=====================  =======  ========  ==========  ============================
weight, b bits         1 - h    h - 1     0           max(-lo, hi) / (h - 1)
activation, symmetric  -h       h - 1     0           max(-lo, hi) / (h - 1)
activation, affine     -h       h - 1     integer     (hi - lo) / (2h - 1)
=====================  =======  ========  ==========  ============================

with ``h = 2^(b-1)``. Scales are float32 values, so that every format that stores them stores the same.
A range of zero width has no scale of its own; it gets scale 1, which codes zero exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantizers.rounding import round_half_even
from quantizers.spec import QuantSpec

#: Ranges narrower than this count as zero: their scales would leave the range of multipliers.
_SMALLEST_RANGE = 2.0**-60


@dataclass(frozen=True, slots=True)
class UniformQParams:
    """Parameters of one tensor.

    Args:
        scale: positive float32 values; one for a tensor, or one a channel along axis 0 (weights).
        zero_point: the code of real zero.
        qmin: lowest code.
        qmax: highest code.
    """

    scale: tuple[float, ...]
    zero_point: int
    qmin: int
    qmax: int

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
        """Return the scales as float64, shape (1,) or (N,)."""
        return np.asarray(self.scale, np.float64)


def bounds(spec: QuantSpec) -> tuple[int, int]:
    """Return the lowest and highest code of a spec."""
    half = 1 << (spec.bits - 1)
    return (1 - half if spec.granularity == "channel" else -half), half - 1


def qparams_from_range(low: npt.ArrayLike, high: npt.ArrayLike, spec: QuantSpec) -> UniformQParams:
    """Choose scale and zero point for values in ``[low, high]``.

    Args:
        low: lowest values, scalar or (N,); raised to 0 where positive, so that zero has a code.
        high: highest values, same shape; lowered to 0 where negative.
        spec: width and symmetry.
    """
    lows = np.minimum(np.atleast_1d(np.asarray(low, np.float64)), 0.0)
    highs = np.maximum(np.atleast_1d(np.asarray(high, np.float64)), 0.0)
    qmin, qmax = bounds(spec)
    width = np.maximum(-lows, highs) / qmax if spec.symmetric else (highs - lows) / (qmax - qmin)
    scale = np.where(width * qmax < _SMALLEST_RANGE, 1.0, width).astype(np.float32)
    zero_point = 0
    if not spec.symmetric:
        zero_point = int(np.clip(qmin + np.rint(-lows[0] / float(scale[0])), qmin, qmax))
    return UniformQParams(tuple(float(s) for s in scale), zero_point, qmin, qmax)


def quantize(x: Tensor, qparams: UniformQParams) -> Tensor:
    """Return codes as float32 integers, same shape as ``x``; scales of a channel lie along axis 0."""
    scale = _shaped(qparams, x)
    return (round_half_even(x / scale) + qparams.zero_point).clamp(qparams.qmin, qparams.qmax)


def dequantize(codes: Tensor, qparams: UniformQParams) -> Tensor:
    """Return the real values of codes."""
    return (codes - qparams.zero_point) * _shaped(qparams, codes)


def fake_quantize(x: Tensor, qparams: UniformQParams) -> Tensor:
    """Return the nearest representable values: quantize, then dequantize."""
    return dequantize(quantize(x, qparams), qparams)


def _shaped(qparams: UniformQParams, x: Tensor) -> Tensor:
    scale = torch.tensor(qparams.scale, dtype=torch.float32)
    return scale if scale.numel() == 1 else scale.reshape(-1, *(1,) * (x.ndim - 1))
