"""The published operators of I-ViT: softmax and GELU by powers of two, LayerNorm with Newton's square root.

An 8-bit row has 256 distances from its largest code, so the exponentials are a table, computed when the kernel is
emitted by the arithmetic of :mod:`quantizers.integer.ivit`; the bits are those of the shifts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizers.integer.ivit import PAPER_START, RECIPROCAL, shift_exponential
from quantizers.integer.program import Node
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal, lowest, minus, saturate, shift_round
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.kernels.shared.softmax import largest_code
from tvm_backend.targets import Target


def _variable(value: Expr) -> Buffer:
    """Hold an int64 in a local variable, which a loop may update."""
    buffer = local(1, "int64")
    script().buffer_store(buffer, value, [0])
    return buffer


def _quotient(numerator: Expr, denominator: Expr) -> Expr:
    """Divide non-negative int64 by positive ones, where truncation is the floor."""
    return import_tvm("tvm.tirx").truncdiv(numerator, denominator)


def reciprocal(total: Expr) -> Expr:
    """Return what a row's int64 exponentials are multiplied with, given their sum."""
    largest = literal(RECIPROCAL, "int64")
    return _quotient(largest, script().min(total, largest))


def _exponentials(node: Node, distances: range) -> Array:
    """Return the exponentials of some distances, int64."""
    inverse, window = node.integer("inverse_scale"), node.integer("window")
    return np.array([shift_exponential(distance, inverse, window) for distance in distances], np.int64)


def shift_exponentials(node: Node) -> Array:
    """Return the exponentials by the distance of an 8-bit code from the largest of its row, int64 (256,)."""
    return _exponentials(node, range(0, -256, -1))


def emit_shiftmax(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Exponentials of a row relative to its largest code, times the reciprocal of their sum."""
    tirx = script()
    dtype = operands[0].type.dtype
    layout = Layout.matrix(operands[0].type.shape)
    width, shift = layout.tail[0], literal(32 - node.integer("bits"), "int64")
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        table = function.constant(shift_exponentials(node))
        result = function.result()
        with each_row(function.rows) as row:
            largest = largest_code(row, codes, width, dtype)
            total = _variable(literal(0, "int64"))
            with row.columns(width) as (column,):
                tirx.buffer_store(total, total[0] + table[largest[0] - cast(codes[row.index, column], "int32")], [0])
            row.add_up(total)
            factor = _variable(reciprocal(total[0]))
            with row.columns(width) as (column,):
                exponential = table[largest[0] - cast(codes[row.index, column], "int32")]
                probability = tirx.shift_right(exponential * factor[0], shift)
                tirx.buffer_store(result, cast(probability, node.type.dtype), [row.index, column])
    return function.kernel()


def emit_shift_gelu(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Codes times their sigmoids, which are relative to the largest code of the row."""
    tirx = script()
    dtype = operands[0].type.dtype
    layout = Layout.matrix(operands[0].type.shape)
    width, shift = layout.tail[0], literal(32 - node.integer("bits"), "int64")
    zero_point, first = node.integer("input_zero_point"), lowest(dtype)
    # Indexed by the row's largest code, as it is stored: exp(0 - largest), clipped as the sum will be.
    ones = np.minimum(_exponentials(node, range(zero_point - first, zero_point - first - 256, -1)), RECIPROCAL)
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        table, one_table = function.constant(shift_exponentials(node)), function.constant(ones)
        result = function.result()
        with each_row(function.rows) as row:
            largest = largest_code(row, codes, width, dtype)
            one = _variable(one_table[largest[0] - literal(first, "int32")])
            with row.columns(width) as (column,):
                above = table[largest[0] - cast(codes[row.index, column], "int32")]
                sigmoid = cast(tirx.shift_right(above * reciprocal(above + one[0]), shift), "int32")
                centred = minus(codes[row.index, column], zero_point, "int32")
                tirx.buffer_store(result, centred * sigmoid, [row.index, column])
    return function.kernel()


def _rounded_mean(total: Expr, width: int) -> Expr:
    """Emit ``total / width``, to nearest, ties to even."""
    tirx = script()
    two, one = literal(2 * width, "int64"), literal(1, "int64")
    doubled = _variable(total * literal(2, "int64") + literal(width, "int64"))
    mean = _variable(import_tvm("tvm.tirx").floordiv(doubled[0], two))
    tie = cast(doubled[0] == mean[0] * two, "int64")
    return mean[0] - tie * tirx.bitwise_and(mean[0], one)


def _newton_root(node: Node, squares: Expr) -> Buffer:
    tirx = script()
    one = literal(1, "int64")
    start = node.integer("start")
    first: Expr = literal(1 << max(start, 0), "int64")
    if start == PAPER_START:
        # Zero has no bits and one has one; the start is 2^0 for both.
        bits = literal(64, "int64") - cast(tirx.clz(tirx.max(squares, one)), "int64")
        first = tirx.shift_left(one, tirx.shift_right(bits, one))
    root = _variable(first)
    with tirx.serial(node.integer("iterations")):
        mean = tirx.shift_right(root[0] + _quotient(squares, root[0]), one)
        tirx.buffer_store(root, tirx.max(mean, one), [0])
    return root


def emit_i_layer_norm(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Normalize rows of 8-bit or int16 codes with the published square root, add, scale and saturate."""
    tirx = script()
    x, weight, bias = operands
    layout = Layout.matrix(x.type.shape)
    width = layout.tail[0]
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        weights, biases = function.constant(weight.constant()), function.constant(bias.constant())
        result = function.result()
        with each_row(function.rows) as row:
            total, squares = _variable(literal(0, "int64")), _variable(literal(0, "int64"))
            with row.columns(width) as (column,):
                tirx.buffer_store(total, total[0] + cast(codes[row.index, column], "int64"), [0])
            row.add_up(total)
            mean = _variable(_rounded_mean(total[0], width))
            with row.columns(width) as (column,):
                centred = cast(codes[row.index, column], "int64") - mean[0]
                tirx.buffer_store(squares, squares[0] + centred * centred, [0])
            row.add_up(squares)
            root = _newton_root(node, squares[0])
            factor = _variable(_quotient(literal(RECIPROCAL, "int64"), root[0]))
            with row.columns(width) as (column,):
                centred = cast(codes[row.index, column], "int64") - mean[0]
                normalized = tirx.shift_right(centred * factor[0], literal(1, "int64"))
                scaled = (normalized + biases[column]) * cast(weights[column], "int64")
                code = saturate(shift_round(scaled, node.integer("shift")), node)
                tirx.buffer_store(result, code, [row.index, column])
    return function.kernel()
