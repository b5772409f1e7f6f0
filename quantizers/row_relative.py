"""Attention probabilities relative to the largest of their row, un-normalized until after the product with V.

``e = nearest level of M exp(score - max)``, M the largest level, holds a row in a codebook whatever its largest
probability is; ``sum e v / sum e`` divides once for each output row, so that no mass is lost to rounding (DESIGN:
corrected softmax; the published int8 form of I-ViT, arXiv 2207.01405 section 3.3, floors ``p * 2^7`` instead).

The levels are uniform (M = 2^b - 1) or those of any other family (M = 255): the program holds them in the table of
exponentials, so that every codebook costs the same. Ties go to the even level where levels are uniform, as in every
rounding of real values to codes, and to the lower level of other codebooks, as in :mod:`quantizers.codebook`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from quantizers.codebook import Codebook, CodebookQParams, fake_quantize_codebook, nearest_levels
from quantizers.rounding import round_half_even


@dataclass(frozen=True, slots=True)
class RowRelativeQParams:
    """Probabilities in the levels of a codebook, zero among them.

    Args:
        codebook: the levels; the last one is a row's largest probability.
    """

    codebook: Codebook

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.codebook.bits

    @property
    def peak(self) -> int:
        """Level of a row's largest probability, M."""
        return self.codebook.levels[-1]


def fake_quantize_rows(probabilities: Tensor, qparams: RowRelativeQParams) -> Tensor:
    """Quantize each row (last axis) relative to its maximum and normalize it again.

    Args:
        probabilities: float32 (..., keys), rows that sum to 1.
        qparams: the levels.

    Raises:
        DataError: infinite probabilities or NaN, for levels that are not uniform.
    """
    relative = probabilities / probabilities.amax(-1, keepdim=True) * qparams.peak
    if qparams.codebook.family == "uniform":
        levels = round_half_even(relative)
    else:
        levels = fake_quantize_codebook(relative, CodebookQParams(qparams.codebook, 1.0, 0))
    return levels / levels.sum(-1, keepdim=True)


def exponential_table(score_scale: float, qparams: RowRelativeQParams) -> npt.NDArray[np.uint8]:
    """Return uint8[256]: entry d is the level of a score that lies d steps below its row's maximum.

    Args:
        score_scale: real value of one step of the score codes.
        qparams: the levels.
    """
    distances = np.arange(256, dtype=np.float64)
    relative = qparams.peak * np.exp(-score_scale * distances)
    if qparams.codebook.family == "uniform":
        return np.rint(relative).astype(np.uint8)
    return nearest_levels(relative, qparams.codebook)
