"""The published operators of I-ViT: against twins written from the formulas, at exact ties and extremes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import ProgramBuilder, saturate
from support.published_programs import random_published_block, random_tokens
from support.twins import extremes, run_checked

from quantizers.errors import ProgramError
from quantizers.integer import interpret_ivit, ivit
from quantizers.integer.program import INTEGER_RANGES, IntegerProgram, TensorType
from quantizers.integer.verify import verify

#: Inverse scales and windows; the largest exponential, their product, still fits int32 for a result of 16 bits.
SETTINGS = [(i, w) for i, w in itertools.product((1, 2, 3, 7, 54, 255, 2**24), (1, 7, 15, 23)) if i << w < 2**31]


def codes_of(dtype: str, *shape: int) -> tuple[ProgramBuilder, str]:
    b = ProgramBuilder(*shape)
    low, high = INTEGER_RANGES[dtype]
    return b, b.node("quantize", ("image",), dtype, shape, scale=1.0, zero_point=0, qmin=low, qmax=high)


def run(b: ProgramBuilder, name: str, codes: np.ndarray) -> np.ndarray:
    return run_checked(b.build(name), codes.astype(np.float32))[name]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("inverse", "window"), SETTINGS)
def test_shiftmax(dtype: str, bits: int, inverse: int, window: int) -> None:
    rng = np.random.default_rng(0)
    b, x = codes_of(dtype, 4, 7)
    kind = {8: "int8", 16: "int16"}[bits]
    y = b.node("shiftmax", (x,), kind, (4, 7), inverse_scale=inverse, window=window, bits=bits)
    codes = extremes(rng, dtype, (3, 4, 7))
    codes[0, 0] = 5  # a flat row
    codes[0, 1] = np.arange(7) * 16  # exact multiples of the shifts
    run(b, y, codes)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("zero_point", [0, 9])
@pytest.mark.parametrize(("inverse", "window"), SETTINGS)
def test_shift_gelu(dtype: str, zero_point: int, inverse: int, window: int) -> None:
    rng = np.random.default_rng(1)
    b, x = codes_of(dtype, 4, 7)
    attributes = {"input_zero_point": zero_point, "inverse_scale": inverse, "window": window, "bits": 8}
    y = b.node("shift_gelu", (x,), "int32", (4, 7), **attributes)
    codes = extremes(rng, dtype, (3, 4, 7))
    low, _ = INTEGER_RANGES[dtype]
    codes[0, 0] = low  # a row far below zero: the other exponential is clipped
    codes[0, 1] = np.clip(np.arange(7) - 9, low, None)  # rows around zero
    run(b, y, codes)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
@pytest.mark.parametrize("start", [-1, 0, 16, 31])
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_i_layer_norm(dtype: str, width: int, start: int, iterations: int) -> None:
    rng = np.random.default_rng(2)
    b, x = codes_of(dtype, 5, width)
    weight = b.constant(extremes(rng, "int32", (width,)))
    bias = b.constant(extremes(rng, "int32", (width,)).astype(np.int64))
    attributes = {"start": start, "iterations": iterations, "shift": 50, **saturate("int16", -3)}
    y = b.node("i_layer_norm", (x, weight, bias), "int16", (5, width), **attributes)
    codes = extremes(rng, dtype, (2, 5, width))
    codes[0, 0] = 7  # no variance
    codes[0, 1] = 1 + np.arange(width) % 2  # the mean is an exact tie: 1.5 goes to 2
    codes[0, 2] = 2 + np.arange(width) % 2  # 2.5 goes to 2
    run(b, y, codes)


def test_the_mean_rounds_exact_ties_to_even() -> None:
    codes = torch.tensor([[0, 1], [1, 2], [2, 3], [-1, 0], [-2, -1]])
    found = interpret_ivit.normalize(codes, ivit.PAPER_START, 10)
    # The deviation is 1 for all: what is left of each value shows the mean that was taken.
    assert (found / 2**30).round().tolist() == [[0, 1], [-1, 0], [0, 1], [-1, 0], [0, 1]]


@given(st.integers(0, 2**62 - 1), st.sampled_from([-1, 0, 16, 31]), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_newton_never_falls_below_the_root(value: int, start: int, iterations: int) -> None:
    """What the bound of ``i_layer_norm`` rests on; the paper's start also reaches it, up to one, in ten steps."""
    root = ivit.newton_root(value, start, iterations)
    assert root >= max(1, math.isqrt(value))
    assert int(interpret_ivit.newton_root(torch.tensor([value]), start, iterations)) == root
    assert ivit.newton_root(value, ivit.PAPER_START, 10) <= max(1, math.isqrt(value) + 1)


@pytest.mark.parametrize(("inverse", "window"), SETTINGS)
def test_the_exponential_of_a_tensor_is_the_one_of_python_integers(inverse: int, window: int) -> None:
    distances = torch.arange(-255, 256)
    found = interpret_ivit.shift_exponential(distances, inverse, window)
    assert found.tolist() == [ivit.shift_exponential(int(d), inverse, window) for d in distances]


def official_exponential(distance: int, scale: float, window: int) -> float:
    """``int_exp_shift`` of the official code in float64, which holds all of its integers."""
    x = distance + math.floor(distance / 2) - math.floor(distance / 16)
    floor = math.floor(-1.0 / scale)
    x = max(x, window * floor)
    whole = math.floor(x / floor)
    return math.floor(((x - floor * whole) / 2 - floor) * 2.0 ** (window - whole))


