"""LayerNorm in integers, with an exact integer square root; vectors along the channels, a few rows side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal, saturate
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.shared.square_root import divide, floor_sqrt, variable
from tvm_backend.targets import CpuTarget

#: Channels of a vector.
_LANES = 16
#: Rows whose chains of divisions overlap.
_ROWS = 4
#: Widest row whose sum of int16 codes fits int32.
_WIDEST = 2**16 - 1


@dataclass(frozen=True)
class _Rows:
    """What is known of some rows after the first pass: ``n = ((extent x - total) reciprocal + half) >> shift``.

    Each entry stands for one row. ``extent`` is plus or minus the width, so that the reciprocal, up to 2^31, can
    be held as an int32. The second pass reads the arrays in a loop, which keeps them in memory: otherwise LLVM
    would move each row's chain of divisions to its second pass, one after the other again.
    """

    total: Buffer
    extent: Buffer
    reciprocal: Buffer
    shift: Buffer
    half: Buffer

    @classmethod
    def declare(cls) -> _Rows:
        """Allocate the arrays."""
        total, shift, half = (local(_ROWS, "int64") for _ in range(3))
        extent, reciprocal = (local(_ROWS, "int32") for _ in range(2))
        return cls(total, extent, reciprocal, shift, half)


def emit_layer_norm(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """Normalize rows of 8-bit or int16 codes, scale and shift them, and saturate."""
    tirx = script()
    x, weight, bias = operands
    layout = Layout.matrix(x.type.shape)
    width = layout.tail[0]
    # Half a unit of the last shift is part of the bias; the verifier counts it too.
    rounded = bias.constant().astype(np.int64) + (1 << (node.integer("shift") - 1))
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        weights, biases = function.constant(weight.constant()), function.constant(rounded)
        result = function.result()
        with tirx.parallel((function.rows + (_ROWS - 1)) // _ROWS) as block:
            # Rows beyond the end repeat the last one, and store the same numbers again.
            at = [tirx.min(block * _ROWS + i, function.rows - 1) for i in range(_ROWS)]
            rows = _measure(node, codes, x.type.dtype, at, width)
            buffers = (codes, weights, biases, result)
            with tirx.serial(_ROWS) as i:
                index = tirx.min(block * _ROWS + i, function.rows - 1)
                with tirx.serial(width // _LANES) as vector:
                    _normalize(node, rows, i, index, buffers, vector * _LANES, _LANES)
                with tirx.serial(width % _LANES) as rest:
                    _normalize(node, rows, i, index, buffers, width - width % _LANES + rest, 1)
    return function.kernel()


def _at(column: Expr, lanes: int) -> Expr:
    return script().ramp(column, 1, lanes) if lanes > 1 else column


def _spread(value: Expr, lanes: int) -> Expr:
    return script().broadcast(value, lanes) if lanes > 1 else value


def _measure(node: Node, codes: Buffer, dtype: str, at: Sequence[Expr], width: int) -> _Rows:
    """Emit the first pass over some rows: sums, variance, and the reciprocal of its root."""
    tirx = script()
    extent = literal(width, "int64")
    totals, variances, exponents = [], [], []
    for row in at:
        total, squares = _sums(codes, dtype, row, width)
        spread = extent * squares[0] - total[0] * total[0] + literal(node.integer("epsilon"), "int64")
        variance = variable(spread)
        # A value of b bits may be multiplied by 4^e while b + 2 e <= 62.
        leading_zeros = cast(tirx.clz(variance[0]), "int64")
        exponent = variable(tirx.shift_right(leading_zeros - literal(2, "int64"), literal(1, "int64")))
        tirx.buffer_store(variance, tirx.shift_left(variance[0], exponent[0] * literal(2, "int64")), [0])
        totals.append(total)
        variances.append(variance)
        exponents.append(exponent)
    roots = floor_sqrt([variance[0] for variance in variances])
    rows = _Rows.declare()
    for i, (total, exponent, root) in enumerate(zip(totals, exponents, roots, strict=True)):
        reciprocal = variable(divide(literal(1 << 61, "int64"), root[0]))
        # 2^31 becomes -2^31 in int32; the other factor changes its sign as well.
        sign = literal(1, "int64") - cast(reciprocal[0] >= literal(1 << 31, "int64"), "int64") * literal(2, "int64")
        shift = literal(61 - LAYER_NORM_FRACTION_BITS, "int64") - exponent[0]
        tirx.buffer_store(rows.total, total[0] * sign, [i])
        tirx.buffer_store(rows.extent, cast(extent * sign, "int32"), [i])
        tirx.buffer_store(rows.reciprocal, cast(reciprocal[0], "int32"), [i])
        tirx.buffer_store(rows.shift, shift, [i])
        tirx.buffer_store(rows.half, tirx.shift_left(literal(1, "int64"), shift - literal(1, "int64")), [i])
    return rows


def _sums(codes: Buffer, dtype: str, row: Expr, width: int) -> tuple[Buffer, Buffer]:
    """Emit the sums of a row's codes and of their squares, int64."""
    tirx = script()
    total, squares = variable(literal(0, "int64")), variable(literal(0, "int64"))
    whole = width // _LANES if width <= _WIDEST else 0
    if whole:
        every = tirx.ramp(0, 1, _LANES)
        partial, partial_squares = local(_LANES, "int32"), local(_LANES, "int64")
        tirx.buffer_store(partial, literal(0, "int32", _LANES), [every])
        tirx.buffer_store(partial_squares, literal(0, "int64", _LANES), [every])
        with tirx.serial(whole) as vector:
            wide = cast(codes.vload([row, vector * _LANES], f"{dtype}x{_LANES}"), "int32", _LANES)
            tirx.buffer_store(partial, partial[every] + wide, [every])
            # At most 2^30, so that the product fits int32.
            square = cast(wide * wide, "int64", _LANES)
            tirx.buffer_store(partial_squares, partial_squares[every] + square, [every])
        add = tirx.llvm_lookup_intrinsic_id("llvm.vector.reduce.add")
        reduced = cast(tirx.call_llvm_pure_intrin(add, partial[every], dtype="int32"), "int64")
        tirx.buffer_store(total, reduced, [0])
        tirx.buffer_store(squares, tirx.call_llvm_pure_intrin(add, partial_squares[every], dtype="int64"), [0])
    with tirx.serial(width - whole * _LANES) as rest:
        code = cast(codes[row, whole * _LANES + rest], "int64")
        tirx.buffer_store(total, total[0] + code, [0])
        tirx.buffer_store(squares, squares[0] + code * code, [0])
    return total, squares


