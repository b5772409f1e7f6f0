"""Random transformer blocks in the published integer forms of I-ViT."""

from __future__ import annotations

import numpy as np
from support.programs import ProgramBuilder, saturate

from quantizers.integer.fixed_point import to_fixed_point
from quantizers.integer.program import IntegerProgram

#: What ``add`` needs to add codes as they are: two halves, shifted by one.
UNIT = np.int32([2])
INT32 = {"zero_point": 0, "qmin": -(2**31), "qmax": 2**31 - 1}


def random_published_block(
    seed: int, tokens: int = 5, heads: int = 2, head_dim: int = 8, bits: int = 16, *, inner: bool = True
) -> IntegerProgram:
    """LayerNorm, attention, LayerNorm, GELU, with two-scale residual adds; constants and settings are random.

    Without ``inner`` values as outputs, a backend is free to fuse what has one reader.
    """
    rng = np.random.default_rng(seed)
    width = heads * head_dim
    b = ProgramBuilder(tokens, width)

    def requantize(x: str, typical: float, dtype: str = "int8", limits: dict | None = None, count: int = 1) -> str:
        signs = rng.choice([-1, 1], count)
        multiplier, shift = to_fixed_point(typical * rng.uniform(0.3, 1.7, count) * signs)
        limits = saturate(dtype) if limits is None else limits
        operands = (x, b.constant(multiplier))
        return b.node("requantize", operands, dtype, b.types[x].shape, input_zero_point=0, shift=shift, **limits)

    def linear(x: str, out: int) -> str:
        *lead, depth = b.types[x].shape
        weight = rng.integers(-128, 128, (out, depth)).astype(np.int8)
        bias = rng.integers(-3000, 3000, out).astype(np.int32)
        return b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (*lead, out))

    def layer_norm(x: str, scale: float) -> str:
        gain = scale * rng.uniform(-1, 1, width) * np.sqrt(width) / 2**30
        weight, shift = to_fixed_point(gain)
        # Two bits less than a multiplier could have, for biases two bits beyond int32.
        weight, shift = weight >> 2, shift - 2
        # Quotients of beta and gamma, some of them beyond int32.
        bias = np.rint(rng.normal(0, 2.0**29, width) * rng.choice([1, 1, 1, 8], width))
        bias = bias.clip(-(2.0**32), 2.0**32).astype(np.int64)
        start = int(rng.choice([-1, 0, 5, 16]))
        return b.node(
            "i_layer_norm",
            (x, b.constant(weight), b.constant(bias)),
            "int8",
            b.types[x].shape,
            start=start,
            iterations=int(rng.integers(1, 12)),
            shift=shift,
            **saturate("int8"),
        )

    def two_scale_add(x: str, y: str, ratio_x: float, ratio_y: float) -> str:
        sides = [requantize(x, ratio_x, "int32", INT32), requantize(y, ratio_y, "int32", INT32, width)]
        zeros = {"zero_point_a": 0, "zero_point_b": 0}
        one = b.constant(UNIT)
        return b.node("add", (*sides, one, one), "int16", b.types[x].shape, shift=1, **zeros, **saturate("int16"))

    stream = b.node(
        "quantize", ("image",), "int16", (tokens, width), scale=float(np.float32(1e-3)), **saturate("int16")
    )
    qkv = requantize(linear(layer_norm(stream, 40.0), 3 * width), 0.01, "int8", None, 3 * width)
    shape = (tokens, 3, heads, head_dim)
    qkv = b.node("reshape", (qkv,), "int8", shape, shape=shape)
    qkv = b.node("permute", (qkv,), "int8", (3, heads, tokens, head_dim), axes=(1, 2, 0, 3))
    parts = []
    for index in range(3):
        one = (1, heads, tokens, head_dim)
        part = b.node("slice", (qkv,), "int8", one, axis=0, start=index, stop=index + 1, step=1)
        parts.append(b.node("reshape", (part,), "int8", one[1:], shape=one[1:]))
    query, key, value = parts
    zeros = {"zero_point_a": 0, "zero_point_b": 0}
    scores = b.node("matmul", (query, key), "int32", (heads, tokens, tokens), transpose_b=1, **zeros)
    probabilities = b.node(
        "shiftmax",
        (requantize(scores, 0.02),),
        f"int{bits}",
        (heads, tokens, tokens),
        inverse_scale=int(rng.integers(1, 200)),
        window=int(rng.integers(4, 24)),
        bits=bits,
    )
    mixed = b.node(
        "matmul", (probabilities, value), "int32", (heads, tokens, head_dim), transpose_b=0, zero_point_a=0,
        zero_point_b=int(rng.integers(-128, 128)),
    )  # fmt: skip
    mixed = requantize(mixed, 1 / 2 ** (bits - 1))
    mixed = b.node("permute", (mixed,), "int8", (tokens, heads, head_dim), axes=(1, 0, 2))
    mixed = b.node("reshape", (mixed,), "int8", (tokens, width), shape=(tokens, width))
    stream = two_scale_add(stream, linear(mixed, width), 0.9, 0.5)
    hidden = requantize(linear(layer_norm(stream, 30.0), 2 * width), 0.01, "int8", None, 2 * width)
    gelu = b.node(
        "shift_gelu",
        (hidden,),
        "int32",
        b.types[hidden].shape,
        input_zero_point=int(rng.integers(-20, 20)),
        inverse_scale=int(rng.integers(1, 200)),
        window=int(rng.integers(8, 28)),
        bits=8,
    )
    stream = two_scale_add(stream, linear(requantize(gelu, 1 / 128), width), 0.9, 0.5)
    final = layer_norm(stream, 20.0)
    logits = linear(final, 10)
    scale = b.constant(rng.uniform(1e-4, 1e-2, 10).astype(np.float32))
    result = b.node("dequantize", (logits, scale), "float32", (tokens, 10), zero_point=0)
    return b.build(result, stream, probabilities, gelu) if inner else b.build(result)


def random_tokens(program: IntegerProgram, batch: int, seed: int) -> np.ndarray:
    """float32 inputs of every spread: constant rows, tiny deviations, outliers, and the ends of int16."""
    rng = np.random.default_rng(seed)
    shape = (batch, *program.inputs[0][1].shape)
    rows = rng.normal(0, 1, shape) * 10.0 ** rng.integers(-3, 2, (*shape[:-1], 1))
    rows[:, 0] = rng.integers(-3, 4)
    rows[:, -1, 0] = 40.0
    return rows.astype(np.float32)
