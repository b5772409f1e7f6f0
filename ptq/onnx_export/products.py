"""Linear, convolution and matrix product: the operators whose operands are integers.

ONNX Runtime replaces a product and its DequantizeLinear neighbours by one integer kernel only where

- the pairs touch the product, so every view of an operand stands before its QuantizeLinear;
- the bias is int32 and is part of the Gemm: behind a MatMul on three axes of unknown batch it is added in float;
- no QuantizeLinear has several readers: an int8 pair is shifted to uint8, the type of the kernels, only where
  it has one. Equal nodes are merged before that, so each linear has a view of its input of its own;
- each operand of a product of two activations has one scale. ONNX Runtime makes one integer kernel of a product of
  operands with an axis of scales, which it then cannot run. Scales of heads are factors of the product, so they are
  divided out before a QuantizeLinear of scale 1 and multiplied in after the product: the same codes, on integers;
- a Conv has a QuantizeLinear behind it. Residual streams have none here, so a convolution that cuts its input
  into patches is written as a Gemm on them, and any other one runs on dequantized values.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from calibration.graph import Operation, cuts_patches
from ptq.onnx_export.builder import Array
from ptq.onnx_export.writer import GraphWriter
from quantizers.codebook import CodebookQParams
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams, quantize


def write_linear(writer: GraphWriter, operation: Operation) -> None:
    """Write a linear as a Gemm on the rows of its input, with the weight (N, K) as the checkpoint has it."""
    source = operation.inputs[0]
    # The name makes the initializer this operation's own, and with it the view.
    extents = np.array([-1, writer.shapes[source][-1]], np.int64)
    inputs = (writer.value(source), writer.builder.initializer(extents, f"{operation.name}_rows_shape"))
    rows = writer.step(operation, "rows", "Reshape", inputs)
    operands = (
        _activation(writer, operation, 0, rows),
        *_weight_and_bias(writer, operation, _codes(writer, operation)),
    )
    if len(operation.shape) == 1:
        writer.result(operation, "Gemm", operands, transB=1)
        return
    product = writer.step(operation, "product", "Gemm", operands, transB=1)
    writer.result(operation, "Reshape", (product, writer.builder.integers((-1, *operation.shape))))


def write_conv2d(writer: GraphWriter, operation: Operation) -> None:
    """Write a convolution: as a Gemm where it cuts patches, otherwise as a Conv."""
    if cuts_patches(operation, writer.shapes):
        _write_patches(writer, operation)
        return
    x = _activation(writer, operation, 0, writer.value(operation.inputs[0]))
    top, left = operation.integers("padding")
    writer.result(
        operation,
        "Conv",
        (x, *_weight_and_bias(writer, operation, _codes(writer, operation))),
        strides=operation.integers("stride"),
        pads=(top, left, top, left),
        dilations=operation.integers("dilation"),
        group=operation.integer("groups"),
    )


def write_matmul(writer: GraphWriter, operation: Operation) -> None:
    """Write a product of two activations, each quantized just before it.

    Probabilities in uneven levels are relative to the largest of their row, so that each row of the product is divided
    by their sum.
    """
    left, right = (writer.value(name) for name in operation.inputs)
    if operation.integer("transpose_b"):
        rank = len(writer.shapes[operation.inputs[1]]) + 1
        axes = (*range(rank - 2), rank - 1, rank - 2)
        right = writer.step(operation, "transposed", "Transpose", (right,), perm=axes)
    rows = writer.formats[operation.name, 0]
    if isinstance(rows, RowRelativeQParams) and rows.codebook.family != "uniform":
        weights = writer.quantizer.row_levels(left, rows, operation.module)
        values, factor = _operand(writer, operation, 1, right)
        product = writer.step(operation, "product", "MatMul", (weights, values))
        total = writer.step(operation, "total", "ReduceSum", (weights, writer.builder.integers((-1,))), keepdims=1)
        if factor.size == 1:
            writer.result(operation, "Div", (product, total))
            return
        product = writer.step(operation, "normalized", "Div", (product, total))
        writer.result(operation, "Mul", (product, writer.builder.initializer(factor, f"{operation.name}_head_scales")))
        return
    (left, left_factor), (right, right_factor) = (
        _operand(writer, operation, position, tensor) for position, tensor in enumerate((left, right))
    )
    factor = left_factor * right_factor
    if factor.size == 1:
        writer.result(operation, "MatMul", (left, right))
        return
    product = writer.step(operation, "product", "MatMul", (left, right))
    writer.result(operation, "Mul", (product, writer.builder.initializer(factor, f"{operation.name}_head_scales")))


def _operand(writer: GraphWriter, operation: Operation, position: int, tensor: str) -> tuple[str, Array]:
    """Quantize an operand of a product; return it and what the product has yet to be multiplied by, for each head."""
    qparams = writer.formats[operation.name, position]
    if not isinstance(qparams, UniformQParams) or len(qparams.scale) == 1:
        return _activation(writer, operation, position, tensor), np.ones(1, np.float32)
    scales = qparams.scales().astype(np.float32)
    divisor = writer.builder.initializer(scales, f"{tensor}_head_scales")
    steps = writer.step(operation, f"steps_{position}", "Div", (tensor, divisor))
    unit = dataclasses.replace(qparams, scale=(1.0,))
    return writer.quantizer.activation(steps, unit, operation.module), scales


def _write_patches(writer: GraphWriter, operation: Operation) -> None:
    integers = writer.builder.integers
    channels, height, width = operation.shape
    depth, *kernel = writer.shapes[operation.inputs[1]][1:]
    grid = integers((0, depth, height, kernel[0], width, kernel[1]))
    x = writer.step(operation, "grid", "Reshape", (writer.value(operation.inputs[0]), grid))
    x = writer.step(operation, "patches", "Transpose", (x,), perm=(0, 2, 4, 1, 3, 5))
    x = writer.step(operation, "rows", "Reshape", (x, integers((-1, depth * math.prod(kernel)))))
    codes = _codes(writer, operation).reshape(channels, -1)
    operands = (_activation(writer, operation, 0, x), *_weight_and_bias(writer, operation, codes))
    x = writer.step(operation, "product", "Gemm", operands, transB=1)
    x = writer.step(operation, "channels_last", "Reshape", (x, integers((-1, height, width, channels))))
    writer.result(operation, "Transpose", (x,), perm=(0, 3, 1, 2))


def _activation(writer: GraphWriter, operation: Operation, position: int, tensor: str) -> str:
    return writer.quantizer.activation(tensor, writer.formats[operation.name, position], operation.module)


def _weight(writer: GraphWriter, operation: Operation) -> UniformQParams:
    qparams = writer.formats[operation.name, 1]
    assert isinstance(qparams, UniformQParams), operation.name
    return qparams


def _codes(writer: GraphWriter, operation: Operation) -> Array:
    return quantize(writer.graph.constants[operation.inputs[1]], _weight(writer, operation)).numpy()


def _weight_and_bias(writer: GraphWriter, operation: Operation, codes: Array) -> tuple[str, str]:
    source, weight = writer.formats[operation.name, 0], _weight(writer, operation)
    assert isinstance(source, UniformQParams | CodebookQParams), operation.name
    _, weight_name, bias_name = operation.inputs
    return (
        writer.quantizer.weight(codes, weight, weight_name, operation.module),
        writer.quantizer.bias(writer.array(bias_name), source, weight, bias_name, operation.module),
    )
