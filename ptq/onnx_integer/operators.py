"""ONNX nodes of each operator of an IntegerProgram: the formulas of :mod:`quantizers.integer.ops`, nothing fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from ptq.onnx_integer.published import PUBLISHED_WRITERS
from ptq.onnx_integer.writer import ProgramWriter
from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import INTEGER_RANGES, Node

#: Writes the nodes of one operator and returns the name of its result.
Writer = Callable[[ProgramWriter, Node], str]

#: From 2^31 down, the error of Newton's root of a number in [2^60, 2^62) is below one after five steps, since each
#: squares the relative error, 1 at first, and halves it at least; the sixth step ends at the floor.
_NEWTON_STEPS = 6


def _quantize(w: ProgramWriter, node: Node) -> str:
    scale = w.array(np.array(node.real("scale"), np.float32), f"{node.name}_scale")
    rounded = w.step("Round", w.step("Div", w.value(node.inputs[0]), scale))
    # As in the interpreter: what is beyond int32 has a code as well.
    limits = (w.array(np.array(sign * 2.0**24, np.float32), f"float32_{sign}_24") for sign in (-1, 1))
    return w.saturate(w.cast(w.step("Clip", rounded, *limits), "int64"))


def _dequantize(w: ProgramWriter, node: Node) -> str:
    x, scale = node.inputs
    real = w.cast(w.centred(w.value(x), node.integer("zero_point"), "int32"), "float32")
    return w.step("Mul", real, w.array(w.constant(scale), scale))


def _unsigned(w: ProgramWriter, name: str, zero_point: int) -> tuple[str, str]:
    """Return an 8-bit operand as uint8, and its zero point.

    Products of uint8 with int8 saturate in runtimes on processors without 8-bit dot products; those of uint8 with uint8
    are exact on all of them.
    """
    if w.types[name].dtype == "uint8":
        return w.value(name), w.scalar(zero_point, "uint8")
    if name in w.program.constants:
        moved = (w.constant(name).astype(np.int16) + 128).astype(np.uint8)[None]
        return w.array(moved, f"{name}_unsigned"), w.scalar(zero_point + 128, "uint8")
    moved_codes = w.step("Add", w.cast(w.value(name), "int32"), w.scalar(128, "int32"))
    return w.cast(moved_codes, "uint8"), w.scalar(zero_point + 128, "uint8")


def _linear(w: ProgramWriter, node: Node) -> str:
    x, weight, bias = node.inputs
    codes = np.ascontiguousarray((w.constant(weight).astype(np.int16) + 128).astype(np.uint8).T)
    right = w.array(codes, f"{weight}_unsigned")
    if w.types[x].dtype in ("int8", "uint8"):
        left, zero = _unsigned(w, x, 0)
        sums = w.step("MatMulInteger", left, right, zero, w.scalar(128, "uint8"))
    else:
        wide = w.array(w.constant(weight).astype(np.int32).T, f"{weight}_wide")
        sums = w.step("MatMul", w.cast(w.value(x), "int32"), wide)
    return w.step("Add", sums, w.array(w.constant(bias), bias))


def _matmul(w: ProgramWriter, node: Node) -> str:
    a, b = node.inputs
    zeros = node.integer("zero_point_a"), node.integer("zero_point_b")
    fits = all(
        w.types[name].dtype in ("int8", "uint8") and low <= zero <= high
        for name, zero in zip((a, b), zeros, strict=True)
        for low, high in (INTEGER_RANGES.get(w.types[name].dtype, (0, 0)),)
    )
    if fits:
        (left, zero_a), (right, zero_b) = (_unsigned(w, name, zero) for name, zero in zip((a, b), zeros, strict=True))
    else:
        left, right = (w.centred(w.value(name), zero, "int32") for name, zero in zip((a, b), zeros, strict=True))
    if node.integer("transpose_b"):
        axes = len(w.types[b].shape) + 1
        right = w.step("Transpose", right, perm=(*range(axes - 2), axes - 1, axes - 2))
    if fits:
        return w.step("MatMulInteger", left, right, zero_a, zero_b)
    return w.step("MatMul", left, right)


def _multiply(w: ProgramWriter, node: Node) -> str:
    rank = len(node.type.shape)
    zeros = node.integer("zero_point_a"), node.integer("zero_point_b")
    sides = (w.centred(w.aligned(name, rank), zero, "int32") for name, zero in zip(node.inputs, zeros, strict=True))
    return w.step("Mul", *sides)


def _requantize(w: ProgramWriter, node: Node) -> str:
    x, multiplier = node.inputs
    factor = w.array(w.constant(multiplier).astype(np.int64), multiplier)
    product = w.step("Mul", w.centred(w.value(x), node.integer("input_zero_point")), factor)
    return w.saturate(w.shift_round(product, node.integer("shift")))


def _add(w: ProgramWriter, node: Node) -> str:
    rank = len(node.type.shape)
    zeros = node.integer("zero_point_a"), node.integer("zero_point_b")
    sides = [
        w.step(
            "Mul",
            w.centred(w.aligned(value, rank), zero),
            w.array(w.constant(multiplier).astype(np.int64), multiplier),
        )
        for value, multiplier, zero in zip(node.inputs[:2], node.inputs[2:], zeros, strict=True)
    ]
    return w.saturate(w.shift_round(w.step("Add", *sides), node.integer("shift")))


def _lookup(w: ProgramWriter, node: Node) -> str:
    x, table = node.inputs
    index = w.centred(w.value(x), INTEGER_RANGES[w.types[x].dtype][0], "int32")
    return w.step("Gather", w.array(w.constant(table), table), index, axis=0)


def _exponentials(w: ProgramWriter, node: Node) -> str:
    x, table = node.inputs
    codes = w.cast(w.value(x), "int32")
    distances = w.step("Sub", w.step("ReduceMax", codes, w.integers(-1), keepdims=1), codes)
    return w.step("Gather", w.array(w.constant(table), table), distances, axis=0)


def _row_sum(w: ProgramWriter, node: Node) -> str:
    return w.step("ReduceSum", w.cast(w.value(node.inputs[0]), "int32"), w.integers(-1), keepdims=1)


def _normalize_rows(w: ProgramWriter, node: Node) -> str:
    x, total, numerator = node.inputs
    # Both are positive, where truncation is the floor.
    reciprocal = w.step("Div", w.array(w.constant(numerator), numerator), w.cast(w.value(total), "int64"))
    product = w.step("Mul", w.cast(w.value(x), "int64"), reciprocal)
    return w.saturate(w.shift_round(product, node.integer("shift")))


def _layer_norm(w: ProgramWriter, node: Node) -> str:
    x, weight, bias = node.inputs
    width, last = w.scalar(node.type.shape[-1]), w.integers(-1)
    codes = w.cast(w.value(x), "int64")
    total = w.step("ReduceSum", codes, last, keepdims=1)
    squares = w.step("ReduceSum", w.step("Mul", codes, codes), last, keepdims=1)
    variance = w.step("Sub", w.step("Mul", squares, width), w.step("Mul", total, total))
    variance = w.step("Add", variance, w.scalar(node.integer("epsilon")))
    exponent = w.scalar(0)
    for step in (16, 8, 4, 2, 1):
        room = w.step("Less", variance, w.scalar(1 << (62 - 2 * step)))
        variance = w.step("Mul", variance, w.step("Where", room, w.scalar(1 << (2 * step)), w.scalar(1)))
        exponent = w.step("Add", exponent, w.step("Where", room, w.scalar(step), w.scalar(0)))
    root = w.scalar(1 << 31)
    for _ in range(_NEWTON_STEPS):
        closer = w.step("Div", w.step("Add", root, w.step("Div", variance, root)), w.scalar(2))
        root = w.smaller(closer, root)
    reciprocal = w.step("Div", w.scalar(1 << 61), root)
    shift = w.step("Sub", w.scalar(61 - LAYER_NORM_FRACTION_BITS), exponent)
    half = w.power_of_two(w.cast(w.step("Sub", shift, w.scalar(1)), "uint64"))
    centred = w.step("Sub", w.step("Mul", codes, width), total)
    scaled = w.step("Add", w.step("Mul", centred, reciprocal), half)
    normalized = w.shift_right(scaled, w.cast(shift, "uint64"))
    weighted = w.step("Mul", normalized, w.array(w.constant(weight).astype(np.int64), weight))
    result = w.step("Add", weighted, w.array(w.constant(bias).astype(np.int64), bias))
    return w.saturate(w.shift_round(result, node.integer("shift")))


def _reduce_sum(w: ProgramWriter, node: Node) -> str:
    codes = w.centred(w.value(node.inputs[0]), node.integer("zero_point"), "int32")
    return w.step("ReduceSum", codes, w.integers(node.integer("axis") + 1), keepdims=0)


def _patches(w: ProgramWriter, node: Node) -> str:
    """Windows by their positions in the padded image, which are known."""
    (x,) = node.inputs
    channels, height, width = w.types[x].shape
    (kernel_h, kernel_w), (stride_h, stride_w) = node.integers("kernel"), node.integers("stride")
    pad_h, pad_w = node.integers("padding")
    image = w.value(x)
    if pad_h or pad_w:
        fill = w.scalar(node.integer("pad_value"), w.types[x].dtype)
        image = w.step("Pad", image, w.integers(0, 0, pad_h, pad_w, 0, 0, pad_h, pad_w), fill, mode="constant")
    rows, columns = height + 2 * pad_h, width + 2 * pad_w
    positions = np.arange(channels * rows * columns, dtype=np.int64).reshape(channels, rows, columns)
    windows = np.lib.stride_tricks.sliding_window_view(positions, (kernel_h, kernel_w), axis=(1, 2))
    chosen = windows[:, ::stride_h, ::stride_w].transpose(1, 2, 0, 3, 4).reshape(node.type.shape)
    flat = w.step("Reshape", image, w.integers(0, -1))
    return w.step("Gather", flat, w.array(np.ascontiguousarray(chosen), f"{node.name}_positions"), axis=1)


def _reshape(w: ProgramWriter, node: Node) -> str:
    return w.step("Reshape", w.value(node.inputs[0]), w.integers(0, *node.integers("shape")))


def _permute(w: ProgramWriter, node: Node) -> str:
    return w.step("Transpose", w.value(node.inputs[0]), perm=(0, *(axis + 1 for axis in node.integers("axes"))))


def _slice(w: ProgramWriter, node: Node) -> str:
    bounds = (w.integers(node.integer(key)) for key in ("start", "stop"))
    axis, step = node.integer("axis") + 1, node.integer("step")
    return w.step("Slice", w.value(node.inputs[0]), *bounds, w.integers(axis), w.integers(step))


def _concat(w: ProgramWriter, node: Node) -> str:
    batched = next((name for name in node.inputs if w.is_batched(name)), None)
    parts = []
    for name in node.inputs:
        part = w.value(name)
        if batched is not None and not w.is_batched(name):
            # What is the same for every sample is repeated, as concatenation does not broadcast.
            extent = w.step("Shape", w.value(batched), start=0, end=1)
            ones = w.integers(*(1,) * len(w.types[name].shape))
            part = w.step("Expand", part, w.step("Concat", extent, ones, axis=0))
        parts.append(part)
    return w.step("Concat", *parts, axis=node.integer("axis") + 1)


WRITERS: Mapping[str, Writer] = MappingProxyType(
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
        **PUBLISHED_WRITERS,
    }
)
