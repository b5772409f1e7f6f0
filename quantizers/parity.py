"""What papers evaluate: 2^b + 1 values for b bits. For comparing with their tables only.

The published log2, log-sqrt2 (RepQ-ViT, arXiv 2212.08254) and AdaLog (arXiv 2407.12951) give all 2^b codes to powers
and flush what lies beyond the last one to zero as well; they round in the logarithmic domain. No b-bit code holds
that, so it returns floats and has no parameters object: nothing of it can reach an integer program.
The formats that can are in :mod:`quantizers.families`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantizers.adalog import R, check_q, table
from quantizers.codebook import check_bits
from quantizers.errors import DataError, UsageError

#: The lowest share that the official code of AdaLog takes a logarithm of.
_ADALOG_SMALLEST = 1e-15


def paper_fake_quantize(x: Tensor, family: str, bits: int, scale: float, parameter: float = 0.0) -> Tensor:
    """Return the published emulation: ``scale 2^(-k step)`` with ``k = round(-log2(x / scale) / step)``, zero beyond.

    ``step`` is 1 for log2, 1/2 for log-sqrt2 and q/37 for AdaLog, whose powers are those of its table. Values above
    ``scale`` saturate at it, values of zero or below become zero. AdaLog raises them to 1e-15 of the scale first, as
    its official code does: where 2^b codes reach that far, they become a tiny power instead.

    Args:
        x: floats of any shape, finite; the steepest powers need float64.
        family: ``log2``, ``log_sqrt2`` or ``adalog``.
        bits: 2 to 8.
        scale: the largest value, positive; 1 in AdaLog's softmax.
        parameter: q of AdaLog.

    Returns:
        Same shape and type; at most ``2^bits + 1`` different values.

    Raises:
        UsageError: another family, or a value outside its range.
        DataError: infinite values or NaN.
    """
    check_bits(bits)
    if not 0 < scale < math.inf:
        raise UsageError(f"scale is {scale}, expected a positive number")
    if not bool(x.isfinite().all()):
        raise DataError(f"{family} codes finite values only, got infinite ones or NaN")
    shares = (x / scale).clamp(0, 1)
    if family == "adalog":
        check_q(parameter)
        codes = (-shares.clamp(min=_ADALOG_SMALLEST).log2() * R / parameter).round()
        powers = table(bits, int(parameter))
    elif family in ("log2", "log_sqrt2"):
        per_factor = 1 if family == "log2" else 2
        codes = (-shares.log2() * per_factor).round()
        powers = tuple(2.0 ** (-k / per_factor) for k in range(1 << bits))
    else:
        raise UsageError(f"the published emulation has log2, log_sqrt2 and adalog, got {family!r}")
    last = (1 << bits) - 1
    values = torch.tensor([*powers, 0.0], dtype=torch.float64)[codes.clamp(0, last + 1).to(torch.int64)]
    return (values * scale).to(x.dtype)
