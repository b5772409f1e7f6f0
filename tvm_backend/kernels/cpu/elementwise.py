"""Operators that compute each element on its own, with broadcasting: one loop nest for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from quantizers.integer.ops import OPS
from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.arithmetic import (
    cast,
    literal,
    lowest,
    minus,
    requantize,
    saturate,
    shift_round,
)
from tvm_backend.kernels.cpu.byte_table import WIDTH, by_unsigned_code, look_up
from tvm_backend.kernels.cpu.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.cpu.rescale import clip
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.targets import CpuTarget

Element = Callable[..., Expr]
#: Pixels of a vector.
_LANES = 16
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
        with tirx.parallel(function.rows) as row, tirx.serial(width) as column:
            elements = [
                buffer[broadcast_row(row, lead, own[:-1], batched=batched), column if own[-1] > 1 else 0]
                for buffer, own, batched in readers
            ]
            tirx.buffer_store(result, element(*elements, *whole), [row, column])
    return function.kernel()


def emit_requantize(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """``saturate(((x - input_zero_point) m + 2^(shift-1)) >> shift)``."""
    return _elementwise(node, operands, lambda x, multiplier: requantize(node, x, multiplier))


def emit_add(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """Rescaled sum of two values, one rounding."""

    def element(a: Expr, b: Expr, multiplier_a: Expr, multiplier_b: Expr) -> Expr:
        left = minus(a, node.integer("zero_point_a"), "int64") * cast(multiplier_a, "int64")
        right = minus(b, node.integer("zero_point_b"), "int64") * cast(multiplier_b, "int64")
        return saturate(shift_round(left + right, node.integer("shift")), node)

    return _elementwise(node, operands, element)


def emit_multiply(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """Product of two centred values, int32."""

    def element(a: Expr, b: Expr) -> Expr:
        return minus(a, node.integer("zero_point_a"), "int32") * minus(b, node.integer("zero_point_b"), "int32")

    return _elementwise(node, operands, element)


def emit_lookup(node: Node, operands: Sequence[Operand], target: CpuTarget) -> Kernel:
    """``table[x - min(dtype)]``."""
    x, table = operands
    whole = x.type.shape and x.type.shape[-1] % WIDTH == 0
    if target.byte_tables and table.type.dtype in ("int8", "uint8") and whole:
        return _wide_lookup(node, operands)

    def element(code: Expr, entries: Buffer) -> Expr:
        return entries[minus(code, lowest(x.type.dtype), "int32")]

    return _elementwise(node, operands, element, [table.constant()])


def _wide_lookup(node: Node, operands: Sequence[Operand]) -> Kernel:
    """Look up whole vectors of codes."""
    tirx = script()
    x, table = operands
    layout = Layout.matrix(x.type.shape)
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        entries = function.constant(by_unsigned_code(table.constant(), x.type.dtype))
        result = function.result()
        with tirx.parallel(function.rows) as row, tirx.serial(layout.tail[0] // WIDTH) as vector:
            place = tirx.ramp(vector * WIDTH, 1, WIDTH)
            found = look_up(entries, tirx.reinterpret(codes[row, place], dtype=f"int8x{WIDTH}"))
            tirx.buffer_store(result, tirx.reinterpret(found, dtype=f"{node.type.dtype}x{WIDTH}"), [row, place])
    return function.kernel()


def emit_quantize(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """``saturate(round_half_even(x / scale))``, float32 division; flags rows with NaN or infinity."""
    tirx = script()
    layout = Layout.matrix(operands[0].type.shape)
    function = Function(node, operands, layout)
    with function.body():
        image = function.value(0, layout)
        # The scale is an argument, not a literal: TVM turns a division by a literal into a multiplication by
        # its reciprocal, which rounds differently.
        scale = function.constant(np.array([node.real("scale")], np.float32))
        flags, result = function.flags(), function.result()
        whole, rest = divmod(layout.tail[0], _LANES)
        with tirx.parallel(function.rows) as row:
            wide, flag = local(_LANES, "int32"), local(1, "int32")
            every = tirx.ramp(0, 1, _LANES)
            tirx.buffer_store(wide, literal(0, "int32", _LANES), [every])
            tirx.buffer_store(flag, literal(0, "int32"), [0])
            with tirx.serial(whole) as vector:
                place = tirx.ramp(vector * _LANES, 1, _LANES)
                found = tirx.bitwise_or(wide[every], _not_finite(image[row, place], _LANES))
                tirx.buffer_store(wide, found, [every])
                codes = _door(node, image[row, place], tirx.broadcast(scale[0], _LANES), _LANES)
                tirx.buffer_store(result, codes, [row, place])
            with tirx.serial(rest) as column:
                at = whole * _LANES + column
                tirx.buffer_store(flag, tirx.bitwise_or(flag[0], _not_finite(image[row, at], 1)), [0])
                tirx.buffer_store(result, _door(node, image[row, at], scale[0], 1), [row, at])
            reduce = tirx.llvm_lookup_intrinsic_id("llvm.vector.reduce.or")
            together = tirx.call_llvm_pure_intrin(reduce, wide[every], dtype="int32")
            tirx.buffer_store(flags, tirx.bitwise_or(together, flag[0]), [row])
    return function.kernel()


def _not_finite(x: Expr, lanes: int) -> Expr:
    """Return int32 lanes that are 1 where all bits of the exponent are set, else 0."""
    tirx = script()
    dtype = f"int32x{lanes}" if lanes > 1 else "int32"
    exponent = tirx.bitwise_and(tirx.reinterpret(x, dtype=dtype), literal(_EXPONENT, "int32", lanes))
    return cast(exponent == literal(_EXPONENT, "int32", lanes), "int32", lanes)


def _door(node: Node, x: Expr, scale: Expr, lanes: int) -> Expr:
    tirx = script()
    limit = float(2**24)
    # nearbyint rounds by the current mode, to nearest even unless the process changed it; "round"
    # would round ties away from zero.
    codes = tirx.nearbyint(x / scale)
    clipped = tirx.max(tirx.min(codes, literal(limit, "float32", lanes)), literal(-limit, "float32", lanes))
    return clip(cast(clipped, "int32", lanes), node, lanes)


def emit_dequantize(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """``float32(x - zero_point) * scale``."""

    def element(x: Expr, scale: Expr) -> Expr:
        return cast(minus(x, node.integer("zero_point"), "int32"), "float32") * scale

    return _elementwise(node, operands, element)
