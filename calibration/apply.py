"""Fake quantization of a tensor in whatever format its site has."""

from __future__ import annotations

from torch import Tensor

from calibration.calibrated import QParams
from quantizers.codebook import CodebookQParams, fake_quantize_codebook
from quantizers.row_relative import RowRelativeQParams, fake_quantize_rows
from quantizers.shiftmax import ShiftmaxQParams, cut_off
from quantizers.uniform import fake_quantize


def apply(qparams: QParams, value: Tensor) -> Tensor:
    """Fake-quantize a tensor in its format."""
    if isinstance(qparams, RowRelativeQParams):
        return fake_quantize_rows(value, qparams)
    if isinstance(qparams, CodebookQParams):
        return fake_quantize_codebook(value, qparams)
    if isinstance(qparams, ShiftmaxQParams):
        return cut_off(value, qparams)
    return fake_quantize(value, qparams)
