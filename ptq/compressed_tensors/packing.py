"""Codes of 2 and 4 bits in int32 words, as compressed-tensors packs them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantizers.integer.bit_packing import pack_bits

#: Widths that all versions of the library pack alike: codes of other widths either cross the ends of words or do not.
PACKED_BITS = (2, 4)
_WORD = 32


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Return each row in words: code plus ``2^(bits - 1)``, one after the other, lowest bits first.

    Args:
        codes: integers (N, K) from ``-2^(bits - 1)`` to ``2^(bits - 1) - 1``.
        bits: one of :data:`PACKED_BITS`.

    Returns:
        int32 ``(N, ceil(K bits / 32))``; unused bits of the last word are 0.
    """
    rows, width = codes.shape
    unsigned = codes.numpy().astype(np.int8) + np.int8(1 << (bits - 1))
    padded = np.pad(unsigned, ((0, 0), (0, -width % (_WORD // bits))))
    return torch.from_numpy(pack_bits(padded, bits).view("<i4").astype(np.int32).reshape(rows, -1))
