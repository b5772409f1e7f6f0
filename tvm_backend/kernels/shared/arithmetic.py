"""Integer expressions shared by the kernels; each equals its namesake in the reference interpreter."""

from __future__ import annotations

from typing import Any

from quantizers.integer.program import INTEGER_RANGES, Node
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.shared.function import Expr, script


def literal(value: float, dtype: str, lanes: int = 1) -> Expr:
    """Return a constant, repeated for each lane."""
    constant = import_tvm("tvm.tirx").const(value, dtype)
    return script().broadcast(constant, lanes) if lanes > 1 else constant


def cast(value: Expr, dtype: str, lanes: int = 1) -> Expr:
    """Convert the element type."""
    return script().Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def minus(value: Expr, offset: int, dtype: str, lanes: int = 1) -> Expr:
    """Return ``value - offset`` in ``dtype``."""
    wide = cast(value, dtype, lanes)
    return wide - literal(offset, dtype, lanes) if offset else wide


def shift_round(value: Expr, shift: int, lanes: int = 1) -> Expr:
    """Return ``(value + 2^(shift-1)) >> shift`` of int64, arithmetic shift."""
    return script().shift_right(value + literal(1 << (shift - 1), "int64", lanes), literal(shift, "int64", lanes))


def saturate(value: Expr, node: Node, lanes: int = 1) -> Expr:
    """Add the node's zero point to an int64 value, clip, and convert to the node's element type."""
    tirx: Any = script()
    zero_point, qmin, qmax = (node.integer(key) for key in ("zero_point", "qmin", "qmax"))
    shifted = value + literal(zero_point, "int64", lanes) if zero_point else value
    clipped = tirx.max(tirx.min(shifted, literal(qmax, "int64", lanes)), literal(qmin, "int64", lanes))
    return cast(clipped, node.type.dtype, lanes)


def clip(codes: Expr, node: Node, lanes: int) -> Expr:
    """Add the zero point to int32 lanes, clip, and convert to the node's element type."""
    tirx = script()
    zero_point, qmin, qmax = (node.integer(key) for key in ("zero_point", "qmin", "qmax"))
    shifted = codes + literal(zero_point, "int32", lanes) if zero_point else codes
    clipped = tirx.max(tirx.min(shifted, literal(qmax, "int32", lanes)), literal(qmin, "int32", lanes))
    return cast(clipped, node.type.dtype, lanes)


def requantize(node: Node, value: Expr, multiplier: Expr, lanes: int = 1) -> Expr:
    """The ``requantize`` operator on one element or one vector."""
    centred = minus(value, node.integer("input_zero_point"), "int64", lanes)
    product = centred * cast(multiplier, "int64", lanes)
    return saturate(shift_round(product, node.integer("shift"), lanes), node, lanes)


def lowest(dtype: str) -> int:
    """Return the code that a 256-entry table starts with."""
    return INTEGER_RANGES[dtype][0]
