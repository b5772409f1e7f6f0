"""The integer arithmetic of I-ViT (Li and Gu, ICCV 2023, arXiv 2207.01405) on Python integers.

Powers of two by shifts, the paper's replacement of ``exp`` (section 3.3): with the scale S of the input folded into
``I0``, the inverse scale in codes,

    p = d + (d >> 1) - (d >> 4)          d log2(e), the slope 1.4427 replaced by 1.4375
    p = max(p, -window I0)               nothing below 2^-window is told apart
    k = floor(-p / I0),  r = p + k I0    whole and fractional part: -I0 < r <= 0
    e = floor((r / 2 + I0) 2^(window-k)) 2^f replaced by 1 + f / 2 on (-1, 0]

What the operators ``shiftmax``, ``shift_gelu`` and ``i_layer_norm`` make of it stands in :mod:`quantizers.integer.ops`.
"""

from __future__ import annotations

import math

from quantizers.errors import ProgramError

#: Numerator of the reciprocals of sums and deviations: the largest int32.
RECIPROCAL = 2**31 - 1
#: Bits below one that the exponentials keep: ``n`` of the official code, "sufficiently large".
SHIFTMAX_WINDOW, SHIFT_GELU_WINDOW = 15, 23
#: Width of the sigmoid inside ShiftGELU: codes of 2^-7.
SIGMOID_BITS = 8
#: GELU is taken as ``x sigmoid(1.702 x)``.
SIGMOID_SLOPE = 1.702
#: Steps of Newton's iteration, in the paper and in the code.
NEWTON_ITERATIONS = 10
#: The start of the official code is 2^16; the paper's is 2^floor(bits / 2), which this value of ``start`` stands for.
CODE_START, PAPER_START = 16, -1
#: Fraction bits of a normalized value: it is worth ``sqrt(C) / 2^30``.
NORMALIZED_BITS = 30


def inverse_scale(scale: float) -> int:
    """Return ``I0 = ceil(1 / scale)``, at least 1, as the official code computes it; the paper rounds instead.

    Args:
        scale: real value of one step of the codes, positive.

    Raises:
        ProgramError: a scale below 2^-24, whose inverse leaves the range of the operators.
    """
    if not scale >= 2.0**-24:
        raise ProgramError(
            f"the published exponential needs a scale of at least 2^-24, got {scale}; use 'nonlinear: corrected'"
        )
    return max(1, math.ceil(1 / scale))


def shift_exponential(distance: int, inverse: int, window: int) -> int:
    """Return ``e``, about ``exp(distance S) I0 2^window``, capped where every sum is: at 2^31 or more.

    Args:
        distance: in codes; the published softmax has none above 0, ShiftGELU has where a whole row is negative.
        inverse: ``I0``.
        window: bits below one.
    """
    power = max(distance + (distance >> 1) - (distance >> 4), -window * inverse)
    whole = -power // inverse
    rest = power + whole * inverse
    # From a shift of 31 on the value is 2^31 or more, and sums are clipped to 2^31 - 1.
    return ((rest + 2 * inverse) << min(window - whole, 31)) >> 1


def newton_root(value: int, start: int, iterations: int) -> int:
    """Return the published integer square root: a fixed number of steps of ``k = (k + value // k) >> 1``.

    Args:
        value: not negative.
        start: exponent of the first k, or :data:`PAPER_START`.
        iterations: number of steps; from one step on the result is at least ``floor(sqrt(value))``.
    """
    root = 1 << (max(value, 1).bit_length() // 2 if start == PAPER_START else start)
    for _ in range(iterations):
        root = max(1, (root + value // root) >> 1)
    return root
