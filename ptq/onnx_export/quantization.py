"""Pairs of QuantizeLinear and DequantizeLinear, and integer initializers.

Names follow the quantization tools of ONNX Runtime, so that its debugger matches them with a float model:
``<name>_QuantizeLinear_Output`` and ``<name>_DequantizeLinear_Output`` for activations, ``<name>_quantized``,
``<name>_scale`` and ``<name>_zero_point`` for initializers.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ptq.onnx_export.builder import Array, NodeBuilder
from quantizers.codebook import CodebookQParams, carrier_table
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams


class Quantizer:
    """Write formats into a graph.

    Args:
        builder: where nodes go.
        unsigned: whether QuantizeLinear may make uint8.
    """

    def __init__(self, builder: NodeBuilder, *, unsigned: bool) -> None:
        self._builder, self._unsigned = builder, unsigned

    def quantize(self, tensor: str, qparams: UniformQParams, module: str) -> str:
        """Quantize a float tensor in a format of one scale; return the name of its codes."""
        source = self._clipped(tensor, qparams, module)
        codes = self._builder.fresh(f"{tensor}_QuantizeLinear_Output")
        return self._builder.node("QuantizeLinear", (source, *self._parameters(tensor, qparams)), codes, module)

    def dequantize(self, codes: str, qparams: UniformQParams, module: str) -> str:
        """Return the name of the values of codes in a format of one scale."""
        stem = codes.removesuffix("_QuantizeLinear_Output")
        result = self._builder.fresh(f"{stem}_DequantizeLinear_Output")
        return self._builder.node("DequantizeLinear", (codes, *self._parameters(stem, qparams)), result, module)

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
        return self.levels(relative, CodebookQParams(qparams.codebook, step, 0), module)

    def weight(self, codes: Array, scale: Array, axis: int, name: str, module: str) -> str:
        """Store the codes of a weight, with one scale for each channel of an axis; return its real values' name."""
        parameters = (
            self._builder.initializer(scale.astype(np.float32), f"{name}_scale"),
            self._builder.initializer(np.zeros(len(scale), np.int8), f"{name}_zero_point"),
        )
        return self._dequantized(codes.astype(np.int8), parameters, axis, name, module)

    def blocked_weight(self, codes: Array, scale: Array, block: int, name: str, module: str) -> str:
        """Store the codes (K, N) of a weight as int4; return its real values' name.

        The kernels of runtimes have a scale for each ``block`` codes of a column; those of one column are equal here.
        """
        scales = np.broadcast_to(scale.astype(np.float32), (len(codes) // block, len(scale)))
        stored = self._builder.int4(codes, f"{name}_quantized")
        inputs = (stored, self._builder.initializer(scales, f"{name}_scale"))
        result = self._builder.fresh(f"{name}_DequantizeLinear_Output")
        return self._builder.node("DequantizeLinear", inputs, result, module, axis=0, block_size=block)

    def bias(self, bias: Array, step: float, scale: Array, name: str, module: str) -> str:
        """Store a bias (N,) as int32 in steps of input step times weight scale; return its real values' name.

        ONNX Runtime adds these codes to its int32 sums and never reads the stored scale: any other step would
        be a silent error.
        """
        steps = np.float32(step) * scale.astype(np.float32)
        codes = np.rint(bias / steps.astype(np.float64)).astype(np.int32)
        parameters = (
            self._builder.initializer(steps, f"{name}_scale"),
            self._builder.initializer(np.zeros(len(codes), np.int32), f"{name}_zero_point"),
        )
        return self._dequantized(codes, parameters, 0, name, module)

    def levels(self, tensor: str, qparams: CodebookQParams, module: str) -> str:
        """Quantize a float tensor to steps of a level and replace each by the nearest level; return real values.

        Gather stands between the two ends of an ordinary pair, so that runtimes need to know nothing of codebooks.
        """
        if not self._unsigned:
            return self._float_levels(tensor, qparams, module)
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

    def _float_levels(self, tensor: str, qparams: CodebookQParams, module: str) -> str:
        """Do the same without codes: round to whole steps, and look the nearest level up as a real number."""
        ends = [self._builder.initializer(np.array(end, np.float32), f"level_{end}") for end in (0, 255)]
        scale = self._builder.initializer(np.array(qparams.scale, np.float32), f"{tensor}_scale")
        zero_point = self._builder.initializer(np.array(qparams.zero_point, np.float32), f"{tensor}_zero_point")
        x = self._builder.node("Div", (tensor, scale), self._builder.fresh(f"{tensor}_steps"), module)
        x = self._builder.node("Round", (x,), self._builder.fresh(f"{tensor}_rounded"), module)
        x = self._builder.node("Add", (x, zero_point), self._builder.fresh(f"{tensor}_shifted"), module)
        x = self._builder.node("Clip", (x, *ends), self._builder.fresh(f"{tensor}_carrier"), module)
        indices = self._builder.fresh(f"{tensor}_indices")
        self._builder.node("Cast", (x,), indices, module, to=TensorProto.INT32)
        values = (carrier_table(qparams.codebook).astype(np.float32) - qparams.zero_point) * np.float32(qparams.scale)
        table = self._builder.initializer(values.astype(np.float32), f"{tensor}_levels_table")
        return self._builder.node("Gather", (table, indices), self._builder.fresh(f"{tensor}_levels"), module, axis=0)

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

    def _parameters(self, stem: str, qparams: UniformQParams) -> tuple[str, str]:
        return (
            self._builder.initializer(np.array(qparams.scale[0], np.float32), f"{stem}_scale"),
            self._builder.initializer(np.array(qparams.zero_point, qparams.dtype), f"{stem}_zero_point"),
        )

    def _dequantized(self, codes: Array, parameters: tuple[str, str], axis: int, name: str, module: str) -> str:
        stored = self._builder.initializer(codes, f"{name}_quantized")
        result = self._builder.fresh(f"{name}_DequantizeLinear_Output")
        return self._builder.node("DequantizeLinear", (stored, *parameters), result, module, axis=axis)
