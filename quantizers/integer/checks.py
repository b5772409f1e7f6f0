"""What several rules ask of a node: types, zero points, shifts, and bounds that stay inside int64."""

from __future__ import annotations

import numpy as np

from quantizers.errors import ProgramError
from quantizers.integer.bounds import Interval, Operand
from quantizers.integer.fixed_point import MAX_SHIFT, MIN_SHIFT
from quantizers.integer.program import INTEGER_RANGES, Node

INT64_MAX = 2**63 - 1
BYTES = ("int8", "uint8")
#: Element types of values; int64 is for the constants and the inside of operators only.
VALUES = ("int8", "uint8", "int16", "int32")


def fail(node: Node, message: str) -> ProgramError:
    """Return the error for a node, with its place in the model."""
    where = f" ({node.source})" if node.source else ""
    return ProgramError(f"{node.op} {node.name}{where}: {message}")


def require_fits(node: Node, interval: Interval, dtype: str) -> None:
    """Refuse a result whose bounds leave its integer type."""
    low, high = INTEGER_RANGES[dtype]
    if interval.low < low or interval.high > high:
        raise fail(node, f"could overflow {dtype}: the result lies in [{interval.low}, {interval.high}]")


def require_int64(node: Node, magnitude: int) -> None:
    """Refuse an intermediate whose magnitude leaves int64."""
    if magnitude > INT64_MAX:
        raise fail(node, f"could overflow int64: an intermediate reaches {magnitude}, above 2^63 - 1")


def require_dtype(node: Node, operand: Operand, *dtypes: str) -> None:
    """Refuse an operand of another element type."""
    if operand.type.dtype not in dtypes:
        raise fail(node, f"operand {operand.name} is {operand.type}, expected {' or '.join(dtypes)}")


def require_integer(node: Node, operand: Operand) -> None:
    """Refuse an operand that no integer value can be."""
    require_dtype(node, operand, *VALUES)


def zero_point_of(node: Node, key: str, operand: Operand) -> int:
    """Return an operand's zero point, which must be a code of its type, so that no difference needs two bits more."""
    zero_point = node.integer(key)
    low, high = INTEGER_RANGES[operand.type.dtype]
    if not low <= zero_point <= high:
        raise fail(node, f"{key} is {zero_point}, expected a code of {operand.name}, {low} to {high}")
    return zero_point


def require_broadcast(node: Node, shape: tuple[int, ...], operand: Operand) -> None:
    """Refuse an operand that does not broadcast to a shape from the right."""
    try:
        fits = np.broadcast_shapes(shape, operand.type.shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise fail(node, f"{operand.name} of shape {operand.type.shape} does not broadcast to {shape}")


def broadcast_shape(node: Node, a: Operand, b: Operand) -> tuple[int, ...]:
    """Return the shape of two operands that broadcast to each other."""
    try:
        return tuple(np.broadcast_shapes(a.type.shape, b.type.shape))
    except ValueError as error:
        raise fail(node, f"{a.type} and {b.type} do not broadcast") from error


def channel_constants(node: Node, x: Operand, weight: Operand, bias: Operand) -> tuple[list[int], list[int]]:
    """Return the int32 weight and the int64 bias of each channel, the last axis of ``x``, which must not be empty."""
    require_dtype(node, weight, "int32")
    require_dtype(node, bias, "int64")
    channels = x.type.shape[-1:]
    if channels in ((), (0,)) or weight.type.shape != channels or bias.type.shape != channels:
        raise fail(node, f"x is {x.type}, weight {weight.type}, bias {bias.type}: expected one entry a channel")
    assert weight.array is not None
    assert bias.array is not None
    return [int(w) for w in weight.array], [int(b) for b in bias.array]


def shift_of(node: Node) -> int:
    """Return the node's right shift, within its range."""
    shift = node.integer("shift")
    if not MIN_SHIFT <= shift <= MAX_SHIFT:
        raise fail(node, f"shift is {shift}, expected {MIN_SHIFT} to {MAX_SHIFT}")
    return shift


def saturated(node: Node, value: Interval, *, int64: bool = True) -> Interval:
    """Bounds of ``saturate(value)``; checks the node's codes against its element type."""
    zero_point, qmin, qmax = (node.integer(key) for key in ("zero_point", "qmin", "qmax"))
    if node.type.dtype not in VALUES:
        raise fail(node, f"the result is declared {node.type}, expected {' or '.join(VALUES)}")
    low, high = INTEGER_RANGES[node.type.dtype]
    if not low <= qmin <= zero_point <= qmax <= high:
        raise fail(node, f"expected {low} <= qmin <= zero_point <= qmax <= {high}, got {qmin}, {zero_point}, {qmax}")
    if int64:
        require_int64(node, value.magnitude + abs(zero_point))
    clip = [min(max(v + zero_point, qmin), qmax) for v in (value.low, value.high)]
    return Interval(clip[0], clip[1])


def rescaled(node: Node, product: Interval) -> Interval:
    """Bounds of ``saturate((product + half) >> shift)``."""
    shift = shift_of(node)
    half = 1 << (shift - 1)
    require_int64(node, product.magnitude + half)
    return saturated(node, Interval((product.low + half) >> shift, (product.high + half) >> shift))
