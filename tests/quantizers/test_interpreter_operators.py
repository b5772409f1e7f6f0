"""Each operator of the interpreter equals its slow twin, and what the verifier says of it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import tied_attention
from support.programs import ProgramBuilder, random_block, random_images, saturate
from support.twins import TWINS, exact, extremes, run_checked

from quantizers.integer.bounds import Interval, Operand
from quantizers.integer.fixed_point import to_common_fixed_point, to_fixed_point
from quantizers.integer.interpret import INTERPRETERS
from quantizers.integer.ops import OPS
from quantizers.integer.program import INTEGER_RANGES, Node, TensorType
from quantizers.integer.rules import RULES

SEEDS = range(4)


class Constant:
    """Marks an operand without a batch axis."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


def run_both(op: str, *operands, dtype: str, shape: tuple[int, ...], **attributes) -> np.ndarray:
    """Interpret one node, compare it with its twin sample by sample, and with the verifier's type and bounds.

    Args:
        op: the operator.
        operands: arrays (batch, *shape), or :class:`Constant`.
        dtype: expected type of the result.
        shape: expected shape of a sample of the result.
        attributes: of the node.
    """
    if op == "reshape":
        attributes = {"shape": shape}
    names = tuple(f"x{i}" for i in range(len(operands)))
    node = Node("y", op, names, attributes, TensorType(dtype, shape))
    known, tensors = [], []
    for name, operand in zip(names, operands, strict=True):
        array = operand.array if isinstance(operand, Constant) else operand
        sample = array.shape if isinstance(operand, Constant) else array.shape[1:]
        interval = Interval(int(array.min()), int(array.max()))
        constant = array if isinstance(operand, Constant) else None
        known.append(Operand(name, TensorType(array.dtype.name, sample), interval, constant))
        tensors.append(torch.from_numpy(array)[None] if isinstance(operand, Constant) else torch.from_numpy(array))
    kind, bounds = RULES[op](node, *known)
    assert kind == node.type

    result = INTERPRETERS[op](node, *tensors).numpy()
    assert result.dtype.name == dtype
    assert result.shape[1:] == shape
    assert bounds.low <= int(result.min())
    assert int(result.max()) <= bounds.high

    lowest = {"lowest": INTEGER_RANGES[known[0].type.dtype][0]} if op == "lookup" else {}
    for index in range(result.shape[0]):
        sample = [exact(o.array if isinstance(o, Constant) else o[index]) for o in operands]
        expected = np.broadcast_to(TWINS[op](attributes | lowest, *sample), shape)
        assert np.array_equal(exact(result[index]), expected), f"{op}, sample {index}"
    return result


