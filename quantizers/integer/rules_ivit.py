"""The rules of the published operators of I-ViT, as :mod:`quantizers.integer.rules` has them for the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from quantizers.integer.bounds import Checked, Interval, Operand
from quantizers.integer.checks import (
    BYTES,
    channel_constants,
    fail,
    require_dtype,
    require_int64,
    rescaled,
    zero_point_of,
)
from quantizers.integer.ivit import NORMALIZED_BITS, PAPER_START, RECIPROCAL
from quantizers.integer.program import Node, TensorType

_OUTPUTS = {8: "int8", 16: "int16"}
_LARGEST_INVERSE, _LARGEST_WINDOW, _LARGEST_START, _LARGEST_ITERATIONS = 2**24, 31, 31, 32


def _within(node: Node, key: str, low: int, high: int) -> int:
    value = node.integer(key)
    if not low <= value <= high:
        raise fail(node, f"{key} is {value}, expected {low} to {high}")
    return value


def _exponential(node: Node, x: Operand) -> tuple[int, int, int]:
    """Check what the two exponentials share; return the largest one, the output width and the row length."""
    require_dtype(node, x, *BYTES)
    if not x.type.shape:
        raise fail(node, "expected at least one axis; the last one is the row")
    inverse = _within(node, "inverse_scale", 1, _LARGEST_INVERSE)
    window = _within(node, "window", 1, _LARGEST_WINDOW)
    bits = node.integer("bits")
    if bits not in _OUTPUTS:
        raise fail(node, f"bits is {bits}, expected 8 or 16")
    return inverse << window, bits, x.type.shape[-1]


def largest_row_sum(node: Node, width: int) -> int:
    """Return the most that the codes of a row of ``shiftmax`` can sum to.

    Up to a sum of 2^31 - 1 the reciprocal times the sum is at most that; beyond it the reciprocal is 1.
    """
    total = max(RECIPROCAL, width * (node.integer("inverse_scale") << node.integer("window")))
    return total >> (32 - node.integer("bits"))


def _shiftmax(node: Node, x: Operand) -> Checked:
    largest, bits, width = _exponential(node, x)
    require_int64(node, width * largest)
    top = max(RECIPROCAL, largest) >> (32 - bits)
    return TensorType(_OUTPUTS[bits], x.type.shape), Interval(0, top)


def _shift_gelu(node: Node, x: Operand) -> Checked:
    largest, bits, _ = _exponential(node, x)
    # The other exponential of the sum is clipped to 2^31 - 1 before it is added.
    require_int64(node, largest + RECIPROCAL)
    centred = x.interval.minus(zero_point_of(node, "input_zero_point", x))
    top = max(RECIPROCAL, largest) >> (32 - bits)
    return TensorType("int32", x.type.shape), centred.times(Interval(0, top))


def _i_layer_norm(node: Node, x: Operand, weight: Operand, bias: Operand) -> Checked:
    require_dtype(node, x, *BYTES, "int16")
    weights, biases = channel_constants(node, x, weight, bias)
    _within(node, "start", PAPER_START, _LARGEST_START)
    # One step at least: from then on the root is not below the floor of the real one.
    _within(node, "iterations", 1, _LARGEST_ITERATIONS)
    spread = x.interval.high - x.interval.low
    if len(weights) * spread * spread >= 2**62:
        raise fail(node, f"with {len(weights)} channels the sum of squares must be below 2^62")
    # |x - mean| <= floor(sqrt(sum of squares)) <= root, so that the product with 2^31 // root stays below 2^31.
    normalized = 1 << NORMALIZED_BITS
    products = [abs(w) * (normalized + abs(b)) for w, b in zip(weights, biases, strict=True)]
    require_int64(node, normalized + max(abs(b) for b in biases))
    return TensorType(node.type.dtype, x.type.shape), rescaled(node, Interval(-max(products), max(products)))


IVIT_RULES: Mapping[str, Callable[..., Checked]] = MappingProxyType(
    {"shiftmax": _shiftmax, "shift_gelu": _shift_gelu, "i_layer_norm": _i_layer_norm}
)