def _normalize(
    node: Node,
    rows: _Rows,
    i: Expr,
    index: Expr,
    buffers: tuple[Buffer, Buffer, Buffer, Buffer],
    column: Expr,
    lanes: int,
) -> None:
    """Emit the second pass over one vector of channels of row ``index``, the ``i``-th of those that were measured."""
    tirx = script()
    codes, weights, biases, result = buffers
    place = _at(column, lanes)
    # Factors are extended from int32, so that one instruction multiplies them.
    extent, reciprocal = (_spread(cast(value[i], "int64"), lanes) for value in (rows.extent, rows.reciprocal))
    centred = extent * cast(codes[index, place], "int64", lanes) - _spread(rows.total[i], lanes)
    centred = cast(cast(centred, "int32", lanes), "int64", lanes) if _fits(node) else centred
    scaled = centred * reciprocal + _spread(rows.half[i], lanes)
    normalized = cast(tirx.shift_right(scaled, _spread(rows.shift[i], lanes)), "int32", lanes)
    product = cast(normalized, "int64", lanes) * cast(weights[place], "int64", lanes) + biases[place]
    shifted = tirx.shift_right(product, literal(node.integer("shift"), "int64", lanes))
    tirx.buffer_store(result, saturate(shifted, node, lanes), [index, place])


def _fits(node: Node) -> bool:
    """Whether ``C x - S`` fits int32 for every row of int16 codes."""
    return 2 * node.type.shape[-1] * 2**15 < 2**31
