"""Pairs of QuantizeLinear and DequantizeLinear, and integer initializers.

Names follow the quantization tools of ONNX Runtime, so that its debugger matches them with a float model:
``<name>_QuantizeLinear_Output`` and ``<name>_DequantizeLinear_Output`` for activations, ``<name>_quantized``,
``<name>_scale`` and ``<name>_zero_point`` for initializers.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from calibration.calibrated import QParams
from calibration.integerize.operands import OperandQParams
from ptq.onnx_export.builder import Array, NodeBuilder
from quantizers.codebook import CodebookQParams, carrier_table
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams


class Quantizer:
    """Write formats into a graph."""

    def __init__(self, builder: NodeBuilder) -> None:
        self._builder = builder

    def activation(self, tensor: str, qparams: QParams, module: str) -> str:
        """Quantize and dequantize a float tensor; return the name of the result."""
        if isinstance(qparams, CodebookQParams):
            return self._levels(tensor, qparams, module)
        uniform = probability_format(qparams) if isinstance(qparams, RowRelativeQParams) else qparams
        assert isinstance(uniform, UniformQParams), "published forms are refused before"
        parameters = (
            self._builder.initializer(np.array(uniform.scale[0], np.float32), f"{tensor}_scale"),
            self._builder.initializer(np.array(uniform.zero_point, uniform.dtype), f"{tensor}_zero_point"),
        )
        # A probability is at most 1, the highest code, so a narrower format of it needs no clipping.
        source = tensor if uniform is not qparams else self._clipped(tensor, uniform, module)
        codes = self._builder.fresh(f"{tensor}_QuantizeLinear_Output")
        self._builder.node("QuantizeLinear", (source, *parameters), codes, module)
        result = self._builder.fresh(f"{tensor}_DequantizeLinear_Output")
        return self._builder.node("DequantizeLinear", (codes, *parameters), result, module)

    def row_levels(self, probabilities: str, qparams: RowRelativeQParams, module: str) -> str:
        """Divide each row by its largest probability and take the nearest levels, 0 to 1; return their name.

        What is multiplied by them has to be divided by their sum.
        """
        axes = self._builder.integers((-1,))
        largest = self._builder.fresh(f"{probabilities}_largest")
        self._builder.node("ReduceMax", (probabilities, axes), largest, module, keepdims=1)
        relative = self._builder.fresh(f"{probabilities}_relative")
        self._builder.node("Div", (probabilities, largest), relative, module)
        step = float(np.float32(1 / qparams.peak))
        return self._levels(relative, CodebookQParams(qparams.codebook, step, 0), module)

    def weight(self, codes: Array, qparams: UniformQParams, name: str, module: str) -> str:
        """Store the codes (N, ...) of a weight, one scale for each output channel; return its real values' name."""
        parameters = (
            self._builder.initializer(np.array(qparams.scale, np.float32), f"{name}_scale"),
            self._builder.initializer(np.zeros(len(codes), np.int8), f"{name}_zero_point"),
        )
        return self._dequantized(codes.astype(np.int8), parameters, name, module)

    def bias(self, bias: Array, source: OperandQParams, weight: UniformQParams, name: str, module: str) -> str:
        """Store a bias (N,) as int32 in steps of input scale times weight scale; return its real values' name.

        ONNX Runtime adds these codes to its int32 sums and never reads the stored scale: any other step would
        be a silent error.
        """
        scale = np.float32(source.scales()[0]) * np.array(weight.scale, np.float32)
        codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64)).astype(np.int32)
        parameters = (
            self._builder.initializer(scale, f"{name}_scale"),
            self._builder.initializer(np.zeros(len(codes), np.int32), f"{name}_zero_point"),
        )
        return self._dequantized(codes, parameters, name, module)

    def _levels(self, tensor: str, qparams: CodebookQParams, module: str) -> str:
        """Quantize a float tensor to steps of a level and replace each by the nearest level; return real values.

        Gather stands between the two ends of an ordinary pair, so that runtimes need to know nothing of codebooks.
        """
        parameters = (
            self._builder.initializer(np.array(qparams.scale, np.float32), f"{tensor}_scale"),
            self._builder.initializer(np.array(qparams.zero_point, np.uint8), f"{tensor}_zero_point"),
        )
        carrier = self._builder.fresh(f"{tensor}_QuantizeLinear_Output")
        self._builder.node("QuantizeLinear", (tensor, *parameters), carrier, module)
        # Gather takes indices of 32 bits or more.
        indices = self._builder.fresh(f"{tensor}_indices")
        self._builder.node("Cast", (carrier,), indices, module, to=TensorProto.INT32)
        table = self._builder.initializer(carrier_table(qparams.codebook), f"{qparams.codebook.family}_levels")
        levels = self._builder.fresh(f"{tensor}_levels")
        self._builder.node("Gather", (table, indices), levels, module, axis=0)
        result = self._builder.fresh(f"{tensor}_DequantizeLinear_Output")
        return self._builder.node("DequantizeLinear", (levels, *parameters), result, module)

    def _clipped(self, tensor: str, qparams: UniformQParams, module: str) -> str:
        """Clip to what a narrow format represents: QuantizeLinear saturates at the ends of its type only."""
        limits = np.iinfo(qparams.dtype)
        if qparams.qmin <= limits.min and qparams.qmax >= limits.max:
            return tensor
        ends = np.array([qparams.qmin, qparams.qmax], np.float32) - np.float32(qparams.zero_point)
        low, high = ends * np.float32(qparams.scale[0])
        inputs = (
            tensor,
            self._builder.initializer(np.array(low), f"{tensor}_low"),
            self._builder.initializer(np.array(high), f"{tensor}_high"),
        )
        return self._builder.node("Clip", inputs, self._builder.fresh(f"{tensor}_clipped"), module)

    def _dequantized(self, codes: Array, parameters: tuple[str, str], name: str, module: str) -> str:
        stored = self._builder.initializer(codes, f"{name}_quantized")
        result = self._builder.fresh(f"{name}_DequantizeLinear_Output")
        return self._builder.node("DequantizeLinear", (stored, *parameters), result, module, axis=0)


def probability_format(qparams: RowRelativeQParams) -> UniformQParams:
    """Return the format of a softmax output: codes 0 to the largest level for probabilities 0 to 1.

    Runtimes fuse attention only around a fixed scale with zero point 0, which leaves no place for a maximum
    of each row. uint8 keeps the one bit that int8 would lose to signs that probabilities do not have.
    """
    return UniformQParams((float(np.float32(1 / qparams.peak)),), 0, 0, qparams.peak)
