"""Linear, convolution and matrix product: the operators whose operands are integers.

ONNX Runtime replaces a product and its DequantizeLinear neighbours by one integer kernel only where

- the pairs touch the product, so every view of an operand stands before its QuantizeLinear;
- the bias is int32 and is part of the Gemm: behind a MatMul on three axes of unknown batch it is added in float;
- no QuantizeLinear has several readers: an int8 pair is shifted to uint8, the type of the kernels, only where
  it has one. Equal nodes are merged before that, so each QuantizeLinear has a scale and a zero point of its own;
- each operand of a product of two activations has one scale. ONNX Runtime makes one integer kernel of a product of
  operands with an axis of scales, which it then cannot run. Scales of heads are factors of the product, so they are
  divided out before a QuantizeLinear of scale 1 and multiplied in after the product: the same codes, on integers;
- a Conv has a QuantizeLinear behind it. Residual streams have none here, so a convolution that cuts its input
  into patches is written as a Gemm on them, and any other one runs on dequantized values.
"""

from __future__ import annotations

import math

import numpy as np

from calibration.calibrated import Calibrated, QParams
from calibration.graph import Operation, cuts_patches
from ptq.onnx_export.builder import Array
from ptq.onnx_export.operands import Operand, fold, write_operand
from ptq.onnx_export.writer import GraphWriter
from quantizers.codebook import CodebookQParams
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams, quantize

#: Widest weights that are stored as int4, and the numbers of them that may share a scale, the fastest first.
_INT4_BITS = 4
_BLOCKS = (128, 64, 32, 16)


def write_linear(writer: GraphWriter, operation: Operation) -> None:
    """Write a linear as a Gemm on the rows of its input, with the weight (N, K) of the checkpoint, or as a MatMul."""
    if _has_int4_kernel(writer, operation):
        writer.result(operation, "Add", _int4_product_and_bias(writer, operation))
        return
    if not writer.layout.gemm:
        x = write_operand(writer, operation, 0).name
        writer.result(operation, "Add", _product_and_bias(writer, operation, x, _codes(writer, operation)))
        return

    def rows(tensor: str) -> str:
        return writer.reshaped(operation, "rows", tensor, writer.shapes[operation.inputs[0]][-1:])

    x = write_operand(writer, operation, 0, rows).name
    operands = (x, *_weight_and_bias(writer, operation, _codes(writer, operation)))
    if len(operation.shape) == 1:
        writer.result(operation, "Gemm", operands, transB=1)
        return
    writer.reshaped_result(operation, writer.rows_result(operation, operands))


def write_conv2d(writer: GraphWriter, operation: Operation) -> None:
    """Write a convolution: as a product with patches where it cuts some, otherwise as a Conv."""
    if cuts_patches(operation, writer.shapes):
        _write_patches(writer, operation)
        return
    x = write_operand(writer, operation, 0).name
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
    """Write a product of two activations.

    Probabilities in uneven levels are relative to the largest of their row, so that each row of the product is divided
    by their sum.
    """
    rank = len(writer.shapes[operation.inputs[1]]) + 1
    axes = (*range(rank - 2), rank - 1, rank - 2)

    def transposed(tensor: str) -> str:
        return writer.step(operation, "transposed", "Transpose", (tensor,), perm=axes)

    scale = writer.only_scaled(operation)
    by = 1.0 if scale is None else scale.real("factor")
    rows, total = writer.formats[operation.name, 0], None
    if isinstance(rows, RowRelativeQParams):
        levels = writer.quantizer.row_levels(writer.value(operation.inputs[0]), rows, operation.module)
        left = Operand(levels, np.array([by], np.float32))
        total = writer.step(operation, "total", "ReduceSum", (levels, writer.builder.integers((-1,))), keepdims=1)
    else:
        left = write_operand(writer, operation, 0, factor=by)
    right = write_operand(writer, operation, 1, *([transposed] if operation.integer("transpose_b") else []))
    factor = left.factor * right.factor
    # What is done with the product, in order; the last makes the result.
    steps: list[tuple[str, tuple[str, ...]]] = [("MatMul", (right.name,))]
    if total is not None:
        steps.append(("Div", (total,)))
    if factor.size > 1 or factor.item() != 1:
        steps.append(("Mul", (writer.builder.initializer(factor, f"{operation.name}_factor"),)))
    tensor = left.name
    for kind, others in steps[:-1]:
        tensor = writer.step(operation, "product", kind, (tensor, *others))
    kind, others = steps[-1]
    writer.result(operation if scale is None else scale, kind, (tensor, *others))


