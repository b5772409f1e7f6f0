"""Slow twins of the operators: Python integers, fractions and loops, written from the formulas alone.

They share nothing with the interpreter: no torch, no fixed width, no batch axis. A twin takes one sample
as arrays of Python integers (dtype object) and returns one.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import torch

from quantizers.integer.interpret import run
from quantizers.integer.program import INTEGER_RANGES, IntegerProgram
from quantizers.integer.verify import verify


def exact(array: np.ndarray) -> np.ndarray:
    return np.array([int(v) for v in array.ravel()], dtype=object).reshape(array.shape)


def half_up(value: int, shift: int) -> int:
    """``value / 2^shift`` rounded to the nearest integer, ties upwards, through an exact fraction."""
    return math.floor(Fraction(value, 2**shift) + Fraction(1, 2))


def saturate(value: int, a: dict) -> int:
    return min(max(value + a["zero_point"], a["qmin"]), a["qmax"])


def _elementwise(function, *arrays: np.ndarray) -> np.ndarray:
    result = np.frompyfunc(function, len(arrays), 1)(*arrays)
    return np.asarray(result, dtype=object)


def linear(_a, x, weight, bias):
    return x @ weight.T + bias


def matmul(a, x, y):
    left, right = x - a["zero_point_a"], y - a["zero_point_b"]
    if a["transpose_b"]:
        right = np.swapaxes(right, -1, -2)
    result = np.empty((*left.shape[:-1], right.shape[-1]), dtype=object)
    for index in np.ndindex(result.shape):
        *lead, row, column = index
        result[index] = sum(left[(*lead, row, k)] * right[(*lead, k, column)] for k in range(left.shape[-1]))
    return result


def multiply(a, x, y):
    return (x - a["zero_point_a"]) * (y - a["zero_point_b"])


def requantize(a, x, multiplier):
    return _elementwise(lambda v, m: saturate(half_up((v - a["input_zero_point"]) * m, a["shift"]), a), x, multiplier)


def add(a, x, y, multiplier_x, multiplier_y):
    total = (x - a["zero_point_a"]) * multiplier_x + (y - a["zero_point_b"]) * multiplier_y
    return _elementwise(lambda v: saturate(half_up(v, a["shift"]), a), total)


def lookup(a, x, table):
    lowest = a["lowest"]
    return _elementwise(lambda v: table[v - lowest], x)


def exponentials(_a, x, table):
    return _elementwise(lambda v, peak: table[peak - v], x, x.max(axis=-1, keepdims=True))


def row_sum(_a, x):
    return x.sum(axis=-1, keepdims=True)


def normalize_rows(a, x, total, numerator):
    return _elementwise(lambda v, s, n: saturate(half_up(v * (n // s), a["shift"]), a), x, total, numerator)


def layer_norm(a, x, weight, bias):
    result = np.empty(x.shape, dtype=object)
    width = x.shape[-1]
    for lead in np.ndindex(x.shape[:-1]):
        row = list(x[lead])
        total = sum(row)
        variance = width * sum(v * v for v in row) - total * total + a["epsilon"]
        exponent = max(e for e in range(32) if variance * 4**e < 2**62)
        reciprocal = 2**61 // math.isqrt(variance * 4**exponent)
        for channel, value in enumerate(row):
            normalized = half_up((width * value - total) * reciprocal, 41 - exponent)
            result[(*lead, channel)] = saturate(half_up(normalized * weight[channel] + bias[channel], a["shift"]), a)
    return result


def reduce_sum(a, x):
    return (x - a["zero_point"]).sum(axis=a["axis"])


def patches(a, x):
    channels, height, width = x.shape
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = a["kernel"], a["stride"], a["padding"]
    rows = range(-pad_h, height + pad_h - kernel_h + 1, stride_h)
    columns = range(-pad_w, width + pad_w - kernel_w + 1, stride_w)
    result = np.empty((len(rows) * len(columns), channels * kernel_h * kernel_w), dtype=object)
    for window, (top, left) in enumerate(itertools.product(rows, columns)):
        places = itertools.product(range(channels), range(kernel_h), range(kernel_w))
        for position, (channel, dy, dx) in enumerate(places):
            inside = 0 <= top + dy < height and 0 <= left + dx < width
            result[window, position] = x[channel, top + dy, left + dx] if inside else a["pad_value"]
    return result


def reshape(a, x):
    return x.reshape(a["shape"])


def permute(a, x):
    return np.transpose(x, a["axes"])


def slice_(a, x):
    return np.take(x, range(a["start"], a["stop"], a["step"]), axis=a["axis"])


def concat(a, *parts):
    return np.concatenate(parts, axis=a["axis"])


def _shift_exponential(distance: int, a: dict) -> Fraction:
    """The published exponential as the paper writes it: real halves, a real floor, powers of two on both sides of 1."""
    inverse, window = a["inverse_scale"], a["window"]
    power = distance + math.floor(Fraction(distance, 2)) - math.floor(Fraction(distance, 16))
    power = max(power, -window * inverse)
    whole = math.floor(Fraction(power, -inverse))
    rest = power + whole * inverse
    assert -inverse < rest <= 0
    return math.floor((Fraction(rest, 2) + inverse) * Fraction(2) ** (window - whole))


def _reciprocal_product(value: int, total: int, bits: int) -> int:
    factor = math.floor(Fraction(2**31 - 1, min(total, 2**31 - 1)))
    return math.floor(Fraction(value * factor, 2 ** (32 - bits)))


def shiftmax(a, x):
    result = np.empty(x.shape, dtype=object)
    for lead in np.ndindex(x.shape[:-1]):
        row = [int(v) for v in x[lead]]
        powers = [_shift_exponential(v - max(row), a) for v in row]
        result[lead] = [_reciprocal_product(p, sum(powers), a["bits"]) for p in powers]
    return result


def shift_gelu(a, x):
    result = np.empty(x.shape, dtype=object)
    for lead in np.ndindex(x.shape[:-1]):
        row = [int(v) - a["input_zero_point"] for v in x[lead]]
        one = _shift_exponential(-max(row), a)
        powers = [_shift_exponential(v - max(row), a) for v in row]
        gates = [_reciprocal_product(p, p + one, a["bits"]) for p in powers]
        result[lead] = [v * gate for v, gate in zip(row, gates, strict=True)]
    return result


def i_layer_norm(a, x, weight, bias):
    result = np.empty(x.shape, dtype=object)
    for lead in np.ndindex(x.shape[:-1]):
        row = [int(v) for v in x[lead]]
        centred = [v - round(Fraction(sum(row), len(row))) for v in row]
        squares = sum(v * v for v in centred)
        root = 2 ** (len(f"{squares:b}") // 2 if squares else 0) if a["start"] == -1 else 2 ** a["start"]
        for _ in range(a["iterations"]):
            root = max(1, math.floor(Fraction(root + math.floor(Fraction(squares, root)), 2)))
        for channel, value in enumerate(centred):
            normalized = math.floor(Fraction(value * math.floor(Fraction(2**31 - 1, root)), 2))
            product = (normalized + bias[channel]) * weight[channel]
            result[(*lead, channel)] = saturate(half_up(product, a["shift"]), a)
    return result


TWINS = {
    "linear": linear,
    "matmul": matmul,
    "multiply": multiply,
    "requantize": requantize,
    "add": add,
    "lookup": lookup,
    "exponentials": exponentials,
    "row_sum": row_sum,
    "normalize_rows": normalize_rows,
    "layer_norm": layer_norm,
    "reduce_sum": reduce_sum,
    "patches": patches,
    "reshape": reshape,
    "permute": permute,
    "slice": slice_,
    "concat": concat,
    "shiftmax": shiftmax,
    "shift_gelu": shift_gelu,
    "i_layer_norm": i_layer_norm,
}


def extremes(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random integers of a type, a third of them its lowest, its highest or zero."""
    low, high = INTEGER_RANGES[dtype]
    values = rng.integers(low, high, shape, dtype=np.int64, endpoint=True)
    special = rng.choice(np.array([low, high, 0], np.int64), shape)
    return np.where(rng.random(shape) < 1 / 3, special, values).astype(dtype)


