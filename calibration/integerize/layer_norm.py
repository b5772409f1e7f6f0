"""The integer constants of a LayerNorm; :mod:`quantizers.integer.ops` states the arithmetic they feed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantizers.integer.fixed_point import choose_shift
from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS


@dataclass(frozen=True, slots=True, eq=False)
class LayerNormConstants:
    """``saturate((n weight + bias + 2^(shift-1)) >> shift)`` with ``n`` in 2^-20 standard deviations.

    Args:
        weight: int32 (C,).
        bias: int64 (C,).
        epsilon: added to ``C^2 variance / scale^2``, at least 1.
        shift: 1 to 62.
        gain: float64 (C,), what ``weight / 2^shift`` rounds.
    """

    weight: npt.NDArray[np.int32]
    bias: npt.NDArray[np.int64]
    epsilon: int
    shift: int
    gain: npt.NDArray[np.float64]


def layer_norm_constants(
    gamma: npt.NDArray[np.float64],
    beta: npt.NDArray[np.float64],
    eps: float,
    input_scale: float,
    output_scale: npt.NDArray[np.float64],
) -> LayerNormConstants:
    """Express gamma, beta and eps in steps of the input and output scales.

    Args:
        gamma: (C,), either sign.
        beta: (C,).
        eps: added to the variance of real values.
        input_scale: real value of one step of the input codes.
        output_scale: (1,) or (C,), real value of one step of the output codes.
    """
    gain = gamma / (output_scale * 2.0**LAYER_NORM_FRACTION_BITS)
    offset = beta / output_scale
    # The bias is int64 and joins the product before the shift: 60 bits leave room for the sum.
    shift = min(choose_shift(float(np.abs(gain).max())), choose_shift(float(np.abs(offset).max()), bits=60))
    weight = np.rint(gain * 2.0**shift).astype(np.int32)
    bias = np.array([round(float(value) * 2**shift) for value in offset], np.int64)
    return LayerNormConstants(weight, bias, epsilon_in_codes(eps, len(gamma), input_scale), shift, gain)


def epsilon_in_codes(eps: float, width: int, input_scale: float) -> int:
    """Return what is added to ``C^2 variance`` of codes in the place of ``eps``."""
    epsilon = max(1, round(eps * (width / input_scale) ** 2))
    # Beyond this every channel is noise below eps, and the sum with the variance would leave 62 bits.
    return min(epsilon, 2**60)
