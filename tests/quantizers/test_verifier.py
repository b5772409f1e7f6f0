"""One bad program for each rule, and the message it gets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
from support.programs import ProgramBuilder, random_block, saturate
from support.published_programs import random_published_block

from quantizers.errors import ProgramError
from quantizers.integer.program import INTEGER_RANGES, IntegerProgram, Node, TensorType
from quantizers.integer.verify import verify

INT8 = saturate("int8")
BYTE_ZEROS = {"zero_point_a": 0, "zero_point_b": 0}


def int8(*values: int) -> np.ndarray:
    return np.array(values, np.int8)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def start(*shape: int, dtype: str = "int8") -> tuple[ProgramBuilder, str]:
    """A builder with one quantized input that spans its type as far as a door reaches."""
    b = ProgramBuilder(*shape)
    low, high = INTEGER_RANGES[dtype]
    return b, b.node("quantize", ("image",), dtype, shape, scale=0.5, zero_point=0, qmin=low, qmax=high)


def linear(weight: np.ndarray, bias: np.ndarray, *shape: int, dtype: str = "int8", out: int | None = None):
    b, x = start(*shape, dtype=dtype)
    out = len(bias) if out is None else out
    return b.build(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (*shape[:-1], out)))


def matmul(a: tuple[int, ...], c: tuple[int, ...], out: tuple[int, ...], dtype: str = "int8", **attributes):
    b, x = start(*a, dtype=dtype)
    b.inputs += (("other", TensorType("float32", c)),)
    y = b.node("quantize", ("other",), "int8", c, scale=0.5, **INT8)
    return b.build(b.node("matmul", (x, y), "int32", out, **(BYTE_ZEROS | {"transpose_b": 0} | attributes)))


def requantize(multiplier: np.ndarray, *, source: str = "int32", target: str = "int8", shape=(4,), **attributes):
    b, x = start(*shape, dtype=source)
    values = {"input_zero_point": 0, "shift": 20, **saturate("int8")} | attributes
    return b.build(b.node("requantize", (x, b.constant(multiplier)), target, shape, **values))


def add(shape_b=(4,), multiplier: np.ndarray | None = None, dtype_b: str = "int8", **attributes):
    b, x = start(4, dtype="int32")
    b.inputs += (("other", TensorType("float32", shape_b)),)
    low, high = INTEGER_RANGES[dtype_b]
    y = b.node("quantize", ("other",), dtype_b, shape_b, scale=0.5, zero_point=0, qmin=low, qmax=high)
    m = b.constant(int32(1) if multiplier is None else multiplier)
    values = {**BYTE_ZEROS, "shift": 10, **INT8} | attributes
    return b.build(b.node("add", (x, y, m, m), "int8", (4,), **values))


def one(op: str, shape: tuple, out: tuple, /, *constants: np.ndarray, dtype="int8", to=None, twice=False, **attributes):
    """One operator on a quantized input, or on the same one twice."""
    b, x = start(*shape, dtype=dtype)
    return b.build(b.node(op, (x,) * (1 + twice) + tuple(map(b.constant, constants)), to or dtype, out, **attributes))


def layer_norm(width: int = 4, dtype: str = "int16", weight=None, bias=None, **attributes):
    return one(
        *("layer_norm", (2, width), (2, width)),
        np.ones(width, np.int32) if weight is None else weight,
        np.zeros(width, np.int64) if bias is None else bias,
        **({"dtype": dtype, "to": "int8", "epsilon": 1, "shift": 20} | INT8 | attributes),
    )


def softmax(table: np.ndarray, shape=(2, 4), numerator=2**30, *, end=None) -> IntegerProgram:
    """Exponentials and their sums, normalized or as ``end(builder, codes, weights, sums)`` wants them."""
    b, x = start(*shape)
    weights = b.node("exponentials", (x, b.constant(table)), "uint8", shape)
    total = b.node("row_sum", (weights,), "int32", (*shape[:-1], 1))
    return b.build(end(b, x, weights, total) if end else normalized(b, weights, total, shape, numerator))


def normalized(b: ProgramBuilder, x: str, total: str, shape=(2, 4), numerator=2**30) -> str:
    operands = (x, total, b.constant(np.atleast_1d(numerator)))
    return b.node("normalize_rows", operands, "uint8", shape, shift=22, **saturate("uint8"))


def mixed_with_zero_point(b: ProgramBuilder, _x: str, weights: str, total: str) -> str:
    values = b.constant(np.ones((4, 4), np.int8))
    zeros = {"zero_point_a": 1, "zero_point_b": 0, "transpose_b": 0}
    return normalized(b, b.node("matmul", (weights, values), "int32", (2, 4), **zeros), total)


def sum_of_other_rows(b: ProgramBuilder, x: str, weights: str, _total: str) -> str:
    other = b.node("exponentials", (x, b.constant(DECAY)), "uint8", (2, 4))
    return normalized(b, weights, b.node("row_sum", (other,), "int32", (2, 1)))


def sums_of_another_shape(b: ProgramBuilder, _x: str, weights: str, total: str) -> str:
    return normalized(b, b.node("reshape", (weights,), "uint8", (4, 2), shape=(4, 2)), total, (4, 2))


DECAY = np.maximum(255 - np.arange(256), 0).astype(np.uint8)
PATCH = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "pad_value": 0}


def edited(change: Callable[[IntegerProgram], IntegerProgram]) -> IntegerProgram:
    return change(one("reshape", (4,), (2, 2), shape=(2, 2)))


def with_node(program: IntegerProgram, **changes) -> IntegerProgram:
    last = dataclasses.replace(program.nodes[-1], **changes)
    return dataclasses.replace(program, nodes=(*program.nodes[:-1], last))


def float_in_the_middle() -> IntegerProgram:
    b, x = start(4)
    real = b.node("dequantize", (x, b.constant(np.float32([1]))), "float32", (4,), zero_point=0)
    return b.build(b.node("quantize", (real,), "int8", (4,), scale=0.5, **INT8))


def float_view() -> IntegerProgram:
    b = ProgramBuilder(4)
    flat = b.node("reshape", ("image",), "float32", (2, 2), shape=(2, 2))
    return b.build(b.node("quantize", (flat,), "int8", (2, 2), scale=0.5, **INT8))


def dequantize(scale: np.ndarray, *, dtype: str = "int8", zero_point: int = 0) -> IntegerProgram:
    return one("dequantize", (4,), (4,), scale, dtype=dtype, to="float32", zero_point=zero_point)


def quantize(**attributes) -> IntegerProgram:
    b = ProgramBuilder(4)
    values = {"scale": 0.5, **INT8} | attributes
    return b.build(b.node("quantize", ("image",), "int8", (4,), **values))


def weight_as_value() -> IntegerProgram:
    b, x = start(4, 4)
    return b.build(b.node("linear", (x, x, b.constant(int32(0, 0, 0, 0))), "int32", (4, 4)))


def folded() -> IntegerProgram:
    b, _ = start(4)
    c = b.constant(int8(1, 2))
    return b.build(b.node("reshape", (c,), "int8", (2, 1), shape=(2, 1)))


def concat_of_types() -> IntegerProgram:
    b, x = start(2, 4)
    return b.build(b.node("concat", (x, b.constant(np.ones((1, 4), np.int16))), "int8", (3, 4), axis=0))


def concat_of_constants() -> IntegerProgram:
    b, _ = start(2, 4)
    c = b.constant(np.ones((1, 4), np.int8))
    return b.build(b.node("concat", (c, c), "int8", (2, 4), axis=0))


def row_sum_of_codes() -> IntegerProgram:
    return one("row_sum", (2, 4), (2, 1), to="int32")


def long_row() -> IntegerProgram:
    width = 2**31 // 255 + 1
    b, x = start(width)
    weights = b.node("exponentials", (x, b.constant(DECAY)), "uint8", (width,))
    return b.build(b.node("row_sum", (weights,), "int32", (1,)))


K_LIMIT = (2**31 - 1) // (128 * 128)
ZEROS4 = int32(0, 0, 0, 0)

BAD: dict[str, tuple[Callable[[], IntegerProgram], str]] = {
    # the program as a whole
    "input that is not float": (
        lambda: edited(lambda p: dataclasses.replace(p, inputs=(("image", TensorType("int8", (4,))),))),
        "input image: expected float32, got int8; quantize is the only entrance",
    ),
    "empty input": (lambda: ProgramBuilder(0, 4).build("image"), "input image: float32[0, 4] has no elements"),
    "no output": (lambda: edited(lambda p: dataclasses.replace(p, outputs=())), "the program has no output"),
    "output of nothing": (
        lambda: edited(lambda p: dataclasses.replace(p, outputs=(("y", "nowhere"),))),
        "output y: nowhere is not the result of an operator",
    ),
    "output that is an input": (
        lambda: start(4)[0].build("image"),
        "output out0: image is not the result of an operator",
    ),
    "two outputs of one name": (
        lambda: edited(lambda p: dataclasses.replace(p, outputs=(("y", "v0"), ("y", "v1")))),
        "two outputs share a name: y, y",
    ),
    "node named as another": (
        lambda: edited(lambda p: with_node(p, name="v0")),
        "reshape v0: the name is already taken",
    ),
    "constant named as an input": (
        lambda: edited(lambda p: dataclasses.replace(p, constants={"image": int8(1)})),
        "constant image: the name is already taken",
    ),
    "two inputs of one name": (
        lambda: edited(lambda p: dataclasses.replace(p, inputs=p.inputs * 2)),
        "input image: the name is already taken",
    ),
    "use before definition": (
        lambda: edited(lambda p: dataclasses.replace(p, nodes=p.nodes[::-1])),
        "reshape v1: v0 is not defined before it is used",
    ),
    "undefined value": (
        lambda: edited(lambda p: with_node(p, inputs=("ghost",))),
        "reshape v1: ghost is not defined before it is used",
    ),
    "unknown operator": (
        lambda: edited(lambda p: with_node(p, op="softmax")),
        "v1: unknown operator softmax; known are",
    ),
    "too many operands": (
        lambda: edited(lambda p: with_node(p, inputs=("v0", "v0"))),
        "reshape v1: expected 1 operands, got 2",
    ),
    "too few operands": (lambda: edited(lambda p: with_node(p, inputs=())), "reshape v1: expected 1 operands, got 0"),
    "missing attribute": (
        lambda: edited(lambda p: with_node(p, attributes={})),
        "reshape v1: expected attributes ['shape'], got []",
    ),
    "unknown attribute": (
        lambda: edited(lambda p: with_node(p, attributes={"shape": (2, 2), "order": 1})),
        "expected attributes ['shape'], got ['order', 'shape']",
    ),
    "attribute of another type": (
        lambda: edited(lambda p: with_node(p, attributes={"shape": 4})),
        "reshape v1: attribute shape is 4, expected a tuple of integers",
    ),
    "attribute of floats": (
        lambda: edited(lambda p: with_node(p, attributes={"shape": (2.0, 2)})),
        "expected a tuple of integers",
    ),
    "bool for an integer": (
        lambda: matmul((2, 4), (4, 3), (2, 3), transpose_b=False),
        "attribute transpose_b is False, expected an integer",
    ),
    "integer for a real": (lambda: quantize(scale=1), "attribute scale is 1, expected a real number such as 1.0"),
    "declared type": (
        lambda: edited(lambda p: with_node(p, type=TensorType("int8", (4, 1)))),
        "reshape v1: declared int8[4, 1], but its operands give int8[2, 2]",
    ),
    "all operands constant": (folded, "all operands are constant; fold it when the program is built"),
    "weight that is a value": (weight_as_value, "linear v1: weight must be a constant, got the value v0"),
    # constants
    "constant of NaN": (lambda: dequantize(np.float32([np.nan])), "constant c0: holds NaN or infinity"),
    "constant of float64": (lambda: dequantize(np.array([1.0])), "constant c0: dtype float64 is not one of int8"),
    "empty constant": (lambda: dequantize(np.zeros(0, np.float32)), "constant c0: has no elements"),
    "other byte order": (
        lambda: requantize(np.array([1]).astype(">i4")),
        "constant c0: has the other byte order; convert it with astype",
    ),
    # doors
    "scale of zero": (lambda: quantize(scale=0.0), "scale is 0.0, expected a positive float32 value"),
    "negative scale": (lambda: quantize(scale=-0.5), "scale is -0.5, expected a positive float32 value"),
    "infinite scale": (lambda: quantize(scale=float("inf")), "scale is inf, expected a positive float32 value"),
    "scale beyond float32": (lambda: quantize(scale=0.1), "scale is 0.1, expected a positive float32 value"),
    "qmin above zero point": (
        lambda: quantize(qmin=1, zero_point=0),
        "expected -128 <= qmin <= zero_point <= qmax <= 127, got 1, 0, 127",
    ),
    "qmax below zero point": (lambda: quantize(qmax=3, zero_point=4), "qmin <= zero_point <= qmax"),
    "qmax beyond the type": (lambda: quantize(qmax=128), "<= qmax <= 127, got -128, 0, 128"),
    "float inside": (float_in_the_middle, "quantize v2: v1 is not an input; float is for the doors only"),
    "view of float": (float_view, "reshape v0: operand image is float32[4], expected int8 or uint8 or int16 or int32"),
    "dequantize of too much": (
        lambda: dequantize(np.float32([1]), dtype="int32", zero_point=2**31 - 1 - 2**20),
        "x - zero_point could overflow int32",
    ),
    "scales that do not broadcast": (
        lambda: dequantize(np.ones(3, np.float32)),
        "c0 of shape (3,) does not broadcast to (4,)",
    ),
    "integer scales": (lambda: dequantize(int32(1)), "operand c0 is int32[1], expected float32"),
    # linear and matmul
    "overflowing linear": (
        lambda: linear(np.full((2, 4), -128, np.int8), int32(2**31 - 1 - 4 * 128 * 128, 2**31 - 4 * 128 * 128), 4),
        "could overflow int32: output channel 1 can reach 2147483648",
    ),
    "bias of the lowest int32": (lambda: linear(int8(0)[None], int32(-(2**31)), 1), "can reach 2147483648"),
    "wrong inner width": (
        lambda: linear(np.ones((3, 5), np.int8), int32(0, 0, 0), 4),
        "x is int8[4] and weight is int8[3, 5], expected [..., K] and [N, K]",
    ),
    "weight of three axes": (lambda: linear(np.ones((1, 3, 4), np.int8), int32(0), 4), "expected [..., K] and [N, K]"),
    "bias of another length": (
        lambda: linear(np.ones((3, 4), np.int8), int32(0), 4, out=3),
        "bias is int32[1], expected int32[3]",
    ),
    "linear on int16": (
        lambda: linear(np.ones((1, 4), np.int8), int32(0), 4, dtype="int16"),
        "operand v0 is int16[4], expected int8 or uint8",
    ),
    "weights of int16": (lambda: linear(np.ones((1, 4), np.int16), int32(0), 4), "expected int8"),
    "bias of int64": (lambda: linear(np.ones((1, 4), np.int8), np.zeros(1, np.int64), 4), "expected int32"),
    "matmul with K too large": (
        lambda: matmul((1, K_LIMIT + 1), (K_LIMIT + 1, 1), (1, 1)),
        "could overflow int32: a sum can reach 2147483648",
    ),
    "matmul with far zero point": (
        lambda: matmul((1, 70000), (70000, 1), (1, 1), zero_point_a=127),
        "could overflow int32: a sum can reach",
    ),
    "matmul of other leading axes": (
        lambda: matmul((2, 3, 4), (3, 4, 5), (2, 3, 5)),
        "expected equal leading axes and two matrix axes",
    ),
    "matmul of a vector": (lambda: matmul((4,), (4, 4), (4,)), "expected equal leading axes and two matrix axes"),
    "matmul of other widths": (lambda: matmul((2, 4), (5, 3), (2, 3)), "4 is not 5"),
    "matmul of other widths, transposed": (lambda: matmul((2, 4), (4, 3), (2, 3), transpose_b=1), "4 is not 3"),
    "transpose neither 0 nor 1": (
        lambda: matmul((2, 4), (4, 4), (2, 4), transpose_b=2),
        "transpose_b is 2, expected 0 or 1",
    ),
    "matmul with int16 on its right": (
        lambda: one("matmul", (4, 4), (4, 4), dtype="int16", to="int32", transpose_b=0, twice=True, **BYTE_ZEROS),
        "operand v0 is int16[4, 4], expected int8 or uint8",
    ),
    "matmul of int16 with K too large": (
        lambda: matmul((1, 512), (512, 1), (1, 1), dtype="int16"),
        "could overflow int32: a sum can reach 2147483648",
    ),
    "zero point outside its type": (
        lambda: matmul((2, 4), (4, 3), (2, 3), zero_point_b=128),
        "zero_point_b is 128, expected a code of v1, -128 to 127",
    ),
    # rescaling
    "shift 0": (lambda: requantize(int32(1), shift=0), "shift is 0, expected 1 to 62"),
    "shift 63": (lambda: requantize(int32(1), shift=63), "shift is 63, expected 1 to 62"),
    "shift that is no integer": (
        lambda: requantize(int32(1), shift=1.5),
        "attribute shift is 1.5, expected an integer",
    ),
    "result of int64": (
        lambda: requantize(int32(1), target="int64"),
        "the result is declared int64[4], expected int8 or uint8 or int16",
    ),
    "result of float": (lambda: requantize(int32(1), target="float32"), "the result is declared float32[4]"),
    "multiplier of int64": (lambda: requantize(np.array([1])), "operand c0 is int64[1], expected int32"),
    "multiplier that does not broadcast": (lambda: requantize(int32(1, 1, 1)), "does not broadcast to (4,)"),
    "multiplier with more axes": (
        lambda: requantize(np.ones((2, 1), np.int32)),
        "c0 of shape (2, 1) does not broadcast to (4,)",
    ),
    "requantize zero point": (
        lambda: requantize(int32(1), source="int8", input_zero_point=-129),
        "input_zero_point is -129, expected a code of v0",
    ),
    "add beyond int64": (
        lambda: add((4,), int32(-(2**31)), "int32", zero_point_a=-(2**31), zero_point_b=-(2**31)),
        "could overflow int64: an intermediate reaches",
    ),
    "add of shapes": (lambda: add((3,)), "int32[4] and int8[3] do not broadcast"),
    "add with long multipliers": (lambda: add(multiplier=int32(1, 1, 1)), "does not broadcast to (4,)"),
    "add of another declared shape": (lambda: add((2, 1)), "declared int8[4], but its operands give int8[2, 4]"),
    "multiply beyond int32": (
        lambda: one(
            *("multiply", (4,), (4,), np.full(4, -32768, np.int16)),
            dtype="int16",
            to="int32",
            zero_point_a=32767,
            zero_point_b=32767,
        ),
        "could overflow int32: the result lies in",
    ),
    "multiply of int32": (
        lambda: one("multiply", (4,), (4,), int8(1), dtype="int32", **BYTE_ZEROS),
        "expected int8 or uint8 or int16",
    ),
    "multiply of shapes": (
        lambda: one("multiply", (4,), (4,), int8(1, 2), to="int32", **BYTE_ZEROS),
        "do not broadcast",
    ),
    # tables and softmax
    "table of 255": (lambda: one("lookup", (4,), (4,), int8(*[0] * 255)), "table is int8[255], expected 256 entries"),
    "table on int16": (lambda: one("lookup", (4,), (4,), int8(*[0] * 256), dtype="int16"), "expected int8 or uint8"),
    "table of int64": (
        lambda: one("lookup", (4,), (4,), np.zeros(256, np.int64)),
        "operand c0 is int64[256], expected int8",
    ),
    "exponentials of int8": (
        lambda: one("exponentials", (2, 4), (2, 4), int8(*[1] * 256), to="uint8"),
        "operand c0 is int8[256], expected uint8",
    ),
    "exponentials that may vanish": (
        lambda: one("exponentials", (2, 4), (2, 4), np.zeros(256, np.uint8), to="uint8"),
        "table[0] >= 1, so that each row has a positive sum",
    ),
    "exponentials of a scalar": (
        lambda: one("exponentials", (), (), DECAY, to="uint8"),
        "expected at least one axis and table[0] >= 1",
    ),
    "row_sum of codes": (row_sum_of_codes, "row_sum v1: expected the result of exponentials, got v0"),
    "row_sum beyond int32": (long_row, "could overflow int32: the result lies in"),
    "normalize by something else": (
        lambda: softmax(DECAY, end=lambda b, _x, w, _t: normalized(b, w, w)),
        "normalize_rows v3: sum must be the result of row_sum, got v1",
    ),
    "normalize something else": (
        lambda: softmax(
            DECAY, end=lambda b, _x, w, t: normalized(b, b.node("lookup", (w, b.constant(DECAY)), "uint8", (2, 4)), t)
        ),
        "x must be the exponentials that were summed or their matmul, got v3",
    ),
    "normalize by the sum of other rows": (
        lambda: softmax(DECAY, end=sum_of_other_rows),
        "x must be the exponentials that were summed or their matmul",
    ),
    "normalize with zero point": (
        lambda: softmax(DECAY, end=mixed_with_zero_point),
        "the weights of a normalized matmul must have zero point 0",
    ),
    "normalize rows of another shape": (
        lambda: softmax(DECAY, end=sums_of_another_shape),
        "expected one sum for each row",
    ),
    "normalize codes": (
        lambda: softmax(DECAY, end=lambda b, x, _w, t: normalized(b, x, t)),
        "operand v0 is int8[2, 4], expected uint8 or int32",
    ),
    "numerator 0": (
        lambda: softmax(DECAY, end=lambda b, _x, w, t: normalized(b, w, t, numerator=0)),
        "numerator is 0, expected 1 to 2^63 - 1",
    ),
    "numerator of one head 0": (
        lambda: softmax(DECAY, (3, 2, 4), numerator=np.int64([2**30, 0, 1]).reshape(3, 1, 1)),
        "numerator is 0, expected 1 to 2^63 - 1",
    ),
    "numerator of another type": (
        lambda: softmax(DECAY, end=lambda b, _x, w, t: normalized(b, w, t, numerator=int32(2**30))),
        "operand c1 is int32[1], expected int64",
    ),
    "numerator of a row": (
        lambda: softmax(DECAY, (3, 2, 4), numerator=np.full((2, 1), 2**30)),
        "numerator is int64[2, 1], expected one entry for all rows and columns of a head",
    ),
    "numerator of a column": (
        lambda: softmax(DECAY, numerator=np.full(4, 2**30)),
        "numerator is int64[4], expected one entry for all rows and columns of a head",
    ),
    "numerator of other heads": (
        lambda: softmax(DECAY, (3, 2, 4), numerator=np.full((2, 1, 1), 2**30)),
        "c1 of shape (2, 1, 1) does not broadcast to (3, 2, 4)",
    ),
    "numerator that is a value": (
        lambda: softmax(
            DECAY,
            end=lambda b, _x, w, t: b.node("normalize_rows", (w, t, t), "uint8", (2, 4), shift=22, **saturate("uint8")),
        ),
        "numerator must be a constant, got the value v2",
    ),
    "numerator of one head that overflows": (
        lambda: softmax(DECAY, (3, 2, 4), numerator=np.int64([1, 2**63 - 1, 1]).reshape(3, 1, 1)),
        "could overflow int64: an intermediate reaches",
    ),
    "numerator that overflows with the half": (
        lambda: softmax(DECAY, end=lambda b, _x, w, t: normalized(b, w, t, numerator=2**63 - 1)),
        "could overflow int64: an intermediate reaches",
    ),
    # layer_norm
    "epsilon 0": (lambda: layer_norm(epsilon=0), "epsilon is 0; with 4 channels the variance must be in [1, 2^62)"),
    "layer_norm too wide": (lambda: layer_norm(2**16), "with 65536 channels the variance must be in [1, 2^62)"),
    "layer_norm on int32": (
        lambda: layer_norm(dtype="int32"),
        "operand v0 is int32[2, 4], expected int8 or uint8 or int16",
    ),
    "layer_norm weights": (lambda: layer_norm(weight=int32(1)), "expected one entry a channel"),
    "layer_norm bias of int32": (lambda: layer_norm(bias=ZEROS4), "expected int64"),
    "layer_norm beyond int64": (
        lambda: layer_norm(bias=np.full(4, 2**63 - 1, np.int64)),
        "could overflow int64: an intermediate reaches",
    ),
    "layer_norm bias of the lowest int64": (
        lambda: layer_norm(bias=np.full(4, -(2**63), np.int64)),
        "could overflow int64",
    ),
    "layer_norm shift": (lambda: layer_norm(shift=63), "shift is 63, expected 1 to 62"),
    # sums, patches, views
    "sum beyond int32": (
        lambda: one("reduce_sum", (2**16,), (), dtype="int16", to="int32", axis=0, zero_point=0),
        "could overflow int32: a sum can reach 2147483648",
    ),
    "sum of int32": (lambda: one("reduce_sum", (4,), (), dtype="int32", axis=0, zero_point=0), "expected int8"),
    "sum over no axis": (
        lambda: one("reduce_sum", (4,), (), to="int32", axis=1, zero_point=0),
        "axis 1 is not an axis of int8[4]",
    ),
    "sum over a negative axis": (
        lambda: one("reduce_sum", (4,), (), to="int32", axis=-1, zero_point=0),
        "axis -1 is not an axis",
    ),
    "sum with a far zero point": (
        lambda: one("reduce_sum", (4,), (), to="int32", axis=0, zero_point=200),
        "zero_point is 200, expected a code",
    ),
    "patches of a matrix": (lambda: one("patches", (4, 4), (4, 4), **PATCH), "expected [channels, height, width]"),
    "patches without kernel": (
        lambda: one("patches", (1, 4, 4), (4, 4), **(PATCH | {"kernel": ()})),
        "expected two positive kernel and stride",
    ),
    "patches with stride 0": (
        lambda: one("patches", (1, 4, 4), (4, 4), **(PATCH | {"stride": (0, 2)})),
        "expected two positive kernel and stride",
    ),
    "patches with negative padding": (
        lambda: one("patches", (1, 4, 4), (4, 4), **(PATCH | {"padding": (-1, 0)})),
        "padding >= 0",
    ),
    "patches of a small image": (
        lambda: one("patches", (1, 1, 4), (4, 4), **PATCH),
        "the kernel (2, 2) is larger than the padded image [1, 4]",
    ),
    "patches padded beyond the type": (
        lambda: one("patches", (1, 4, 4), (4, 4), **(PATCH | {"pad_value": 200})),
        "pad_value 200 does not fit int8",
    ),
    "patches of int16": (lambda: one("patches", (1, 4, 4), (4, 4), dtype="int16", **PATCH), "expected int8 or uint8"),
    "reshape to another size": (lambda: one("reshape", (4,), (3,), shape=(3,)), "cannot reshape int8[4] to (3,)"),
    "reshape with minus one": (
        lambda: one("reshape", (4,), (4,), shape=(-1, -4)),
        "cannot reshape int8[4] to (-1, -4)",
    ),
    "permute twice the same": (
        lambda: one("permute", (2, 2), (2, 2), axes=(0, 0)),
        "are not a permutation of the 2 axes",
    ),
    "empty slice": (
        lambda: one("slice", (4,), (0,), axis=0, start=2, stop=2, step=1),
        "[2:2:1] is empty or outside axis 0 of int8[4]",
    ),
    "slice outside": (lambda: one("slice", (4,), (5,), axis=0, start=0, stop=5, step=1), "[0:5:1] is empty or outside"),
    "slice backwards": (
        lambda: one("slice", (4,), (4,), axis=0, start=0, stop=4, step=-1),
        "[0:4:-1] is empty or outside",
    ),
    "concat of constants": (
        concat_of_constants,
        "concat v1: all operands are constant; fold it when the program is built",
    ),
    "concat of other types": (concat_of_types, "expected equal types except along axis 0, got int8[2, 4], int16[1, 4]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_program_is_refused_with_its_message(case: str) -> None:
    build, message = BAD[case]
    with pytest.raises(ProgramError, match=re.escape(message)):
        verify(build())


GOOD: dict[str, Callable[[], IntegerProgram]] = {
    "a view": lambda: edited(lambda p: p),
    "linear at the limit": lambda: linear(np.full((1, 4), -128, np.int8), int32(2**31 - 1 - 4 * 128 * 128), 4),
    "matmul at the limit": lambda: matmul((1, K_LIMIT), (K_LIMIT, 1), (1, 1)),
    "requantize at the ends": lambda: requantize(int32(-(2**31), 2**31 - 1, 0, 1), shift=62),
    "sum at the limit": lambda: one("reduce_sum", (2**16 - 1,), (), dtype="int16", to="int32", axis=0, zero_point=0),
    "patches": lambda: one("patches", (1, 4, 4), (4, 4), **PATCH),
    "layer_norm": layer_norm,
    "softmax": lambda: softmax(DECAY, end=lambda b, _x, w, t: normalized(b, w, t)),
    "quantize": quantize,
    "add": add,
}


@pytest.mark.parametrize("case", GOOD)
def test_the_same_builders_make_good_programs(case: str) -> None:
    """Without this a bad program might be refused for something else than what it is about."""
    verify(GOOD[case]())


def test_the_place_in_the_model_is_named() -> None:
    program = requantize(int32(1), shift=0)
    node = dataclasses.replace(program.nodes[-1], source="blocks.3.mlp.fc1")
    with pytest.raises(ProgramError, match=r"requantize v1 \(blocks\.3\.mlp\.fc1\): shift is 0"):
        verify(dataclasses.replace(program, nodes=(program.nodes[0], node)))


def test_random_programs_use_every_operator() -> None:
    from quantizers.integer.ops import OPS

    programs = (random_block(0), random_published_block(0))
    assert {node.op for program in programs for node in program.nodes} == set(OPS)


def test_types_lists_every_value_and_text_every_line() -> None:
    program = random_block(0)
    names = {name for name, _ in program.inputs} | set(program.constants) | {node.name for node in program.nodes}
    assert set(program.types()) == names
    assert len(program.to_text().splitlines()) == len(names) + len(program.outputs)


def test_attributes_are_read_with_their_type() -> None:
    node = Node("y", "slice", ("x",), {"axis": 1.0, "scale": True}, TensorType("int8", (1,)), "")
    with pytest.raises(TypeError, match=r"slice y: attribute axis is 1\.0, expected an integer"):
        node.integer("axis")
    with pytest.raises(TypeError, match="attribute scale is True, expected a real number"):
        node.real("scale")
