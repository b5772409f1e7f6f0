"""ONNX nodes of the published operators of I-ViT (arXiv 2207.01405), as :mod:`quantizers.integer.ivit` states them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ptq.onnx_integer.writer import ProgramWriter
from quantizers.integer.ivit import PAPER_START, RECIPROCAL
from quantizers.integer.program import Node

#: Shifts of 31 and more all give what sums are clipped to.
_LARGEST_SHIFT = 31
#: A sum of squares has fewer bits.
_LONGEST = 62


def _shift_exponential(w: ProgramWriter, distance: str, inverse: int, window: int) -> str:
    power = w.step("Add", distance, w.shift_right(distance, 1))
    power = w.step("Sub", power, w.shift_right(distance, 4))
    power = w.larger(power, -window * inverse)
    whole = w.floor_divide(w.step("Neg", power), inverse)
    rest = w.step("Add", power, w.step("Mul", whole, w.scalar(inverse)))
    shift = w.smaller(w.step("Sub", w.scalar(window), whole), _LARGEST_SHIFT)
    # The rest is above -inverse, so that this is positive.
    positive = w.step("Add", rest, w.scalar(2 * inverse))
    return w.floor_divide(w.step("Mul", positive, w.power_of_two(w.cast(shift, "uint64"))), 2)


def _reciprocal(w: ProgramWriter, total: str) -> str:
    return w.step("Div", w.scalar(RECIPROCAL), total)


def _shiftmax(w: ProgramWriter, node: Node) -> str:
    codes, last = w.cast(w.value(node.inputs[0]), "int32"), w.integers(-1)
    distance = w.cast(w.step("Sub", codes, w.step("ReduceMax", codes, last, keepdims=1)), "int64")
    exponentials = _shift_exponential(w, distance, node.integer("inverse_scale"), node.integer("window"))
    total = w.smaller(w.step("ReduceSum", exponentials, last, keepdims=1), RECIPROCAL)
    product = w.step("Mul", exponentials, _reciprocal(w, total))
    return w.cast(w.shift_right(product, 32 - node.integer("bits")), node.type.dtype)


def _shift_gelu(w: ProgramWriter, node: Node) -> str:
    narrow = w.centred(w.value(node.inputs[0]), node.integer("input_zero_point"), "int32")
    largest = w.cast(w.step("ReduceMax", narrow, w.integers(-1), keepdims=1), "int64")
    codes = w.cast(narrow, "int64")
    inverse, window = node.integer("inverse_scale"), node.integer("window")
    above = _shift_exponential(w, w.step("Sub", codes, largest), inverse, window)
    one = w.smaller(_shift_exponential(w, w.step("Neg", largest), inverse, window), RECIPROCAL)
    total = w.smaller(w.step("Add", above, one), RECIPROCAL)
    sigmoid = w.shift_right(w.step("Mul", above, _reciprocal(w, total)), 32 - node.integer("bits"))
    return w.cast(w.step("Mul", codes, sigmoid), "int32")


def _newton_root(w: ProgramWriter, value: str, start: int, iterations: int) -> str:
    root = w.scalar(1 << max(start, 0))
    if start == PAPER_START:
        powers = w.array(2 ** np.arange(_LONGEST, dtype=np.int64), "powers_of_two")
        reached = w.step("GreaterOrEqual", w.step("Unsqueeze", value, w.integers(-1)), powers)
        bits = w.step("ReduceSum", w.cast(reached, "int64"), w.integers(-1), keepdims=0)
        root = w.power_of_two(w.cast(w.step("Div", bits, w.scalar(2)), "uint64"))
    for _ in range(iterations):
        closer = w.step("Div", w.step("Add", root, w.step("Div", value, root)), w.scalar(2))
        root = w.larger(closer, 1)
    return root


def _i_layer_norm(w: ProgramWriter, node: Node) -> str:
    x, weight, bias = node.inputs
    width, last = node.type.shape[-1], w.integers(-1)
    codes = w.cast(w.value(x), "int64")
    doubled = w.step("Mul", w.step("ReduceSum", codes, last, keepdims=1), w.scalar(2))
    doubled = w.step("Add", doubled, w.scalar(width))
    mean = w.floor_divide(doubled, 2 * width)
    # That is half up; of an exact tie the even neighbour is wanted.
    tie = w.step("Equal", doubled, w.step("Mul", mean, w.scalar(2 * width)))
    odd = w.step("Equal", w.step("Mod", mean, w.scalar(2)), w.scalar(1))
    mean = w.step("Sub", mean, w.cast(w.step("And", tie, odd), "int64"))
    centred = w.step("Sub", codes, mean)
    squares = w.step("ReduceSum", w.step("Mul", centred, centred), last, keepdims=1)
    root = _newton_root(w, squares, node.integer("start"), node.integer("iterations"))
    normalized = w.shift_right(w.step("Mul", centred, _reciprocal(w, root)), 1)
    moved = w.step("Add", normalized, w.array(w.constant(bias).astype(np.int64), bias))
    weighted = w.step("Mul", moved, w.array(w.constant(weight).astype(np.int64), weight))
    return w.saturate(w.shift_round(weighted, node.integer("shift")))


PUBLISHED_WRITERS: Mapping[str, Callable[[ProgramWriter, Node], str]] = MappingProxyType(
    {"shiftmax": _shiftmax, "shift_gelu": _shift_gelu, "i_layer_norm": _i_layer_norm}
)
