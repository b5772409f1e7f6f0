"""Operators that compute each element on its own, with broadcasting: one loop nest for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantizers.integer.ops import OPS
from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, clip, literal, lowest, minus, requantize, saturate, shift_round
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.targets import Target

Element = Callable[..., Expr]
#: Bits of a float32 that are all set in infinity and NaN only.
_EXPONENT = 0x7F800000


def broadcast_row(row: Expr, lead: tuple[int, ...], own: tuple[int, ...], *, batched: bool) -> Expr:
    """Return the row of a broadcast operand that belongs to a row of the result.

    Args:
        row: row of the result, ``batch * prod(lead)`` of them.
        lead: leading axes of the result, without the batch.
        own: leading axes of the operand; they align with ``lead`` from the right.
        batched: whether the operand has a batch axis in front of them.
    """
    if own == lead and batched:
        return row
    index: Expr = 0
    stride, below = 1, 1
    for position in range(1, len(lead) + 1):
        extent = own[-position] if position <= len(own) else 1
        if extent > 1:
            index = index + ((row // below) % lead[-position]) * stride
        stride, below = stride * extent, below * lead[-position]
    return index + (row // below) * stride if batched else index


def _elementwise(node: Node, operands: Sequence[Operand], element: Element, tables: Sequence[Array] = ()) -> Kernel:
    """Emit ``result[...] = element(operands...)``; ``tables`` are passed to ``element`` whole."""
    tirx = script()
    shape = node.type.shape or (1,)
    lead, width = shape[:-1], shape[-1]
    value_count = len(OPS[node.op].values)
    function = Function(node, operands, Layout.matrix(shape))
    with function.body():
        readers: list[tuple[Buffer, tuple[int, ...], bool]] = []
        for index, operand in enumerate(operands):
            own = operand.type.shape or (1,)
            if index < value_count:
                buffer, batched = function.value(index, Layout.matrix(own)), operand.batched
            elif tables:
                continue
            else:
                buffer, batched = function.constant(operand.constant().reshape(-1, own[-1])), False
            readers.append((buffer, own, batched))
        whole = [function.constant(table) for table in tables]
        result = function.result()
        with each_row(function.rows) as row, row.columns(width) as (column,):
            elements = [
                buffer[broadcast_row(row.index, lead, own[:-1], batched=batched), column if own[-1] > 1 else 0]
                for buffer, own, batched in readers
            ]
            tirx.buffer_store(result, element(*elements, *whole), [row.index, column])
    return function.kernel()


def emit_requantize(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``saturate(((x - input_zero_point) m + 2^(shift-1)) >> shift)``."""
    return _elementwise(node, operands, lambda x, multiplier: requantize(node, x, multiplier))


def emit_add(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Rescaled sum of two values, one rounding."""

    def element(a: Expr, b: Expr, multiplier_a: Expr, multiplier_b: Expr) -> Expr:
        left = minus(a, node.integer("zero_point_a"), "int64") * cast(multiplier_a, "int64")
        right = minus(b, node.integer("zero_point_b"), "int64") * cast(multiplier_b, "int64")
        return saturate(shift_round(left + right, node.integer("shift")), node)

    return _elementwise(node, operands, element)


def emit_multiply(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Product of two centred values, int32."""

    def element(a: Expr, b: Expr) -> Expr:
        return minus(a, node.integer("zero_point_a"), "int32") * minus(b, node.integer("zero_point_b"), "int32")

    return _elementwise(node, operands, element)


def emit_lookup(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``table[x - min(dtype)]``."""
    x, table = operands

    def element(code: Expr, entries: Buffer) -> Expr:
        return entries[minus(code, lowest(x.type.dtype), "int32")]

    return _elementwise(node, operands, element, [table.constant()])


def not_finite(x: Expr, lanes: int) -> Expr:
    """Return int32 lanes that are 1 where all bits of the exponent are set, else 0."""
    tirx = script()
    dtype = f"int32x{lanes}" if lanes > 1 else "int32"
    exponent = tirx.bitwise_and(tirx.reinterpret(x, dtype=dtype), literal(_EXPONENT, "int32", lanes))
    return cast(exponent == literal(_EXPONENT, "int32", lanes), "int32", lanes)


def door(node: Node, x: Expr, scale: Expr, lanes: int) -> Expr:
    """Return the codes of float32 pixels, one or a vector of them."""
    tirx = script()
    limit = float(2**24)
    # nearbyint rounds by the current mode, to nearest even unless the process changed it; "round"
    # would round ties away from zero.
    codes = tirx.nearbyint(x / scale)
    clipped = tirx.max(tirx.min(codes, literal(limit, "float32", lanes)), literal(-limit, "float32", lanes))
    return clip(cast(clipped, "int32", lanes), node, lanes)


def emit_dequantize(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``float32(x - zero_point) * scale``."""

    def element(x: Expr, scale: Expr) -> Expr:
        return cast(minus(x, node.integer("zero_point"), "int32"), "float32") * scale

    return _elementwise(node, operands, element)
