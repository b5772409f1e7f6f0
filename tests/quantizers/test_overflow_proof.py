"""The proof holds: whatever the constants and the images, no value leaves the verifier's interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import ProgramBuilder, random_block, saturate
from support.published_programs import random_published_block

from quantizers.errors import ProgramError
from quantizers.integer.bounds import Interval
from quantizers.integer.interpret import interpret, run
from quantizers.integer.program import INTEGER_RANGES, IntegerProgram, TensorType
from quantizers.integer.verify import verify

FLOAT32_MAX = float(np.finfo(np.float32).max)

blocks = st.builds(
    random_block,
    st.integers(0, 10**6),
    tokens=st.integers(2, 6),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    channels=st.integers(1, 3),
    patch=st.integers(1, 3),
)


published_blocks = st.builds(
    random_published_block,
    st.integers(0, 10**6),
    tokens=st.integers(1, 6),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    bits=st.sampled_from([8, 16]),
)


def extreme_images(program: IntegerProgram, seed: int) -> torch.Tensor:
    """Images of the ends of float32, of single outliers, of constants, and of noise at every magnitude."""
    rng = np.random.default_rng(seed)
    shape = program.inputs[0][1].shape
    size = int(np.prod(shape))
    signs = rng.choice([-FLOAT32_MAX, FLOAT32_MAX, 0.0], (2, size))
    outlier = np.zeros((2, size))
    outlier[[0, 1], rng.integers(0, size, 2)] = [FLOAT32_MAX, -FLOAT32_MAX]
    constant = np.array([[FLOAT32_MAX], [-FLOAT32_MAX], [0.0]]) * np.ones(size)
    noise = rng.normal(0, 1, (3, size)) * 10.0 ** rng.integers(-6, 6, (3, 1))
    images = np.concatenate([signs, outlier, constant, noise]).astype(np.float32)
    return torch.from_numpy(images.reshape(-1, *shape))


def assert_within_bounds(program: IntegerProgram, *inputs: torch.Tensor) -> None:
    bounds, values = verify(program), run(program, inputs)
    for node in program.nodes:
        if node.op == "dequantize":
            continue
        value, interval = values[node.name], bounds[node.name]
        low, high = int(value.min()), int(value.max())
        assert interval.low <= low, (node.op, node.name, interval, low)
        assert high <= interval.high, (node.op, node.name, interval, high)
        type_low, type_high = INTEGER_RANGES[node.type.dtype]
        assert type_low <= interval.low <= interval.high <= type_high


@given(program=st.one_of(blocks, published_blocks), seed=st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_values_of_random_programs_lie_within_their_bounds(program: IntegerProgram, seed: int) -> None:
    assert_within_bounds(program, extreme_images(program, seed))


@given(
    seed=st.integers(0, 10**6),
    keys=st.integers(1, 20),
    zero_point=st.integers(-128, 127),
    shift=st.integers(1, 62),
    numerators=st.lists(st.integers(1, 2**62), min_size=1, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_the_bound_of_normalized_rows_holds_for_every_table(
    seed: int, keys: int, zero_point: int, shift: int, numerators: list[int]
) -> None:
    """``|sum e v| (numerator // sum e) <= numerator max |v|``, for tables that do not even decay."""
    rng = np.random.default_rng(seed)
    heads = len(numerators)
    b = ProgramBuilder(heads, 2, keys)
    b.inputs += (("values", TensorType("float32", (heads, keys, 3))),)
    scores, values = (
        b.node("quantize", (name,), "int8", kind.shape, scale=1.0, **saturate("int8")) for name, kind in b.inputs
    )
    table = rng.integers(0, 256, 256).astype(np.uint8)
    table[0] = max(int(table[0]), 1)
    weights = b.node("exponentials", (scores, b.constant(table)), "uint8", (heads, 2, keys))
    total = b.node("row_sum", (weights,), "int32", (heads, 2, 1))
    zeros = {"zero_point_a": 0, "zero_point_b": zero_point, "transpose_b": 0}
    mixed = b.node("matmul", (weights, values), "int32", (heads, 2, 3), **zeros)
    limits = {"zero_point": 0, "qmin": -(2**31), "qmax": 2**31 - 1}
    operands = (mixed, total, b.constant(np.int64(numerators).reshape(heads, 1, 1)))
    rows = b.node("normalize_rows", operands, "int32", (heads, 2, 3), shift=shift, **limits)
    program = b.build(rows)
    try:
        verify(program)
    except ProgramError as error:
        # The one honest refusal: the numerator is too large for int64.
        assert "could overflow int64" in str(error)  # noqa: PT017 - a program is either proved or refused
        return
    codes = [rng.integers(-128, 128, (4, *kind.shape)).astype(np.float32) for _, kind in b.inputs]
    codes[1][0] = -128.0
    assert_within_bounds(program, *map(torch.from_numpy, codes))


def test_the_bound_of_normalized_rows_is_attained_by_the_head_of_the_largest_numerator() -> None:
    """One key of the lowest code: its exponential divides out, and the sum is ``-128 numerator``."""
    b = ProgramBuilder(3, 1, 1)
    x = b.node("quantize", ("image",), "int8", (3, 1, 1), scale=1.0, **saturate("int8"))
    weights = b.node("exponentials", (x, b.constant(np.full(256, 255, np.uint8))), "uint8", (3, 1, 1))
    total = b.node("row_sum", (weights,), "int32", (3, 1, 1))
    zeros = {"zero_point_a": 0, "zero_point_b": 0, "transpose_b": 0}
    mixed = b.node("matmul", (weights, x), "int32", (3, 1, 1), **zeros)
    numerators = 255 * np.int64([[[2]], [[2**20]], [[2**10]]])
    limits = {"zero_point": 0, "qmin": -(2**31), "qmax": 2**31 - 1}
    rows = b.node("normalize_rows", (mixed, total, b.constant(numerators)), "int32", (3, 1, 1), shift=4, **limits)
    program = b.build(rows)
    (found,) = interpret(program, torch.full((1, 3, 1, 1), -128.0))
    assert found.flatten().tolist() == [-128 * 255 * n // 16 for n in (2, 2**20, 2**10)]
    assert verify(program)[rows].low == int(found.min())


def _layer_norm(width: int, dtype: str, *, gain: int) -> IntegerProgram:
    b = ProgramBuilder(1, width)
    low, high = INTEGER_RANGES[dtype]
    x = b.node("quantize", ("image",), dtype, (1, width), scale=1.0, zero_point=0, qmin=low, qmax=high)
    constants = b.constant(np.full(width, gain, np.int32)), b.constant(np.zeros(width, np.int64))
    limits = {"zero_point": 0, "qmin": -(2**31), "qmax": 2**31 - 1}
    return b.build(b.node("layer_norm", (x, *constants), "int32", (1, width), epsilon=1, shift=1, **limits))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 15, 16, 17, 99, 384, 1023, 1024])
