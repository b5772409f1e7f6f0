"""Every operator at the ends of its range, against the interpreter."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.programs import ProgramBuilder, saturate

from quantizers.integer.ops import OPS
from tvm_backend.build import build
from tvm_backend.kernels.cpu.emitters import EMITTERS
from tvm_backend.runtime import CompiledProgram

pytestmark = pytest.mark.tvm

WIDTH = 37
ZEROS = {"int8": (-128, 0, 127), "uint8": (0, 255)}


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


def run(b: ProgramBuilder, outputs: list[str], check, target: str = "native", batches=(1, 3)) -> None:
    program = b.build(*outputs)
    compiled = CompiledProgram(build(program, target))
    rng = np.random.default_rng(0)
    for batch in batches:
        check(program, compiled, extremes(rng, batch, *b.inputs[0][1].shape))


def test_emitters_cover_exactly_the_contract():
    assert set(EMITTERS) == set(OPS)


def test_quantize_rounds_exact_ties_to_even(check):
    scales = [float(np.float32(s)) for s in (1.0, 0.5, 0.03, 0.1, 1 / 3, 1e-7, 3e5)]
    b = ProgramBuilder(64)
    outputs = [
        b.node("quantize", ("image",), dtype, (64,), scale=scale, **saturate(dtype, zero))
        for scale, (dtype, zero) in itertools.product(scales, [("int8", -3), ("uint8", 100), ("int16", 7)])
    ]
    program = b.build(*outputs)
    compiled = CompiledProgram(build(program))
    steps = np.concatenate([np.arange(-16, 16) + 0.5, np.arange(-15, 15), [1e30, -1e30]]).astype(np.float32)
    for scale in scales:
        image = (steps * np.float32(scale)).astype(np.float32)[None]
        check(program, compiled, np.concatenate([image, np.nextafter(image, np.float32(0))]))


def test_quantize_divides_by_the_scale(check):
    # x times the float32 reciprocal of the scale crosses a tie for some of these; the division does not.
    scale = float(np.float32(0.03))
    b = ProgramBuilder(20000)
    program = b.build(b.node("quantize", ("image",), "int16", (20000,), scale=scale, **saturate("int16")))
    ties = ((np.arange(20000) - 10000 + 0.5) * np.float64(np.float32(0.03))).astype(np.float32)
    check(program, CompiledProgram(build(program)), ties[None])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_requantize_shifts_multipliers_and_zero_points(dtype, check):
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
    run(b, outputs, check)


def test_requantize_of_full_int32(check):
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
    run(b, outputs, check)


def test_add_broadcasts_and_rounds_once(check):
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
    run(b, outputs, check)


@pytest.mark.parametrize("target", ["native", "x86-64"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_linear_with_extreme_weights_and_odd_sizes(dtype, target, check):
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
    run(b, outputs, check, target)


@pytest.mark.parametrize("target", ["native", "x86-64"])
def test_linear_with_many_rows_shares_them_otherwise(target, check):
    # From 768 to 1536 rows on, by the height of the target's tile, threads keep to their rows.
    rng = np.random.default_rng(8)
    b = ProgramBuilder(520, WIDTH)
    x = codes(b, "int8", 520, WIDTH)
    outputs = []
    for half in (128, 8):
        weight = rng.integers(-half, half, (150, WIDTH)).astype(np.int8)
        weight[0], bias = -half, rng.integers(-1000, 1000, 150).astype(np.int32)
        outputs.append(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (520, 150)))
    run(b, outputs, check, target)


@pytest.mark.parametrize("target", ["native", "x86-64"])
@pytest.mark.parametrize("bits", [3, 4])
def test_linear_with_narrow_weights(bits, target, check):
    rng = np.random.default_rng(7)
    half = 1 << (bits - 1)
    outputs = []
    b = ProgramBuilder(45, WIDTH)
    x = codes(b, "uint8", 45, WIDTH)
    for count in (1, 31, 64, 131):
        weight = rng.choice([-half, 1 - half, -1, 0, 1, half - 1], (count, WIDTH)).astype(np.int8)
        weight[0], bias = -half, rng.integers(-1000, 1000, count).astype(np.int32)
        outputs.append(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (45, count)))
    program = b.build(*outputs)
    bundle = build(program, target)
    weights = [array for array in bundle.constants if array.dtype == np.uint8]
    assert len(weights) == 4
    assert sum(array.nbytes for array in weights) < 1.5 * bits / 8 * WIDTH * (16 + 32 + 64 + 144) + 4 * 96
    check(program, CompiledProgram(bundle), extremes(rng, 3, 45, WIDTH))


@pytest.mark.parametrize("target", ["native", "x86-64"])
@pytest.mark.parametrize(("left", "right"), list(itertools.product(["int8", "uint8"], repeat=2)))
def test_matmul_zero_points_and_types(left, right, target, check):
    b = ProgramBuilder(2, 7, 7)
    a, c = codes(b, left, 2, 7, 7), codes(b, right, 2, 7, 7)
    rng = np.random.default_rng(3)
    outputs = [
        b.node("matmul", (a, c), "int32", (2, 7, 7), zero_point_a=za, zero_point_b=zb, transpose_b=t)
        for za, zb, t in itertools.product((*ZEROS[left], 5), (*ZEROS[right], 6), (0, 1))
    ]
    constant = b.constant(rng.integers(-128, 128, (2, 7, 70)).astype(np.int8))
    outputs += [b.node("matmul", (a, constant), "int32", (2, 7, 70), zero_point_a=1, zero_point_b=2, transpose_b=0)]
    run(b, outputs, check, target)


def test_softmax_operators(check):
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
    run(b, outputs, check)


@pytest.mark.parametrize("width", [1, 2, WIDTH, 1024])
def test_layer_norm_square_root_is_exact(width, check):
    b = ProgramBuilder(4, width)
    rng = np.random.default_rng(4)
    weight = b.constant(rng.integers(-(2**31), 2**31, width).astype(np.int32))
    bias = b.constant(rng.integers(-(2**50), 2**50, width).astype(np.int64))
    outputs = [
        b.node("layer_norm", (codes(b, dtype, 4, width), weight, bias), "int16", (4, width), epsilon=epsilon,
               shift=44, **saturate("int16", 1))
        for dtype, epsilon in itertools.product(("int8", "int16", "uint8"), (1, 3, 4**15 - 1, 2**59))
    ]  # fmt: skip
    program = b.build(*outputs)
    compiled = CompiledProgram(build(program))
    images = extremes(rng, 6, 4, width)
    images[0] = 0
    images[1] = 32767
    images[2, :, ::2] = -32768
    check(program, compiled, images)


def test_patches_with_padding_and_overlap(check):
    b = ProgramBuilder(3, 9, 7)
    x = codes(b, "uint8", 3, 9, 7)
    outputs = []
    for kernel, stride, padding in (((3, 2), (2, 1), (1, 0)), ((4, 4), (3, 3), (2, 3)), ((1, 1), (1, 1), (0, 0))):
        counts = [(e + 2 * p - k) // s + 1 for e, p, k, s in zip((9, 7), padding, kernel, stride, strict=True)]
        outputs.append(
            b.node("patches", (x,), "uint8", (counts[0] * counts[1], 3 * kernel[0] * kernel[1]),
                   kernel=kernel, stride=stride, padding=padding, pad_value=200)
        )  # fmt: skip
    run(b, outputs, check)


def test_views_concat_and_reductions(check):
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
    run(b, [x, flat, turned, odd, again, back, every, joined, *sums, total, scaled, flat], check)


@pytest.mark.parametrize("width", [WIDTH, 128])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_lookup_reads_both_ends_of_the_table(dtype, width, check):
    b = ProgramBuilder(width)
    x = codes(b, dtype, width)
    rng = np.random.default_rng(5)
    outputs = [
        b.node("lookup", (x, b.constant(rng.integers(*bounds, 256).astype(kind))), kind, (width,))
        for kind, bounds in (("int8", (-128, 128)), ("uint8", (0, 256)), ("int16", (-32768, 32768)))
    ]
    run(b, outputs, check)


def test_two_inputs_share_a_batch(check):
    b = ProgramBuilder(WIDTH)
    b.inputs = (*b.inputs, ("second", b.inputs[0][1]))
    first = codes(b, "int8", WIDTH)
    second = b.node("quantize", ("second",), "int8", (WIDTH,), scale=2.0, **saturate("int8"))
    program = b.build(b.node("multiply", (first, second), "int32", (WIDTH,), zero_point_a=-128, zero_point_b=127))
    rng = np.random.default_rng(6)
    compiled = CompiledProgram(build(program))
    check(program, compiled, extremes(rng, 3, WIDTH), extremes(rng, 3, WIDTH))
