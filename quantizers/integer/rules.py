"""One rule function for each operator: it checks the operands, infers the result's type and bounds the result.

The bounds are intervals computed from the actual constants, in Python integers, so that the proof itself
cannot overflow; :mod:`quantizers.integer.verify` walks a program with these rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from quantizers.integer.bounds import Checked, Interval, Operand
from quantizers.integer.checks import (
    BYTES,
    broadcast_shape,
    channel_constants,
    fail,
    require_broadcast,
    require_dtype,
    require_int64,
    require_integer,
    rescaled,
    saturated,
    zero_point_of,
)
from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import INTEGER_RANGES, Node, TensorType
from quantizers.integer.rules_ivit import IVIT_RULES, largest_row_sum


def _quantize(node: Node, x: Operand) -> Checked:
    require_dtype(node, x, "float32")
    if x.node is not None:
        raise fail(node, f"{x.name} is not an input; float is for the doors only, rescale integers with requantize")
    scale = node.real("scale")
    if not (math.isfinite(scale) and scale > 0 and float(np.float32(scale)) == scale):
        raise fail(node, f"scale is {scale!r}, expected a positive float32 value")
    bounds = saturated(node, Interval(-(2**24), 2**24), int64=False)
    return TensorType(node.type.dtype, x.type.shape), bounds


def _dequantize(node: Node, x: Operand, scale: Operand) -> Checked:
    require_integer(node, x)
    require_dtype(node, scale, "float32")
    require_broadcast(node, x.type.shape, scale)
    if x.interval.minus(zero_point_of(node, "zero_point", x)).magnitude > 2**31 - 1:
        raise fail(node, "x - zero_point could overflow int32")
    return TensorType("float32", x.type.shape), Interval(0, 0)


def _linear(node: Node, x: Operand, weight: Operand, bias: Operand) -> Checked:
    require_dtype(node, x, *BYTES)
    require_dtype(node, weight, "int8")
    require_dtype(node, bias, "int32")
    assert weight.array is not None
    assert bias.array is not None
    if len(weight.type.shape) != 2 or not x.type.shape or x.type.shape[-1] != weight.type.shape[1]:
        raise fail(node, f"x is {x.type} and weight is {weight.type}, expected [..., K] and [N, K]")
    if bias.type.shape != (weight.type.shape[0],):
        raise fail(node, f"bias is {bias.type}, expected int32[{weight.type.shape[0]}]")
    weights = weight.array.astype(np.int64)
    positive, negative = np.maximum(weights, 0).sum(1), np.minimum(weights, 0).sum(1)
    # Kernels add in any order and may add the bias last or first, so the partial sums, which the
    # one-sided sums bound, must fit as well as the total.
    extremes = [
        [int(v) for v in positive * x.interval.high + negative * x.interval.low + bias.array],
        [int(v) for v in positive * x.interval.low + negative * x.interval.high + bias.array],
    ]
    reach = (np.abs(weights).sum(1) * x.interval.magnitude + np.abs(bias.array.astype(np.int64))).max()
    if int(reach) > INTEGER_RANGES["int32"][1]:
        channel = int((np.abs(weights).sum(1) * x.interval.magnitude + np.abs(bias.array.astype(np.int64))).argmax())
        raise fail(node, f"could overflow int32: output channel {channel} can reach {int(reach)}")
    low, high = min(min(e) for e in extremes), max(max(e) for e in extremes)
    return TensorType("int32", (*x.type.shape[:-1], weight.type.shape[0])), Interval(low, high)


def _matmul(node: Node, a: Operand, b: Operand) -> Checked:
    require_dtype(node, a, *BYTES, "int16")
    require_dtype(node, b, *BYTES)
    shape_a, shape_b = a.type.shape, b.type.shape
    if len(shape_a) < 2 or len(shape_b) < 2 or shape_a[:-2] != shape_b[:-2]:
        raise fail(node, f"a is {a.type} and b is {b.type}, expected equal leading axes and two matrix axes")
    if node.integer("transpose_b") not in (0, 1):
        raise fail(node, f"transpose_b is {node.integer('transpose_b')}, expected 0 or 1")
    rows_b, columns_b = shape_b[-2:][::-1] if node.integer("transpose_b") else shape_b[-2:]
    if shape_a[-1] != rows_b:
        raise fail(node, f"a is {a.type} and b is {b.type}: {shape_a[-1]} is not {rows_b}")
    left = a.interval.minus(zero_point_of(node, "zero_point_a", a))
    right = b.interval.minus(zero_point_of(node, "zero_point_b", b))
    # Probabilities share one total: a row of them never weighs more, however long it is.
    weight = shape_a[-1] * left.magnitude
    if a.node is not None and a.node.op == "shiftmax" and node.integer("zero_point_a") == 0:
        weight = min(weight, largest_row_sum(a.node, shape_a[-1]))
    if weight * right.magnitude > INTEGER_RANGES["int32"][1]:
        raise fail(node, f"could overflow int32: a sum can reach {weight * right.magnitude}")
    product = left.times(right)
    low, high = product.low * shape_a[-1], product.high * shape_a[-1]
    reach = weight * right.magnitude
    return TensorType("int32", (*shape_a[:-1], columns_b)), Interval(max(low, -reach), min(high, reach))


def _multiply(node: Node, a: Operand, b: Operand) -> Checked:
    require_dtype(node, a, "int8", "uint8", "int16")
    require_dtype(node, b, "int8", "uint8", "int16")
    shape = broadcast_shape(node, a, b)
    left = a.interval.minus(zero_point_of(node, "zero_point_a", a))
    return TensorType("int32", shape), left.times(b.interval.minus(zero_point_of(node, "zero_point_b", b)))


def _requantize(node: Node, x: Operand, multiplier: Operand) -> Checked:
    require_integer(node, x)
    require_dtype(node, multiplier, "int32")
    require_broadcast(node, x.type.shape, multiplier)
    product = x.interval.minus(zero_point_of(node, "input_zero_point", x)).times(multiplier.interval)
    return TensorType(node.type.dtype, x.type.shape), rescaled(node, product)


def _add(node: Node, a: Operand, b: Operand, multiplier_a: Operand, multiplier_b: Operand) -> Checked:
    for operand in (a, b):
        require_integer(node, operand)
    shape = broadcast_shape(node, a, b)
    for multiplier in (multiplier_a, multiplier_b):
        require_dtype(node, multiplier, "int32")
        require_broadcast(node, shape, multiplier)
    left = a.interval.minus(zero_point_of(node, "zero_point_a", a)).times(multiplier_a.interval)
    right = b.interval.minus(zero_point_of(node, "zero_point_b", b)).times(multiplier_b.interval)
    require_int64(node, left.magnitude + right.magnitude)
    return TensorType(node.type.dtype, shape), rescaled(node, left.plus(right))


def _table(node: Node, x: Operand, table: Operand) -> None:
    require_dtype(node, x, *BYTES)
    if table.type.shape != (256,):
        raise fail(node, f"table is {table.type}, expected 256 entries")


def _lookup(node: Node, x: Operand, table: Operand) -> Checked:
    _table(node, x, table)
    require_integer(node, table)
    return TensorType(table.type.dtype, x.type.shape), table.interval


def _exponentials(node: Node, x: Operand, table: Operand) -> Checked:
    _table(node, x, table)
    require_dtype(node, table, "uint8")
    assert table.array is not None
    if not x.type.shape or int(table.array[0]) < 1:
        raise fail(node, "expected at least one axis and table[0] >= 1, so that each row has a positive sum")
    return TensorType("uint8", x.type.shape), table.interval


def _row_sum(node: Node, x: Operand) -> Checked:
    if x.node is None or x.node.op != "exponentials":
        raise fail(node, f"expected the result of exponentials, got {x.name}")
    width = x.type.shape[-1]
    # The row's maximum is among the row, so at least one entry is table[0] >= 1.
    bounds = Interval(max(1, width * x.interval.low), width * x.interval.high)
    return TensorType("int32", (*x.type.shape[:-1], 1)), bounds


def _normalize_rows(node: Node, x: Operand, total: Operand, numerators: Operand) -> Checked:
    require_dtype(node, x, "uint8", "int32")
    require_dtype(node, numerators, "int64")
    require_broadcast(node, x.type.shape, numerators)
    if math.prod(numerators.type.shape[-2:]) != 1:
        raise fail(node, f"numerator is {numerators.type}, expected one entry for all rows and columns of a head")
    if total.node is None or total.node.op != "row_sum":
        raise fail(node, f"sum must be the result of row_sum, got {total.name}")
    if total.type.shape != (*x.type.shape[:-1], 1):
        raise fail(node, f"x is {x.type} and sum is {total.type}, expected one sum for each row")
    if numerators.interval.low < 1:
        raise fail(node, f"numerator is {numerators.interval.low}, expected 1 to 2^63 - 1")
    # An interval stands for the whole tensor, and the bound grows with the numerator: the largest bounds every head.
    weights, numerator = total.node.inputs[0], numerators.interval.high
    if x.name == weights:
        # Each entry is at most its row's sum.
        product = Interval(0, numerator)
    elif x.node is not None and x.node.op == "matmul" and x.node.inputs[0] == weights:
        if x.node.integer("zero_point_a") != 0:
            raise fail(node, "the weights of a normalized matmul must have zero point 0")
        # |sum e v| <= sum e * max |v|, and (numerator // sum) * sum <= numerator. The matmul's own bound is
        # count * max e * max |v|, and the largest sum is count * max e: their quotient is max |v|.
        reach = -(-x.interval.magnitude // total.interval.high)
        product = Interval(-numerator * reach, numerator * reach)
    else:
        raise fail(node, f"x must be the exponentials that were summed or their matmul, got {x.name}")
    return TensorType(node.type.dtype, x.type.shape), rescaled(node, product)


def _layer_norm(node: Node, x: Operand, weight: Operand, bias: Operand) -> Checked:
    require_dtype(node, x, "int8", "uint8", "int16")
    weights, biases = channel_constants(node, x, weight, bias)
    width = len(weights)
    epsilon = node.integer("epsilon")
    reach = x.interval.magnitude
    if epsilon < 1 or 2 * width * width * reach * reach + epsilon >= 2**62:
        raise fail(node, f"epsilon is {epsilon}; with {width} channels the variance must be in [1, 2^62)")
    # |C x - S| <= 2 C max|x|, and the reciprocal is at most 2^31.
    require_int64(node, (2 * width * reach << 31) + 2**40)
    normalized = (math.isqrt(width) + 1) << LAYER_NORM_FRACTION_BITS
    products = [abs(w) * normalized + abs(b) for w, b in zip(weights, biases, strict=True)]
    return TensorType(node.type.dtype, x.type.shape), rescaled(node, Interval(-max(products), max(products)))


def _reduce_sum(node: Node, x: Operand) -> Checked:
    require_dtype(node, x, "int8", "uint8", "int16")
    axis = _axis(node, x)
    shape = x.type.shape
    centred = x.interval.minus(zero_point_of(node, "zero_point", x))
    if centred.magnitude * shape[axis] > INTEGER_RANGES["int32"][1]:
        raise fail(node, f"could overflow int32: a sum can reach {centred.magnitude * shape[axis]}")
    bounds = Interval(centred.low * shape[axis], centred.high * shape[axis])
    return TensorType("int32", shape[:axis] + shape[axis + 1 :]), bounds


def _axis(node: Node, x: Operand) -> int:
    axis = node.integer("axis")
    if not 0 <= axis < len(x.type.shape):
        raise fail(node, f"axis {axis} is not an axis of {x.type}")
    return axis


def _patches(node: Node, x: Operand) -> Checked:
    require_dtype(node, x, *BYTES)
    if len(x.type.shape) != 3:
        raise fail(node, f"x is {x.type}, expected [channels, height, width]")
    channels, *extents = x.type.shape
    kernel, stride, padding = (node.integers(key) for key in ("kernel", "stride", "padding"))
    if {len(kernel), len(stride), len(padding)} != {2} or min(*kernel, *stride) < 1 or min(padding) < 0:
        raise fail(node, f"expected two positive kernel and stride, padding >= 0, got {kernel}, {stride}, {padding}")
    counts = [(e + 2 * p - k) // s + 1 for e, k, s, p in zip(extents, kernel, stride, padding, strict=True)]
    if min(counts) < 1:
        raise fail(node, f"the kernel {kernel} is larger than the padded image {extents}")
    pad_value = node.integer("pad_value")
    low, high = INTEGER_RANGES[x.type.dtype]
    if not low <= pad_value <= high:
        raise fail(node, f"pad_value {pad_value} does not fit {x.type.dtype}")
    bounds = Interval(min(x.interval.low, pad_value), max(x.interval.high, pad_value)) if max(padding) else x.interval
    return TensorType(x.type.dtype, (math.prod(counts), channels * math.prod(kernel))), bounds


def _reshape(node: Node, x: Operand) -> Checked:
    require_integer(node, x)
    shape = node.integers("shape")
    if math.prod(shape) != math.prod(x.type.shape) or any(extent < 1 for extent in shape):
        raise fail(node, f"cannot reshape {x.type} to {shape}")
    return TensorType(x.type.dtype, shape), x.interval


def _permute(node: Node, x: Operand) -> Checked:
    require_integer(node, x)
    axes = node.integers("axes")
    if sorted(axes) != list(range(len(x.type.shape))):
        raise fail(node, f"axes {axes} are not a permutation of the {len(x.type.shape)} axes of {x.type}")
    return TensorType(x.type.dtype, tuple(x.type.shape[axis] for axis in axes)), x.interval


def _slice(node: Node, x: Operand) -> Checked:
    require_integer(node, x)
    axis, start, stop, step = _axis(node, x), *(node.integer(key) for key in ("start", "stop", "step"))
    shape = x.type.shape
    if not (0 <= start < stop <= shape[axis] and step >= 1):
        raise fail(node, f"[{start}:{stop}:{step}] is empty or outside axis {axis} of {x.type}")
    return TensorType(x.type.dtype, (*shape[:axis], -(-(stop - start) // step), *shape[axis + 1 :])), x.interval


def _concat(node: Node, *parts: Operand) -> Checked:
    for part in parts:
        require_integer(node, part)
    axis, first = _axis(node, parts[0]), parts[0].type
    rest = {(p.type.dtype, p.type.shape[:axis], p.type.shape[axis + 1 :]) for p in parts}
    if all(part.array is not None for part in parts):
        raise fail(node, "all operands are constant; fold it when the program is built")
    if len(rest) > 1:
        raise fail(node, f"expected equal types except along axis {axis}, got {', '.join(str(p.type) for p in parts)}")
    extent = sum(part.type.shape[axis] for part in parts)
    bounds = Interval(min(p.interval.low for p in parts), max(p.interval.high for p in parts))
    return TensorType(first.dtype, (*first.shape[:axis], extent, *first.shape[axis + 1 :])), bounds


RULES: Mapping[str, Callable[..., Checked]] = MappingProxyType(
    {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "linear": _linear,
        "matmul": _matmul,
        "multiply": _multiply,
        "requantize": _requantize,
        "add": _add,
        "lookup": _lookup,
        "exponentials": _exponentials,
        "row_sum": _row_sum,
        "normalize_rows": _normalize_rows,
        "layer_norm": _layer_norm,
        "reduce_sum": _reduce_sum,
        "patches": _patches,
        "reshape": _reshape,
        "permute": _permute,
        "slice": _slice,
        "concat": _concat,
        **IVIT_RULES,
    }
)