def test_every_operator_has_a_rule_an_interpreter_and_a_twin() -> None:
    doors = {"quantize", "dequantize"}
    assert OPS.keys() == RULES.keys() == INTERPRETERS.keys() == TWINS.keys() | doors


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_linear(seed: int, dtype: str, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    x, weight = extremes(rng, dtype, (2, *lead, 7)), extremes(rng, "int8", (5, 7))
    bias = rng.integers(-(2**30), 2**30, 5).astype(np.int32)
    run_both("linear", x, Constant(weight), Constant(bias), dtype="int32", shape=(*lead, 5))


def test_linear_attains_the_largest_and_the_lowest_int32() -> None:
    """The bound is exact: a bias of what the products leave reaches 2^31 - 1 and is still accepted."""
    x, weight = np.full((1, 1, 4), -128, np.int8), np.array([[-128] * 4, [127] * 4], np.int8)
    bias = np.array([2**31 - 1 - 4 * 128 * 128, -(2**31) + 1 + 4 * 127 * 128], np.int32)
    result = run_both("linear", x, Constant(weight), Constant(bias), dtype="int32", shape=(1, 2))
    assert result.ravel().tolist() == [2**31 - 1, -(2**31) + 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transpose_b", [0, 1])
@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"), [("int8", "int8"), ("uint8", "int8"), ("int8", "uint8"), ("int16", "int8")]
)
def test_matmul(seed: int, transpose_b: int, dtype_a: str, dtype_b: str) -> None:
    rng = np.random.default_rng(seed)
    a = extremes(rng, dtype_a, (2, 3, 4, 6))
    b = extremes(rng, dtype_b, (2, 3, 5, 6) if transpose_b else (2, 3, 6, 5))
    zeros = {"zero_point_a": int(extremes(rng, dtype_a, ())), "zero_point_b": int(extremes(rng, dtype_b, ()))}
    run_both("matmul", a, b, dtype="int32", shape=(3, 4, 5), transpose_b=transpose_b, **zeros)


def test_matmul_by_a_constant() -> None:
    rng = np.random.default_rng(0)
    a, b = extremes(rng, "int8", (2, 4, 6)), extremes(rng, "int8", (6, 5))
    zeros = {"zero_point_a": 3, "zero_point_b": -4}
    run_both("matmul", a, Constant(b), dtype="int32", shape=(4, 5), transpose_b=0, **zeros)


#: Shapes of samples that broadcast from the right; the batch axis never takes part. Batch and extents are
#: equal on purpose, so that aligning a sample with the batch would go unnoticed by shapes alone.
BROADCASTS = [((3, 3), (3, 3)), ((3, 3), (3,)), ((3,), (3, 3)), ((3, 1), (1, 3)), ((), (3,))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("shape_a", "shape_b"), BROADCASTS)
def test_multiply(seed: int, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    a, b = extremes(rng, "int8", (3, *shape_a)), extremes(rng, "int16", (3, *shape_b))
    zeros = {"zero_point_a": -128, "zero_point_b": 32767}
    shape = np.broadcast_shapes(shape_a, shape_b)
    run_both("multiply", a, b, dtype="int32", shape=shape, **zeros)
    run_both("multiply", a, Constant(b[0]), dtype="int32", shape=shape, **zeros)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("shape_a", "shape_b"), BROADCASTS)
@pytest.mark.parametrize("dtypes", [("int16", "int32"), ("int8", "uint8")])
def test_add(seed: int, shape_a: tuple[int, ...], shape_b: tuple[int, ...], dtypes: tuple[str, str]) -> None:
    rng = np.random.default_rng(seed)
    a, b = extremes(rng, dtypes[0], (3, *shape_a)), extremes(rng, dtypes[1], (3, *shape_b))
    shape = np.broadcast_shapes(shape_a, shape_b)
    (ma, mb), shift = to_common_fixed_point([0.7], rng.uniform(-1, 1, shape[-1:]))
    common = {"dtype": "int16", "shape": shape, "shift": shift, **saturate("int16", -5)}
    zeros = {"zero_point_a": int(extremes(rng, dtypes[0], ())), "zero_point_b": 0}
    run_both("add", a, b, Constant(ma), Constant(mb), **zeros, **common)
    run_both("add", a, Constant(b[0]), Constant(ma), Constant(mb), **zeros, **common)


def test_add_rounds_exact_ties_up() -> None:
    a, b = np.arange(-4, 4, dtype=np.int8)[None], np.zeros((1, 8), np.int8)
    one = Constant(np.array([1], np.int32))
    zeros = {"zero_point_a": 0, "zero_point_b": 0}
    result = run_both("add", a, b, one, one, dtype="int8", shape=(8,), shift=1, **zeros, **saturate("int8"))
    assert result.ravel().tolist() == [-2, -1, -1, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("source", ["int8", "uint8", "int16", "int32"])
@pytest.mark.parametrize("target", ["int8", "uint8", "int16"])
def test_requantize(seed: int, source: str, target: str) -> None:
    rng = np.random.default_rng(seed)
    x = extremes(rng, source, (3, 4, 5))
    multiplier, shift = to_fixed_point(rng.uniform(-1, 1, 5) * 2.0 ** rng.integers(-30, 2))
    zero = int(extremes(rng, source, ()))
    low, high = INTEGER_RANGES[target]
    limits = {"zero_point": (low + high) // 2 + 3, "qmin": low + 1, "qmax": high - 1}
    run_both(
        "requantize", x, Constant(multiplier), dtype=target, shape=(4, 5), input_zero_point=zero, shift=shift, **limits
    )


@given(value=st.integers(-(2**31), 2**31 - 1), multiplier=st.integers(-(2**31), 2**31 - 1), shift=st.integers(1, 62))
@settings(max_examples=300, deadline=None)
def test_requantize_is_the_exact_rational_rounded_half_up(value: int, multiplier: int, shift: int) -> None:
    run_both(
        "requantize",
        np.array([[value]], np.int32),
        Constant(np.array([multiplier], np.int32)),
        dtype="int32",
        shape=(1,),
        input_zero_point=0,
        shift=shift,
        zero_point=0,
        qmin=-(2**31),
        qmax=2**31 - 1,
    )


def test_requantize_of_every_byte_with_exact_ties() -> None:
    x = np.arange(-128, 128, dtype=np.int8)[None]
    for shift in (1, 2, 3):
        result = run_both(
            *("requantize", x, Constant(np.array([1], np.int32))),
            dtype="int8",
            shape=(256,),
            input_zero_point=0,
            shift=shift,
            **saturate("int8"),
        )
    assert result[0, 128 + 4] == 1
    assert result[0, 128 - 4] == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("entry", ["int8", "uint8", "int16", "int32"])
def test_lookup_of_every_byte(dtype: str, entry: str) -> None:
    low, high = INTEGER_RANGES[dtype]
    x = np.arange(low, high + 1).astype(dtype)[None]
    table = extremes(np.random.default_rng(0), entry, (256,))
    result = run_both("lookup", x, Constant(table), dtype=entry, shape=(256,))
    assert np.array_equal(result[0], table)


def _attention(scores: np.ndarray, scale: float, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer softmax of scores (batch, rows, keys) and its product with values (batch, keys, channels).

    Returns:
        Probabilities in steps of 1/256 (uint8) and mixed values in eighths of a step (int16).
    """
    (rows, keys), channels = scores.shape[1:], values.shape[2]
    b = ProgramBuilder(rows, keys)
    b.inputs += (("values", TensorType("float32", (keys, channels))),)
    codes = [b.node("quantize", (name,), "int8", kind.shape, scale=1.0, **saturate("int8")) for name, kind in b.inputs]
    table = b.constant(np.rint(255 * np.exp(-scale * np.arange(256))).astype(np.uint8))
    weights = b.node("exponentials", (codes[0], table), "uint8", (rows, keys))
    total = b.node("row_sum", (weights,), "int32", (rows, 1))
    numerator = b.constant(np.int64([2**40]))
    first = b.node("normalize_rows", (weights, total, numerator), "uint8", (rows, keys), shift=32, **saturate("uint8"))
    zeros = {"zero_point_a": 0, "zero_point_b": 0, "transpose_b": 0}
    mixed = b.node("matmul", (weights, codes[1]), "int32", (rows, channels), **zeros)
    second = b.node(
        "normalize_rows", (mixed, total, numerator), "int16", (rows, channels), shift=37, **saturate("int16")
    )
    result = run_checked(b.build(first, second), scores.astype(np.float32), values.astype(np.float32))
    return result[first], result[second]


@pytest.mark.parametrize("odds", [(1,), (1, 3, 5)])
def test_rows_of_each_head_round_exact_ties_up(odds: tuple[int, ...]) -> None:
    program = tied_attention(odds, 256, "int16")
    values = np.tile(np.arange(-128, 128), (1, len(odds), 1, 1))
    found = run_checked(program, values.astype(np.float32))[program.outputs[0][1]]
    expected = np.floor(values * np.array(odds).reshape(-1, 1, 1) / 2 + 0.5)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_softmax_stays_within_the_stated_error_of_the_real_one(seed: int, scale: float) -> None:
    """``|p' - p| <= (1 + p N) / (2 t)`` for N keys and the row's integer sum t >= 255; then half a step of rounding."""
    rng = np.random.default_rng(seed)
    keys = 12
    scores, values = extremes(rng, "int8", (2, 5, keys)), extremes(rng, "int8", (2, keys, 4))
    # A row of equal scores and a row of one peak.
    scores[0, 0], scores[0, 1] = -7, [127, *[-128] * (keys - 1)]
    probabilities, mixed = _attention(scores, scale, values)
    exponents = np.exp(scale * (scores.astype(np.float64) - scores.max(-1, keepdims=True)))
    real = exponents / exponents.sum(-1, keepdims=True)
    step = 1 / 256
    allowed = (1 + real * keys) / (2 * 255) + step / 2 + 1e-6
    assert (np.abs(probabilities * step - np.minimum(real, 255 * step)) <= allowed).all()
    wanted = real @ values
    # Summing the bound over the keys, times the largest value, then half of the result's step.
    assert np.abs(mixed / 8 - wanted).max() <= 128 * keys / 255 + 1 / 16 + 1e-6


def test_equal_scores_get_equal_probabilities_without_error() -> None:
    scores = np.full((1, 1, 16), 5, np.int8)
    probabilities, mixed = _attention(scores, 0.1, np.full((1, 16, 1), -100, np.int8))
    assert (probabilities == 16).all()
    assert mixed.ravel().tolist() == [-800]


def _normed(x: np.ndarray, gain: np.ndarray, shift_of_mean: np.ndarray, epsilon: int, dtype: str = "int16"):
    """Run layer_norm with a real gain (steps per deviation) and bias (steps); return it with its shift and weights."""
    weight, shift = to_fixed_point(gain / 2**20)
    bias = np.rint(shift_of_mean * 2.0**shift).astype(np.int64)
    result = run_both(
        *("layer_norm", x, Constant(weight), Constant(bias)),
        dtype=dtype,
        shape=x.shape[1:],
        epsilon=epsilon,
        shift=shift,
        **saturate(dtype),
    )
    return result, weight.astype(np.float64) / 2.0**shift


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("width", [1, 2, 7, 96, 384])
def test_layer_norm_stays_within_its_stated_error(seed: int, dtype: str, width: int) -> None:
    """At most half a step of the result, plus 0.52 steps of the normalized value times the weight."""
    rng = np.random.default_rng(seed)
    x = extremes(rng, dtype, (2, 3, width))
    x[0, 0] = 5  # no variance but epsilon
    x[0, 1] = 0
    x[0, 1, 0] = INTEGER_RANGES[dtype][1]  # one outlier: the largest normalized value there is
    gain, offset, epsilon = rng.uniform(-200, 200, width), rng.normal(0, 50, width), int(rng.integers(1, 1000))
    result, weight = _normed(x, gain, offset, epsilon)
    codes = x.astype(np.float64)
    centred = codes - codes.mean(-1, keepdims=True)
    normalized = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon / width**2)
    wanted = np.clip(normalized * weight * 2**20 + offset, -32768, 32767)
    assert (np.abs(result - wanted) <= 0.5 + 0.52 * np.abs(weight) + 1e-6).all()


def test_layer_norm_of_a_constant_row_is_the_bias() -> None:
    result, _ = _normed(np.full((1, 2, 8), -32768, np.int16), np.full(8, 100.0), np.arange(8.0), 1)
    assert (result == np.arange(8)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_reduce_sum(seed: int, dtype: str, axis: int) -> None:
    rng = np.random.default_rng(seed)
    x, zero = extremes(rng, dtype, (2, 3, 4)), int(extremes(rng, dtype, ()))
    run_both("reduce_sum", x, dtype="int32", shape=(4,) if axis == 0 else (3,), axis=axis, zero_point=zero)


PATCHES = [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0)), ((3, 3), (2, 1), (2, 2)), ((4, 6), (1, 1), (0, 0))]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), PATCHES)
def test_patches_equal_the_twin_and_torch_unfold(dtype: str, kernel, stride, padding) -> None:
    x, pad_value = extremes(np.random.default_rng(0), dtype, (2, 3, 4, 6)), 9
    # torch pads with zero, so that the padding value is subtracted before and added after.
    shifted = torch.from_numpy(x.astype(np.float64) - pad_value)
    unfolded = torch.nn.functional.unfold(shifted, kernel, padding=padding, stride=stride)
    wanted = (unfolded.transpose(1, 2) + pad_value).numpy()
    attributes = {"kernel": kernel, "stride": stride, "padding": padding, "pad_value": pad_value}
    result = run_both("patches", x, dtype=dtype, shape=wanted.shape[1:], **attributes)
    assert np.array_equal(result, wanted)


@pytest.mark.parametrize("pad_value", [-128, 127])
def test_patches_are_bounded_by_their_padding_too(pad_value: int) -> None:
    x = np.full((1, 1, 2, 2), 3, np.int8)
    attributes = {"kernel": (2, 2), "stride": (1, 1), "padding": (1, 0), "pad_value": pad_value}
    result = run_both("patches", x, dtype="int8", shape=(3, 4), **attributes)
    assert pad_value in result


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
def test_views(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, more = extremes(rng, dtype, (2, 3, 4, 5)), extremes(rng, dtype, (3, 1, 5))
    run_both("reshape", x, dtype=dtype, shape=(6, 10))
    run_both("permute", x, dtype=dtype, shape=(5, 3, 4), axes=(2, 0, 1))
    run_both("slice", x, dtype=dtype, shape=(3, 2, 5), axis=1, start=1, stop=4, step=2)
    run_both("slice", x, dtype=dtype, shape=(1, 4, 5), axis=0, start=2, stop=3, step=7)
    run_both("concat", x, Constant(more), x, dtype=dtype, shape=(3, 9, 5), axis=1)


@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    scale=st.floats(2.0**-20, 2.0**10, width=32),
    zero_point=st.integers(-128, 127),
)
@settings(deadline=None)
def test_quantize_divides_in_float32_and_rounds_half_to_even(value: float, scale: float, zero_point: int) -> None:
    node = Node("y", "quantize", ("x",), {"scale": scale, **saturate("int8", zero_point)}, TensorType("int8", (1,)))
    with np.errstate(over="ignore"):
        quotient = float(np.float32(value) / np.float32(scale))
    nearest = round(quotient) if abs(quotient) < 2**24 else (2**24 if quotient > 0 else -(2**24))
    result = INTERPRETERS["quantize"](node, torch.tensor([[value]], dtype=torch.float32))
    assert int(result) == min(max(nearest + zero_point, -128), 127)


def test_quantize_of_exact_ties() -> None:
    node = Node("y", "quantize", ("x",), {"scale": 0.25, **saturate("int8")}, TensorType("int8", (6,)))
    ties = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]]) * 0.25
    assert INTERPRETERS["quantize"](node, ties).tolist() == [[-2, -2, 0, 0, 2, 2]]


@given(value=st.integers(-(2**31) + 128, 2**31 - 129), scale=st.floats(2.0**-30, 2.0**10, width=32))
@settings(deadline=None)
def test_dequantize_is_one_float32_product(value: int, scale: float) -> None:
    node = Node("y", "dequantize", ("x", "s"), {"zero_point": -128}, TensorType("float32", (1,)))
    result = INTERPRETERS["dequantize"](
        node, torch.tensor([[value]], dtype=torch.int32), torch.tensor([[scale]], dtype=torch.float32)
    )
    assert result.dtype == torch.float32
    assert result.item() == float(np.float32(value + 128) * np.float32(scale))


@pytest.mark.parametrize("seed", range(6))
def test_every_node_of_random_programs_equals_its_twin(seed: int) -> None:
    program = random_block(seed)
    run_checked(program, random_images(program, 2, seed))