def test_the_bound_of_layer_norm_holds_where_it_is_tightest(width: int, dtype: str) -> None:
    """One outlier among equals has the largest normalized value there is, ``sqrt(C - 1)``; the bound adds at most 2."""
    program = _layer_norm(width, dtype, gain=64)
    low, high = INTEGER_RANGES[dtype]
    rows = np.full((6, 1, width), 0.0, np.float32)
    rows[0, 0, 0], rows[1, 0, 0], rows[2, 0, 0] = high, low, 1
    rows[3], rows[3, 0, -1] = high, low
    rows[4], rows[4, 0, -1] = low, high
    rows[5, 0] = np.random.default_rng(0).integers(low, high, width)
    assert_within_bounds(program, torch.from_numpy(rows))
    name = program.nodes[-1].name
    reached = int(run(program, [torch.from_numpy(rows)])[name].abs().max())
    proved = verify(program)[name].magnitude
    one = 64 * 2**20 / 2
    assert proved <= reached + 2 * one


def test_bounds_of_a_linear_are_attained() -> None:
    """Not only safe but exact: some input reaches both ends."""
    rng = np.random.default_rng(0)
    weight, bias = rng.integers(-128, 128, (5, 9)).astype(np.int8), rng.integers(-999, 999, 5).astype(np.int32)
    b = ProgramBuilder(9)
    x = b.node("quantize", ("image",), "int8", (9,), scale=1.0, **saturate("int8"))
    y = b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (5,))
    program = b.build(y)
    corners = np.concatenate([np.where(weight > 0, 127, -128), np.where(weight > 0, -128, 127)]).astype(np.float32)
    reached = run(program, [torch.from_numpy(corners)])[y]
    assert verify(program)[y] == Interval(int(reached.min()), int(reached.max()))


def test_intervals_compute_exactly() -> None:
    assert Interval(-3, 5).times(Interval(-7, 2)) == Interval(-35, 21)
    assert Interval(-3, 5).minus(2).plus(Interval(1, 1)) == Interval(-4, 4)
    assert Interval(-3, 2).magnitude == 3


@pytest.mark.parametrize("images", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_refused(images: float) -> None:
    from quantizers.errors import DataError

    program = random_block(0)
    with pytest.raises(DataError, match="input image holds NaN or infinity"):
        run(program, [torch.full((1, *program.inputs[0][1].shape), images)])


def test_the_batch_size_changes_nothing() -> None:
    program = random_block(1)
    images = extreme_images(program, 1)
    together = run(program, [images])
    for index in range(len(images)):
        alone = run(program, [images[index : index + 1]])
        for node in program.nodes:
            assert torch.equal(alone[node.name][0], together[node.name][index]), node.name
