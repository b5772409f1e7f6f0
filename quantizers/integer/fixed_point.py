"""Real ratios as an int32 multiplier and a right shift (I-ViT's dyadic numbers, arXiv 2207.01405, eq. 5).

One shift serves a whole tensor, so that kernels shift by a constant; the largest multiplier uses all
31 bits and smaller channels lose only bits that lie below the rounding of the result.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantizers.errors import ProgramError

#: A shift of at least 1 leaves a half to add; beyond 62 the half would not fit int64.
MIN_SHIFT, MAX_SHIFT = 1, 62


def choose_shift(largest: float, bits: int = 31) -> int:
    """Return the shift with which ``round(largest * 2^shift)`` uses ``bits`` bits, within [1, 62].

    Args:
        largest: largest absolute ratio, finite and non-negative; 0 gives the largest shift.
        bits: magnitude bits of the multiplier.

    Raises:
        ProgramError: the ratio is not finite or needs more than ``bits`` bits even at shift 1.
    """
    if not np.isfinite(largest):
        raise ProgramError(f"a rescaling ratio is {largest}, expected a finite number; look for a zero scale")
    if largest == 0:
        return MAX_SHIFT
    _, exponent = np.frexp(largest)
    # Rounding up at the top of the binade reaches 2^bits, one more than an int32 multiplier holds.
    shift = bits - int(exponent)
    if shift <= MAX_SHIFT and round(largest * 2.0**shift) >= 2**bits:
        shift -= 1
    if shift < MIN_SHIFT:
        raise ProgramError(
            f"a rescaling ratio of {largest:g} is too large for a {bits}-bit multiplier; "
            "the scales on its two sides differ too much"
        )
    return min(shift, MAX_SHIFT)


def to_fixed_point(ratio: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], int]:
    """Express ratios as ``multiplier / 2^shift`` with one shift.

    Args:
        ratio: real ratios, any shape, either sign.

    Returns:
        int32 multipliers of the same shape (at least one axis) and the common shift in [1, 62].
    """
    values = np.atleast_1d(np.asarray(ratio, np.float64))
    shift = choose_shift(float(np.max(np.abs(values), initial=0.0)))
    return np.rint(values * 2.0**shift).astype(np.int32), shift


def to_common_fixed_point(*ratios: npt.ArrayLike) -> tuple[tuple[npt.NDArray[np.int32], ...], int]:
    """Express several arrays of ratios with one common shift, as :func:`to_fixed_point` does for one."""
    arrays = [np.atleast_1d(np.asarray(r, np.float64)) for r in ratios]
    shift = choose_shift(max(float(np.max(np.abs(a), initial=0.0)) for a in arrays))
    return tuple(np.rint(a * 2.0**shift).astype(np.int32) for a in arrays), shift
