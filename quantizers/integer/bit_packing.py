"""Signed codes of a few bits as a dense run of bytes, for files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Widths below a byte that files hold.
NARROW_BITS = (2, 3, 4, 5, 6)


def narrowest(codes: npt.NDArray[np.generic]) -> int:
    """Return the smallest of :data:`NARROW_BITS` that holds all codes, or 8."""
    low, high = int(codes.min()), int(codes.max())
    return next((bits for bits in NARROW_BITS if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1)), 8)


def pack_bits(codes: npt.NDArray[np.int8], bits: int) -> npt.NDArray[np.uint8]:
    """Return the lowest ``bits`` bits of each code, one after the other, lowest bit first.

    Args:
        codes: any shape, in row-major order; each in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        bits: 2 to 8.

    Returns:
        uint8 ``(ceil(size * bits / 8),)``; unused bits of the last byte are 0.
    """
    planes = (codes.reshape(-1, 1).view(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack_bits(packed: npt.NDArray[np.generic], bits: int, count: int) -> npt.NDArray[np.int8]:
    """Return the first ``count`` codes that :func:`pack_bits` wrote.

    Raises:
        ValueError: the bytes are too few or too many for them, or unused bits are set.
    """
    if packed.ndim != 1 or packed.dtype != np.uint8 or len(packed) != -(-count * bits // 8):
        found = f"{packed.dtype.name} of shape {packed.shape}"
        raise ValueError(f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes, found {found}")
    flat = np.unpackbits(packed.view(np.uint8), bitorder="little")
    if flat[count * bits :].any():
        raise ValueError("bits after the last code are set")
    planes = flat[: count * bits].reshape(count, bits)
    unsigned = (planes.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(1)
    return np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned).astype(np.int8)