def run_checked(program: IntegerProgram, *inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Verify and interpret a program; compare every integer node with its twin and with the proved bounds.

    Args:
        program: the program.
        inputs: float32 (batch, *shape) for each of its inputs.

    Returns:
        Every value by name.
    """
    bounds = verify(program)
    values = {name: tensor.numpy() for name, tensor in run(program, [torch.from_numpy(x) for x in inputs]).items()}
    for node in program.nodes:
        result = values[node.name]
        assert result.dtype.name == node.type.dtype, node
        assert result.shape == (inputs[0].shape[0], *node.type.shape), node
        if node.op == "dequantize":
            continue
        interval = bounds[node.name]
        assert interval.low <= int(result.min()), (node, interval)
        assert int(result.max()) <= interval.high, (node, interval)
        if node.op == "quantize":
            continue
        attributes = dict(node.attributes)
        if node.op == "lookup":
            attributes["lowest"] = INTEGER_RANGES[values[node.inputs[0]].dtype.name][0]
        for index in range(inputs[0].shape[0]):
            operands = [values[name][0 if name in program.constants else index] for name in node.inputs]
            expected = TWINS[node.op](attributes, *map(exact, operands))
            wanted = np.broadcast_to(expected, node.type.shape)
            assert np.array_equal(exact(result[index]), wanted), f"{node.op} {node.name}, sample {index}"
    return values
