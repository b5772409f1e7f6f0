"""Batched matrix products of two values that stand alone; :mod:`.attention` computes those of an attention head.

Widening multiplications, any element types and zero points: right everywhere, and vectorised by rows of the
packed right operand, but without the instructions of :mod:`.dot`.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import literal, minus
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.targets import CpuTarget

_LANES = 16
#: Rows of the left operand that share one pass over the right one.
_ROWS = 4


def emit_matmul(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """``sum_k (a - zero_point_a) (b - zero_point_b)``, int32."""
    tirx = script()
    rows, depth = operands[0].type.shape[-2:]
    count = node.type.shape[-1]
    tiles = -(-count // _LANES)
    items = Layout.matrix(node.type.shape, 2).rows
    function = Function(node, operands, Layout.matrix(node.type.shape, 2))
    with function.body():
        left, right = (function.value(i, Layout.matrix(operand.type.shape, 2)) for i, operand in enumerate(operands))
        result = function.result()
        with tirx.parallel(function.rows) as item:
            item_a, item_b = (item if operand.batched else item % items for operand in operands)
            packed = _pack(node, right, item_b, depth, count)
            with tirx.serial(tiles) as t, tirx.serial(-(-rows // _ROWS)) as row_tile:
                # Rows beyond the end repeat the last one, and store the same numbers again.
                at = [tirx.min(row_tile * _ROWS + i, rows - 1) for i in range(_ROWS)]
                sums = [local(_LANES, "int32") for _ in range(_ROWS)]
                lanes = tirx.ramp(0, 1, _LANES)
                for partial in sums:
                    tirx.buffer_store(partial, literal(0, "int32", _LANES), [lanes])
                with tirx.serial(depth) as k:
                    column = packed[t, k, lanes]
                    for row, partial in zip(at, sums, strict=True):
                        code = minus(left[item_a, row, k], node.integer("zero_point_a"), "int32")
                        tirx.buffer_store(partial, partial[lanes] + tirx.broadcast(code, _LANES) * column, [lanes])
                _store(result, item, t, at, sums, count)
    return function.kernel()


def _pack(node: Node, right: Buffer, item: Expr, depth: int, count: int) -> Buffer:
    """Copy one right operand as ``int32[tile][K][lanes]``, zeros beyond its end."""
    tirx = script()
    tiles = -(-count // _LANES)
    packed = tirx.alloc_buffer((tiles, depth, _LANES), "int32", scope="global")
    with tirx.serial(tiles) as t, tirx.serial(depth) as k, tirx.serial(_LANES) as j:
        column = t * _LANES + j
        code = right[item, column, k] if node.integer("transpose_b") else right[item, k, column]
        value = minus(code, node.integer("zero_point_b"), "int32")
        if count % _LANES:
            value = tirx.if_then_else(column < count, value, literal(0, "int32"))
        tirx.buffer_store(packed, value, [t, k, j])
    return packed


def _store(result: Buffer, item: Expr, t: Expr, at: Sequence[Expr], sums: Sequence[Buffer], count: int) -> None:
    tirx = script()
    rest = count % _LANES
    for row, partial in zip(at, sums, strict=True):
        if not rest:
            tirx.buffer_store(result, partial[tirx.ramp(0, 1, _LANES)], [item, row, tirx.ramp(t * _LANES, 1, _LANES)])
            continue
        with tirx.serial(tirx.min(_LANES, count - t * _LANES)) as j:
            tirx.buffer_store(result, partial[j], [item, row, t * _LANES + j])
