"""Operands of products: codes of a uniform format, or levels of a codebook.

A codebook's levels are bytes with one scale and one zero point, so that a product reads them as it reads codes. They
come from a table of 256 entries: a function of one value writes levels where it would write codes; everything else
is first rounded to 8-bit codes in steps of a level, the carrier.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from quantizers.codebook import CodebookQParams, levels_of
from quantizers.uniform import UniformQParams, quantize

#: What an operand of a product may have.
OperandQParams = UniformQParams | CodebookQParams


def operand_codes(values: Tensor, qparams: OperandQParams) -> npt.NDArray[np.integer]:
    """Return what a program holds for real values: codes, or the levels of a codebook.

    Args:
        values: float32, any shape.
        qparams: the format.

    Returns:
        ``qparams.dtype``, same shape.
    """
    if isinstance(qparams, CodebookQParams):
        return levels_of(values, qparams)
    codes: npt.NDArray[np.integer] = quantize(values, qparams).numpy().astype(qparams.dtype)
    return codes
