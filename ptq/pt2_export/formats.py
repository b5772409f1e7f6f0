"""Formats as pairs of the standard operators ``torch.ops.quantized_decomposed``, and weights as codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

# Declares torch.ops.quantized_decomposed; torch has no public module that does no more than that.
import torch.ao.quantization.fx._decomposed
from torch import Tensor

from calibration.calibrated import QParams
from calibration.integerize.operands import OperandQParams
from ptq.onnx_export.layout import probability_format
from ptq.pt2_export.buffers import Buffer, Buffers
from quantizers.codebook import CodebookQParams, carrier_table
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams, quantize

#: Replaces a float tensor by the nearest values of a format.
Pair = Callable[[Tensor], Tensor]

_OPERATORS = torch.ops.quantized_decomposed


def pair(qparams: QParams, buffers: Buffers) -> Pair:
    """Return a function that quantizes and dequantizes, in a format of one scale."""
    if isinstance(qparams, CodebookQParams):
        return _levels(qparams, buffers)
    uniform = probability_format(qparams, 255) if isinstance(qparams, RowRelativeQParams) else qparams
    assert isinstance(uniform, UniformQParams), "published forms are refused before"
    # Shifted codes stand for the same values, and the kernels of oneDNN for convolutions take no int8.
    highest = uniform.qmax - uniform.qmin
    parameters = (uniform.scale[0], uniform.zero_point - uniform.qmin, 0, highest, torch.uint8)

    def apply(x: Tensor) -> Tensor:
        codes = _OPERATORS.quantize_per_tensor(x, *parameters)
        return _OPERATORS.dequantize_per_tensor(codes, *parameters)

    return apply


def row_levels(qparams: RowRelativeQParams, buffers: Buffers) -> Pair:
    """Return a function that divides each row by its largest probability and takes the nearest levels, 0 to 1.

    What is multiplied by them has to be divided by their sum.
    """
    nearest = _levels(CodebookQParams(qparams.codebook, float(np.float32(1 / qparams.peak)), 0), buffers)
    return lambda x: nearest(x / x.amax(-1, keepdim=True))


def weight(values: Tensor, qparams: UniformQParams, name: str, buffers: Buffers) -> Buffer:
    """Store a weight (N, ...) as int8 codes, with one scale for each output channel; return its real values."""
    codes = buffers.add(f"{name}_quantized", quantize(values, qparams).to(torch.int8))
    scale = buffers.add(f"{name}_scale", torch.tensor(qparams.scale, dtype=torch.float32))
    zero_point = buffers.add(f"{name}_zero_point", torch.zeros(len(values), dtype=torch.int32))
    limits = (0, qparams.qmin, qparams.qmax, torch.int8)
    return lambda: _OPERATORS.dequantize_per_channel(codes(), scale(), zero_point(), *limits)


def bias(values: Tensor, source: OperandQParams, layer: UniformQParams, name: str, buffers: Buffers) -> Buffer:
    """Store a bias (N,) as float32, in whole steps of input scale times weight scale."""
    step = np.float32(source.scales()[0]) * np.array(layer.scale, np.float32)
    codes = np.rint(values.numpy().astype(np.float64) / step.astype(np.float64)).astype(np.int32)
    return buffers.add(name, torch.from_numpy(codes.astype(np.float32) * step))


def _levels(qparams: CodebookQParams, buffers: Buffers) -> Pair:
    parameters = (qparams.scale, qparams.zero_point, 0, 255, torch.uint8)
    table = buffers.add(f"{qparams.codebook.family}_levels", torch.from_numpy(carrier_table(qparams.codebook)))

    def apply(x: Tensor) -> Tensor:
        carrier = _OPERATORS.quantize_per_tensor(x, *parameters)
        return _OPERATORS.dequantize_per_tensor(table()[carrier.to(torch.int64)], *parameters)

    return apply