def _write_patches(writer: GraphWriter, operation: Operation) -> None:
    channels, height, width = operation.shape
    depth, *kernel = writer.shapes[operation.inputs[1]][1:]
    width_of_rows = depth * math.prod(kernel)

    def patches(tensor: str) -> str:
        x = writer.reshaped(operation, "grid", tensor, (depth, height, kernel[0], width, kernel[1]))
        x = writer.step(operation, "patches", "Transpose", (x,), perm=(0, 2, 4, 1, 3, 5))
        extents = (width_of_rows,) if writer.layout.gemm else (height * width, width_of_rows)
        return writer.reshaped(operation, "rows", x, extents)

    x = write_operand(writer, operation, 0, patches).name
    codes = _codes(writer, operation).reshape(channels, -1)
    if writer.layout.gemm:
        x = writer.rows_result(operation, (x, *_weight_and_bias(writer, operation, codes)))
    else:
        x = writer.step(operation, "sum", "Add", _product_and_bias(writer, operation, x, codes))
    x = writer.reshaped(operation, "channels_last", x, (height, width, channels))
    writer.result(operation, "Transpose", (x,), perm=(0, 3, 1, 2))


def _product_and_bias(writer: GraphWriter, operation: Operation, x: str, codes: Array) -> tuple[str, str]:
    """Write a MatMul with a weight (N, K), stored as (K, N); return its name and that of the bias."""
    weight, bias = _weight_and_bias(writer, operation, codes.T, 1)
    return writer.step(operation, "product", "MatMul", (x, weight)), bias


def has_int4_weights(calibrated: Calibrated) -> bool:
    """Whether a linear has weights that can be stored as int4."""
    formats, constants = calibrated.by_edge(), calibrated.graph.constants
    return any(
        _fits_int4(formats[operation.name, 1], constants[operation.inputs[1]].shape[1])
        for operation in calibrated.graph.operations
        if operation.op == "linear"
    )


def _has_int4_kernel(writer: GraphWriter, operation: Operation) -> bool:
    return writer.int4 and _fits_int4(_weight(writer, operation), writer.shapes[operation.inputs[1]][1])


def _fits_int4(qparams: QParams, depth: int) -> bool:
    return qparams.bits <= _INT4_BITS and depth % _BLOCKS[-1] == 0


def _int4_product_and_bias(writer: GraphWriter, operation: Operation) -> tuple[str, str]:
    """Write a MatMul of float values with a weight in 4 bits; return its name and that of the float bias.

    The kernels for 4-bit weights read float activations.
    """
    x, weight, bias = operation.inputs
    codes, (scale, values) = _codes(writer, operation).T, _scale_and_bias(writer, operation)
    block = next(size for size in _BLOCKS if len(codes) % size == 0)
    stored = writer.quantizer.blocked_weight(codes, scale, block, weight, operation.module)
    product = writer.step(operation, "product", "MatMul", (writer.value(x), stored))
    return product, writer.builder.initializer(values.astype(np.float32), bias)


def _codes(writer: GraphWriter, operation: Operation) -> Array:
    return quantize(writer.graph.constants[operation.inputs[1]], _weight(writer, operation)).numpy()


def _weight(writer: GraphWriter, operation: Operation) -> UniformQParams:
    qparams = writer.formats[operation.name, 1]
    assert isinstance(qparams, UniformQParams), operation.name
    return qparams


def _weight_and_bias(writer: GraphWriter, operation: Operation, codes: Array, axis: int = 0) -> tuple[str, str]:
    source, (scale, bias) = writer.formats[operation.name, 0], _scale_and_bias(writer, operation)
    assert isinstance(source, UniformQParams | CodebookQParams), operation.name
    _, weight_name, bias_name = operation.inputs
    weight = writer.quantizer.weight(codes, scale, axis, weight_name, operation.module)
    if not writer.layout.integer_bias:
        return weight, writer.builder.initializer(bias.astype(np.float32), bias_name)
    return weight, writer.quantizer.bias(bias, float(source.scales()[0]), scale, bias_name, operation.module)


def _scale_and_bias(writer: GraphWriter, operation: Operation) -> tuple[Array, Array]:
    """Return the scales of a weight (N,) and the bias (N,), float64, in steps of the result where that is folded."""
    scale = np.array(_weight(writer, operation).scale)
    bias = writer.array(operation.inputs[2]).astype(np.float64)
    folded = fold(writer, operation)
    return (scale, bias) if folded is None else (scale / folded.scale, bias / folded.scale)
