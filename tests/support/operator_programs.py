"""Programs of single operators at the ends of their ranges, with images that reach these ends."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from support.programs import ProgramBuilder, saturate

from quantizers.integer.program import IntegerProgram

WIDTH = 37
ZEROS = {"int8": (-128, 0, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Case:
    """A program and batches for it.

    Args:
        program: any number of outputs.
        batches: for each batch, one float32 array for each input.
    """

    program: IntegerProgram
    batches: tuple[tuple[np.ndarray, ...], ...]


def codes(b: ProgramBuilder, dtype: str, *shape: int) -> str:
    """Codes of the whole range of an 8-bit or int16 type, straight from the image's integers."""
    image = b.inputs[0][0]
    assert b.inputs[0][1].shape == shape
    return b.node("quantize", (image,), dtype, shape, scale=1.0, **saturate(dtype))


def extremes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Images whose codes are the ends of each type, zero, their neighbours, and noise of all sizes."""
    ends = [-32768, -32767, -129, -128, -127, -1, 0, 1, 127, 128, 254, 255, 256, 32766, 32767]
    noise = rng.normal(0, 1, shape) * 10.0 ** rng.integers(0, 5, shape)
    return np.where(rng.random(shape) < 0.5, rng.choice(ends, shape), noise).astype(np.float32)


def case(b: ProgramBuilder, outputs: list[str]) -> Case:
    rng = np.random.default_rng(0)
    return Case(b.build(*outputs), tuple((extremes(rng, batch, *b.inputs[0][1].shape),) for batch in (1, 3)))


def quantize_rounds_exact_ties_to_even() -> Case:
    scales = [float(np.float32(s)) for s in (1.0, 0.5, 0.03, 0.1, 1 / 3, 1e-7, 3e5)]
    b = ProgramBuilder(64)
    outputs = [
        b.node("quantize", ("image",), dtype, (64,), scale=scale, **saturate(dtype, zero))
        for scale, (dtype, zero) in itertools.product(scales, [("int8", -3), ("uint8", 100), ("int16", 7)])
    ]
    program = b.build(*outputs)
    batches = []
    steps = np.concatenate([np.arange(-16, 16) + 0.5, np.arange(-15, 15), [1e30, -1e30]]).astype(np.float32)
    for scale in scales:
        image = (steps * np.float32(scale)).astype(np.float32)[None]
        batches.append((np.concatenate([image, np.nextafter(image, np.float32(0))]),))
    return Case(program, tuple(batches))


def quantize_divides_by_the_scale() -> Case:
    # x times the float32 reciprocal of the scale crosses a tie for some of these; the division does not.
    scale = float(np.float32(0.03))
    b = ProgramBuilder(20000)
    program = b.build(b.node("quantize", ("image",), "int16", (20000,), scale=scale, **saturate("int16")))
    ties = ((np.arange(20000) - 10000 + 0.5) * np.float64(np.float32(0.03))).astype(np.float32)
    return Case(program, ((ties[None],),))


def requantize_shifts_multipliers_and_zero_points(dtype: str) -> Case:
    b = ProgramBuilder(4, WIDTH)
    x = codes(b, dtype, 4, WIDTH)
    big = 2**31 - 1
    mixed = np.resize(np.array([big, -big - 1, -big, 1, -1, 0, 3, -3]), WIDTH).astype(np.int32)
    outputs = []
    for shift, multiplier in itertools.product((1, 31, 40, 62), (mixed, np.int32([-5]), np.int32([[7]]))):
        result = ("int8", "uint8", "int16")[shift % 3]
        outputs.append(
            b.node(
                "requantize", (x, b.constant(multiplier)), result, (4, WIDTH),
                input_zero_point=(0, 9)[shift % 2], shift=shift, **saturate(result, (0, 3)[shift % 2]),
            )
        )  # fmt: skip
    return case(b, outputs)


def requantize_of_full_int32() -> Case:
    b = ProgramBuilder(WIDTH)
    wide = b.node("multiply", (codes(b, "int16", WIDTH),) * 2, "int32", (WIDTH,), zero_point_a=0, zero_point_b=0)
    table = b.constant(np.resize(np.int32([2**31 - 1, -(2**31), 0, 1]), 256))
    byte = b.node("quantize", ("image",), "int8", (WIDTH,), scale=1.0, **saturate("int8"))
    ends = b.node("lookup", (byte, table), "int32", (WIDTH,))
    outputs = [
        b.node("requantize", (x, b.constant(np.int32([m]))), "int16", (WIDTH,), input_zero_point=0, shift=s,
               **saturate("int16"))
        for x, m, s in itertools.product((wide, ends), (2**31 - 1, -(2**31), 1), (1, 47, 61))
    ]  # fmt: skip
    high = b.node(
        "lookup", (byte, b.constant(np.resize(np.int32([2**31 - 1, 1 - 2**31, 2**24 + 1]), 256))), "int32", (WIDTH,)
    )
    outputs.append(b.node("dequantize", (high, b.constant(np.float32([0.1]))), "float32", (WIDTH,), zero_point=0))
    return case(b, outputs)


def add_broadcasts_and_rounds_once() -> Case:
    b = ProgramBuilder(3, 4, WIDTH)
    x = codes(b, "int16", 3, 4, WIDTH)
    one = b.constant(np.int32([2**30 - 1]))
    rng = np.random.default_rng(1)
    outputs = []
    for shape in ((WIDTH,), (4, WIDTH), (3, 1, WIDTH), (1, 4, 1), (1,)):
        other = b.constant(rng.integers(-32768, 32768, shape).astype(np.int16))
        multiplier = b.constant(rng.integers(-(2**31), 2**31, WIDTH).astype(np.int32))
        outputs += [
            b.node("add", (*pair, one, multiplier), "int16", (3, 4, WIDTH), zero_point_a=-2, zero_point_b=5,
                   shift=31, **saturate("int16", -1))
            for pair in ((x, other), (other, x))
        ]  # fmt: skip
    row = b.node("slice", (x,), "int16", (3, 1, WIDTH), axis=1, start=2, stop=3, step=1)
    outputs.append(
        b.node("add", (row, x, one, one), "int16", (3, 4, WIDTH), zero_point_a=0, zero_point_b=0, shift=31,
               **saturate("int16"))
    )  # fmt: skip
    return case(b, outputs)


def linear_with_extreme_weights_and_odd_sizes(dtype: str) -> Case:
    rng = np.random.default_rng(2)
    outputs = []
    b = ProgramBuilder(5, WIDTH)
    x = codes(b, dtype, 5, WIDTH)
    for count in (1, 16, 33, 64, 131):
        weight = rng.choice([-128, -127, 0, 127], (count, WIDTH)).astype(np.int8)
        weight[0], bias = -128, rng.choice([-(2**30), 2**30, 0], count).astype(np.int32)
        wide = b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (5, count))
        outputs.append(wide)
        fused = b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (5, count))
        multiplier = b.constant(rng.integers(-(2**20), 2**20, count if count % 2 else 1).astype(np.int32))
        outputs.append(
            b.node("requantize", (fused, multiplier), "int8", (5, count), input_zero_point=3, shift=33,
                   **saturate("int8", 1))
        )  # fmt: skip
    return case(b, outputs)


def matmul_zero_points_and_types(left: str, right: str) -> Case:
    b = ProgramBuilder(2, 7, 7)
    a, c = codes(b, left, 2, 7, 7), codes(b, right, 2, 7, 7)
    rng = np.random.default_rng(3)
    outputs = [
        b.node("matmul", (a, c), "int32", (2, 7, 7), zero_point_a=za, zero_point_b=zb, transpose_b=t)
        for za, zb, t in itertools.product((*ZEROS[left], 5), (*ZEROS[right], 6), (0, 1))
    ]
    constant = b.constant(rng.integers(-128, 128, (2, 7, 70)).astype(np.int8))
    outputs += [b.node("matmul", (a, constant), "int32", (2, 7, 70), zero_point_a=1, zero_point_b=2, transpose_b=0)]
    return case(b, outputs)


def softmax_operators() -> Case:
    b = ProgramBuilder(2, 3, WIDTH)
    outputs = []
    for dtype, first in (("int8", 255), ("uint8", 1)):
        x = codes(b, dtype, 2, 3, WIDTH)
        table = np.rint(first * np.exp(-0.02 * np.arange(256))).astype(np.uint8)
        e = b.node("exponentials", (x, b.constant(table)), "uint8", (2, 3, WIDTH))
        total = b.node("row_sum", (e,), "int32", (2, 3, 1))
        for numerator, shift in (([1], 1), ([2**31], 24), ([2**60], 55), ([[[2**60]], [[1]]], 55)):
            outputs.append(
                b.node("normalize_rows", (e, total, b.constant(np.array(numerator))), "uint8", (2, 3, WIDTH),
                       shift=shift, **saturate("uint8", 2))
            )  # fmt: skip
        outputs += [e, total]
    return case(b, outputs)


def layer_norm_square_root_is_exact(width: int) -> Case:
    b = ProgramBuilder(4, width)
    rng = np.random.default_rng(4)
    weight = b.constant(rng.integers(-(2**31), 2**31, width).astype(np.int32))
    bias = b.constant(rng.integers(-(2**50), 2**50, width).astype(np.int64))
    outputs = [
        b.node("layer_norm", (codes(b, dtype, 4, width), weight, bias), "int16", (4, width), epsilon=epsilon,
               shift=44, **saturate("int16", 1))
        for dtype, epsilon in itertools.product(("int8", "int16", "uint8"), (1, 3, 4**15 - 1, 2**59))
    ]  # fmt: skip
    images = extremes(rng, 6, 4, width)
    images[0] = 0
    images[1] = 32767
    images[2, :, ::2] = -32768
    return Case(b.build(*outputs), ((images,),))


def patches_with_padding_and_overlap() -> Case:
    b = ProgramBuilder(3, 9, 7)
    x = codes(b, "uint8", 3, 9, 7)
    outputs = []
    for kernel, stride, padding in (((3, 2), (2, 1), (1, 0)), ((4, 4), (3, 3), (2, 3)), ((1, 1), (1, 1), (0, 0))):
        counts = [(e + 2 * p - k) // s + 1 for e, p, k, s in zip((9, 7), padding, kernel, stride, strict=True)]
        outputs.append(
            b.node("patches", (x,), "uint8", (counts[0] * counts[1], 3 * kernel[0] * kernel[1]),
                   kernel=kernel, stride=stride, padding=padding, pad_value=200)
        )  # fmt: skip
    return case(b, outputs)


def views_concat_and_reductions() -> Case:
    b = ProgramBuilder(4, 6, 5)
    x = codes(b, "int16", 4, 6, 5)
    flat = b.node("reshape", (x,), "int16", (120,), shape=(120,))
    turned = b.node("permute", (x,), "int16", (5, 4, 6), axes=(2, 0, 1))
    odd = b.node("slice", (turned,), "int16", (5, 2, 6), axis=1, start=1, stop=4, step=2)
    again = b.node("reshape", (odd,), "int16", (4, 15), shape=(4, 15))
    back = b.node("permute", (again,), "int16", (15, 4), axes=(1, 0))
    every = b.node("slice", (flat,), "int16", (40,), axis=0, start=0, stop=120, step=3)
    token = b.constant(np.arange(20, dtype=np.int16).reshape(4, 1, 5))
    joined = b.node("concat", (token, x, token), "int16", (4, 8, 5), axis=1)
    sums = [
        b.node("reduce_sum", (joined,), "int32", shape, axis=axis, zero_point=axis)
        for axis, shape in enumerate(((8, 5), (4, 5), (4, 8)))
    ]
    total = b.node("reduce_sum", (flat,), "int32", (), axis=0, zero_point=0)
    scaled = b.node("dequantize", (total, b.constant(np.float32([0.3]).reshape(()))), "float32", (), zero_point=1)
    return case(b, [x, flat, turned, odd, again, back, every, joined, *sums, total, scaled, flat])


def lookup_reads_both_ends_of_the_table(dtype: str, width: int) -> Case:
    b = ProgramBuilder(width)
    x = codes(b, dtype, width)
    rng = np.random.default_rng(5)
    outputs = [
        b.node("lookup", (x, b.constant(rng.integers(*bounds, 256).astype(kind))), kind, (width,))
        for kind, bounds in (("int8", (-128, 128)), ("uint8", (0, 256)), ("int16", (-32768, 32768)))
    ]
    return case(b, outputs)


def two_inputs_share_a_batch() -> Case:
    b = ProgramBuilder(WIDTH)
    b.inputs = (*b.inputs, ("second", b.inputs[0][1]))
    first = codes(b, "int8", WIDTH)
    second = b.node("quantize", ("second",), "int8", (WIDTH,), scale=2.0, **saturate("int8"))
    program = b.build(b.node("multiply", (first, second), "int32", (WIDTH,), zero_point_a=-128, zero_point_b=127))
    rng = np.random.default_rng(6)
    return Case(program, ((extremes(rng, 3, WIDTH), extremes(rng, 3, WIDTH)),))


#: Products, which kernels of several instruction sets compute.
PRODUCTS: Mapping[str, Callable[[], Case]] = {
    **{
        f"linear {dtype}": functools.partial(linear_with_extreme_weights_and_odd_sizes, dtype)
        for dtype in ("int8", "uint8")
    },
    **{
        f"matmul {left} {right}": functools.partial(matmul_zero_points_and_types, left, right)
        for left, right in itertools.product(("int8", "uint8"), repeat=2)
    },
}
CASES: Mapping[str, Callable[[], Case]] = {
    "quantize: ties": quantize_rounds_exact_ties_to_even,
    "quantize: division": quantize_divides_by_the_scale,
    **{
        f"requantize {dtype}": functools.partial(requantize_shifts_multipliers_and_zero_points, dtype)
        for dtype in ("int8", "uint8", "int16")
    },
    "requantize int32": requantize_of_full_int32,
    "add": add_broadcasts_and_rounds_once,
    **PRODUCTS,
    "softmax": softmax_operators,
    **{
        f"layer_norm {width}": functools.partial(layer_norm_square_root_is_exact, width)
        for width in (1, 2, WIDTH, 1024)
    },
    "patches": patches_with_padding_and_overlap,
    "views": views_concat_and_reductions,
    **{
        f"lookup {dtype} {width}": functools.partial(lookup_reads_both_ends_of_the_table, dtype, width)
        for dtype, width in itertools.product(("int8", "uint8"), (WIDTH, 128))
    },
    "two inputs": two_inputs_share_a_batch,
}
