"""Programs around one attention or one MLP, with random constants and every variation that kernels distinguish."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from support.programs import ProgramBuilder, saturate

from quantizers.integer.program import IntegerProgram

LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Shape:
    """Extents of a program; the seed decides constants, element types, zero points and biases.

    With ``windows``, tokens attend to those of their window, as in Swin.
    """

    tokens: int
    heads: int
    head_dim: int
    seed: int
    windows: int | None = None


def attention_program(shape: Shape) -> IntegerProgram:
    """Queries, keys and values of one image, attention, and the heads side by side."""
    rng = np.random.default_rng(shape.seed)
    tokens, heads, size = shape.tokens, shape.heads, shape.head_dim
    lead = () if shape.windows is None else (shape.windows,)
    split, joined = (*lead, tokens, heads, size), (*lead, tokens, heads * size)
    axes = (*range(len(lead)), len(lead) + 1, len(lead), len(lead) + 2)
    rows = (*lead, heads, tokens, size)
    b = ProgramBuilder(3, *joined)
    parts, zeros = [], []
    for index in range(3):
        dtype = str(rng.choice(["int8", "uint8"]))
        zero = int(rng.choice([0, 0, LIMITS[dtype][0], LIMITS[dtype][1], 3]))
        codes = b.node("quantize", ("image",), dtype, (3, *joined), scale=1.0, **saturate(dtype, zero))
        part = b.node("slice", (codes,), dtype, (1, *joined), axis=0, start=index, stop=index + 1, step=1)
        part = b.node("reshape", (part,), dtype, split, shape=split)
        parts.append(b.node("permute", (part,), dtype, rows, axes=axes))
        zeros.append(zero)
    square = (*lead, heads, tokens, tokens)
    scores = b.node(
        "matmul", (parts[0], parts[1]), "int32", square, zero_point_a=zeros[0], zero_point_b=zeros[1], transpose_b=1
    )
    kind = str(rng.choice(["int8", "uint8"]))
    count = int(rng.choice([1, heads]))
    typical = 2.0**31 * rng.choice([-1, 1], (count, 1, 1)) * rng.uniform(0.1, 0.9, (count, 1, 1))
    multiplier = b.constant(typical.astype(np.int32))
    # 8-bit codes out of size products of 8 bits each.
    shift = 31 + 8 + int(np.ceil(np.log2(size) / 2))
    match int(rng.integers(3)):
        case 0:
            scores = b.node(
                "requantize", (scores, multiplier), kind, square, input_zero_point=0, shift=shift, **saturate(kind, 4)
            )
        case 1:
            scores = _biased(b, rng, scores, multiplier, shift, kind)
        case _:
            inner = _biased(b, rng, scores, multiplier, shift - 8, "int16")
            scores = _biased(b, rng, inner, b.constant(np.int32([2**30])), 38, kind)
    first = int(rng.choice([1, 15, 255]))
    table = np.rint(first * np.exp(-float(rng.uniform(0, 0.2)) * np.arange(256))).astype(np.uint8)
    weights = b.node("exponentials", (scores, b.constant(table)), "uint8", square)
    total = b.node("row_sum", (weights,), "int32", (*square[:-1], 1))
    mixed = b.node("matmul", (weights, parts[2]), "int32", rows, zero_point_a=0, zero_point_b=zeros[2], transpose_b=0)
    bits = int(rng.choice([20, 30, 38, 45]))
    numerator = rng.integers(2**bits // 2, 2**bits, 1)
    if rng.random() < 0.5:
        # The smallest allowed, and values of heads that differ by up to a thousand.
        numerator = np.maximum(1, numerator // 10 ** rng.integers(0, 4, (heads, 1, 1)))
        numerator[0] = 1
    mixed = b.node(
        "normalize_rows", (mixed, total, b.constant(numerator)), "int8", rows, shift=bits - 1, **saturate("int8", -5)
    )
    kind = "int8"
    if rng.random() < 0.5:
        kind = str(rng.choice(["int8", "uint8"]))
        levels = rng.integers(LIMITS[kind][0], LIMITS[kind][1] + 1, 256).astype(kind)
        mixed = b.node("lookup", (mixed, b.constant(levels)), kind, rows)
    together = b.node("permute", (mixed,), kind, split, axes=axes)
    result = b.node("reshape", (together,), kind, joined, shape=joined)
    return b.build(b.node("dequantize", (result, b.constant(np.float32([0.5]))), "float32", joined, zero_point=1))


def tied_attention(odds: tuple[int, ...], depth: int, dtype: str = "int8") -> IntegerProgram:
    """One token that attends to itself: values times ``odd / 2`` of their head, so that every odd product is a tie."""
    shape, shift = (len(odds), 1, depth), 9
    b = ProgramBuilder(*shape)
    x = b.node("quantize", ("image",), "int8", shape, scale=1.0, **saturate("int8"))
    zeros = {"zero_point_a": 0, "zero_point_b": 0}
    scores = b.node("matmul", (x, x), "int32", (len(odds), 1, 1), **zeros, transpose_b=1)
    scores = b.node(
        "requantize", (scores, b.constant(np.int32([1]))), "int8", (len(odds), 1, 1), input_zero_point=0, shift=20,
        **saturate("int8"),
    )  # fmt: skip
    weights = b.node("exponentials", (scores, b.constant(np.ones(256, np.uint8))), "uint8", (len(odds), 1, 1))
    total = b.node("row_sum", (weights,), "int32", (len(odds), 1, 1))
    mixed = b.node("matmul", (weights, x), "int32", shape, **zeros, transpose_b=0)
    numerators = b.constant((np.int64(odds) << (shift - 1)).reshape(-1, 1, 1))
    return b.build(b.node("normalize_rows", (mixed, total, numerators), dtype, shape, shift=shift, **saturate(dtype)))


def _biased(b: ProgramBuilder, rng: np.random.Generator, scores: str, multiplier: str, shift: int, kind: str) -> str:
    heads, tokens, _ = b.types[scores].shape[-3:]
    lead = (heads, tokens, tokens) if rng.random() < 0.5 else (int(rng.choice([1, heads])), 1, tokens)
    other = b.constant(rng.integers(-32768, 32768, lead).astype(np.int16))
    factor = b.constant(np.int32([rng.integers(-(2**31), 2**31) >> 12]))
    zeros = {"zero_point_a": int(rng.integers(-3, 4)), "zero_point_b": int(rng.integers(-3, 4))}
    pairs = ((scores, multiplier), (other, factor))
    (x, mx), (y, my) = pairs if rng.random() < 0.5 else pairs[::-1]
    return b.node("add", (x, y, mx, my), kind, b.types[scores].shape, shift=shift, **zeros, **saturate(kind))


def mlp_program(shape: Shape) -> IntegerProgram:
    """LayerNorm, a linear with table, and a linear that is added to the stream; then a plain linear."""
    rng = np.random.default_rng(shape.seed)
    tokens, width = shape.tokens, shape.heads * shape.head_dim
    hidden = int(rng.choice([1, 7, 16, 33, 48, 64, 65, 130]))
    b = ProgramBuilder(tokens, width)
    stream = b.node("quantize", ("image",), "int16", (tokens, width), scale=2.0**-7, **saturate("int16"))

    def linear(x: str, count: int) -> str:
        depth = b.types[x].shape[-1]
        half = int(rng.choice([2**7, 2**3, 2**2]))
        weight = rng.integers(-half, half, (count, depth)).astype(np.int8)
        weight.flat[0], weight.flat[-1] = -half, half - 1
        bias = rng.integers(-(2**20), 2**20, count).astype(np.int32)
        return b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (tokens, count))

    def factors(count: int) -> str:
        size = int(rng.choice([1, count]))
        array = rng.integers(-(2**31), 2**31, size)
        return b.constant(array.astype(np.int32))

    normed = b.node(
        "layer_norm",
        (stream, b.constant(rng.integers(-(2**30), 2**30, width).astype(np.int32)),
         b.constant(rng.integers(-(2**50), 2**50, width).astype(np.int64))),
        "int8", (tokens, width), epsilon=int(rng.integers(1, 10**6)), shift=45, **saturate("int8", 2),
    )  # fmt: skip
    code = str(rng.choice(["int8", "uint8"]))
    zero = int(rng.choice([0, 3]))
    coded = b.node(
        "requantize", (linear(normed, hidden), factors(hidden)), code, (tokens, hidden), input_zero_point=zero,
        shift=int(rng.choice([31, 32, 40, 44])), **saturate(code, 3),
    )  # fmt: skip
    result = str(rng.choice(["int8", "uint8"]))
    low, high = LIMITS[result]
    table = b.constant(rng.integers(low, high + 1, 256).astype(result))
    activated = b.node("lookup", (coded, table), result, (tokens, hidden))
    branch, zeros = linear(activated, width), {"zero_point_a": int(rng.integers(-2, 3)), "zero_point_b": 0}
    pairs = ((stream, factors(1)), (branch, factors(width)))
    (x, mx), (y, my) = pairs if rng.random() < 0.5 else pairs[::-1]
    stream = b.node(
        "add", (x, y, mx, my), "int16", (tokens, width), shift=int(rng.choice([31, 33, 47])), **zeros,
        **saturate("int16"),
    )  # fmt: skip
    again = b.node("quantize", ("image",), "uint8", (tokens, width), scale=1.0, **saturate("uint8", 9))
    return b.build(stream, linear(again, int(rng.choice([1, 10, 100]))))