@pytest.mark.parametrize("scale", [0.0078125, 0.019, 0.05, 0.1, 0.25, 0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("window", [15, 23])
def test_the_exponential_is_that_of_the_official_code(scale: float, window: int) -> None:
    """Equal, or both beyond what sums are clipped to."""
    for distance in range(-255, 129):
        found = ivit.shift_exponential(distance, ivit.inverse_scale(scale), window)
        wanted = official_exponential(distance, scale, window)
        assert found == wanted or min(found, wanted) >= 2**31


def test_the_inverse_scale_is_rounded_up() -> None:
    assert [ivit.inverse_scale(s) for s in (0.25, 0.3, 1.0, 5.0, 2.0**-24)] == [4, 4, 1, 1, 2**24]
    with pytest.raises(ProgramError, match=r"needs a scale of at least 2\^-24, got 0\.0"):
        ivit.inverse_scale(0.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [8, 16])
def test_every_node_of_random_published_blocks_equals_its_twin(seed: int, bits: int) -> None:
    program = random_published_block(seed, bits=bits)
    run_checked(program, random_tokens(program, 2, seed))


def probabilities_times_values(width: int, bits: int = 16, **changes: int) -> IntegerProgram:
    b = ProgramBuilder(2, width)
    b.inputs += (("values", TensorType("float32", (width, 3))),)
    x, v = (b.node("quantize", (name,), "int8", kind.shape, scale=1.0, **saturate("int8")) for name, kind in b.inputs)
    attributes = {"inverse_scale": 10, "window": 15, "bits": bits} | changes
    p = b.node("shiftmax", (x,), f"int{bits}", (2, width), **attributes)
    zeros = {"zero_point_a": 0, "zero_point_b": 0, "transpose_b": 0}
    return b.build(b.node("matmul", (p, v), "int32", (2, 3), **zeros))


@pytest.mark.parametrize(("width", "changes"), [(3, {}), (600, {}), (600, {"inverse_scale": 200, "window": 23})])
def test_a_row_of_probabilities_bounds_its_product(width: int, changes: dict[str, int]) -> None:
    """512 times 32767 times 128 is beyond int32, but the codes of a row sum to 2^15, or to a clipped sum."""
    program = probabilities_times_values(width, **changes)
    interval = verify(program)[program.nodes[-1].name]
    rng = np.random.default_rng(0)
    scores, values = extremes(rng, "int8", (2, 2, width)), extremes(rng, "int8", (2, width, 3))
    scores[0, 0], values[0] = 3, -128
    found = run_checked(program, scores.astype(np.float32), values.astype(np.float32))[program.nodes[-1].name]
    assert interval.low <= int(found.min())
    assert interval.magnitude <= max(2**15, width * (changes.get("inverse_scale", 0) << 23 >> 16)) * 128


def shiftmax(dtype: str = "int8", shape: tuple[int, ...] = (2, 4), **changes: int) -> IntegerProgram:
    b, x = codes_of(dtype, *shape)
    attributes = {"inverse_scale": 10, "window": 15, "bits": 16} | changes
    return b.build(b.node("shiftmax", (x,), "int16", shape, **attributes))


def i_layer_norm(
    dtype: str = "int16", width: int = 4, bias: np.ndarray | None = None, **changes: int
) -> IntegerProgram:
    b, x = codes_of(dtype, 2, width)
    weight = b.constant(np.full(width, 2**20, np.int32))
    offset = b.constant(np.zeros(width, np.int64) if bias is None else bias)
    attributes = {"start": -1, "iterations": 10, "shift": 40, **saturate("int8")} | changes
    return b.build(b.node("i_layer_norm", (x, weight, offset), "int8", (2, 4), **attributes))


BAD = {
    "wide scores": (lambda: shiftmax("int16"), "operand v0 is int16[2, 4], expected int8 or uint8"),
    "no row": (lambda: shiftmax(shape=()), "expected at least one axis; the last one is the row"),
    "inverse scale 0": (lambda: shiftmax(inverse_scale=0), "inverse_scale is 0, expected 1 to 16777216"),
    "window 0": (lambda: shiftmax(window=0), "window is 0, expected 1 to 31"),
    "odd width": (lambda: shiftmax(bits=4), "bits is 4, expected 8 or 16"),
    "sum beyond int64": (
        lambda: shiftmax(shape=(1, 300), inverse_scale=2**24, window=31),
        "could overflow int64: an intermediate reaches",
    ),
    "an exponential beyond int32": (lambda: shiftmax(inverse_scale=2**16), "could overflow int16: the result lies in"),
    "no steps": (lambda: i_layer_norm(iterations=0), "iterations is 0, expected 1 to 32"),
    "start": (lambda: i_layer_norm(start=32), "start is 32, expected -1 to 31"),
    "bias beyond int64": (
        lambda: i_layer_norm(bias=np.full(4, 2**45, np.int64)),
        "could overflow int64: an intermediate reaches",
    ),
    "bias of another length": (lambda: i_layer_norm(bias=np.zeros(3, np.int64)), "expected one entry a channel"),
    "layer_norm of int32": (lambda: i_layer_norm("int32"), "expected int8 or uint8 or int16"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_published_program_is_refused(case: str) -> None:
    build, message = BAD[case]
    with pytest.raises(ProgramError) as caught:
        verify(build())
    assert message in str(caught.value)
