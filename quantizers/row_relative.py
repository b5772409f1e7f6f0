"""Attention probabilities relative to the largest of their row, un-normalized until after the product with V.

``e = round(levels exp(score - max))`` holds a row in ``levels + 1`` codes whatever its largest probability is;
``sum e v / sum e`` divides once for each output row, so that no mass is lost to rounding (DESIGN: corrected
softmax; the published int8 form of I-ViT, arXiv 2207.01405 section 3.3, floors ``p * 2^7`` instead).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from quantizers.rounding import round_half_even


@dataclass(frozen=True, slots=True)
class RowRelativeQParams:
    """Probabilities in ``levels + 1`` codes, zero among them.

    Args:
        levels: code of a row's largest probability, ``2^bits - 1``.
    """

    levels: int

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.levels.bit_length()


def fake_quantize_rows(probabilities: Tensor, qparams: RowRelativeQParams) -> Tensor:
    """Quantize each row (last axis) relative to its maximum and normalize it again.

    Args:
        probabilities: float32 (..., keys), rows that sum to 1.
        qparams: number of levels.
    """
    peak = probabilities.amax(-1, keepdim=True)
    codes = round_half_even(probabilities / peak * qparams.levels)
    return codes / codes.sum(-1, keepdim=True)


def exponential_table(score_scale: float, qparams: RowRelativeQParams) -> npt.NDArray[np.uint8]:
    """Return uint8[256]: entry d is the code of a score that lies d steps below its row's maximum.

    Args:
        score_scale: real value of one step of the score codes.
        qparams: number of levels.
    """
    distances = np.arange(256, dtype=np.float64)
    return np.rint(qparams.levels * np.exp(-score_scale * distances)).astype(np.uint8)
