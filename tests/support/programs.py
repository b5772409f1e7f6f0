"""Random small IntegerPrograms and inputs for them, covering every operator of the contract."""

from __future__ import annotations

import numpy as np

from quantizers.integer.fixed_point import to_common_fixed_point, to_fixed_point
from quantizers.integer.program import IntegerProgram, Node, TensorType


class ProgramBuilder:
    """Append nodes one by one; names are generated, types are given by the caller."""

    def __init__(self, *shape: int) -> None:
        self.inputs = (("image", TensorType("float32", shape)),)
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[Node] = []
        self.types: dict[str, TensorType] = dict(self.inputs)

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        self.types[name] = TensorType(array.dtype.name, tuple(array.shape))
        return name

    def node(self, op: str, inputs: tuple[str, ...], dtype: str, shape: tuple[int, ...], /, **attributes) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs, attributes, TensorType(dtype, shape)))
        self.types[name] = self.nodes[-1].type
        return name

    def build(self, *outputs: str) -> IntegerProgram:
        return IntegerProgram(
            self.inputs, self.constants, tuple(self.nodes), tuple((f"out{i}", v) for i, v in enumerate(outputs))
        )


SATURATE = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767)}


def saturate(dtype: str, zero_point: int = 0) -> dict[str, int]:
    low, high = SATURATE[dtype]
    return {"zero_point": zero_point, "qmin": low, "qmax": high}


def block_id(block: dict[str, int]) -> str:
    """Return what a test report calls the arguments of a random block."""
    return "-".join(f"{key}{value}" for key, value in block.items())


def random_block(
    seed: int,
    tokens: int = 5,
    heads: int = 2,
    head_dim: int = 8,
    channels: int = 3,
    patch: int = 2,
    *,
    probabilities: bool = True,
) -> IntegerProgram:
    """One transformer block with patch embedding, mean and head: every operator of the contract.

    The constants are random and include the extremes of their ranges; zero points are not zero. Without
    ``probabilities`` among the results, nothing but its own product reads the attention's exponentials.
    """
    rng = np.random.default_rng(seed)
    width = heads * head_dim
    side = patch * (tokens - 1)
    b = ProgramBuilder(channels, patch, side)

    def integers(low: int, high: int, shape: tuple[int, ...], dtype: str) -> str:
        array = rng.integers(low, high + 1, shape).astype(dtype)
        array.flat[0], array.flat[-1] = low, high
        return b.constant(array)

    def multiplier(typical: float, count: int = 1) -> tuple[str, int]:
        values = typical * rng.uniform(0.3, 1.7, count) * rng.choice([-1, 1], count)
        multipliers, shift = to_fixed_point(values)
        return b.constant(multipliers), shift

    def linear(x: str, out: int) -> str:
        *lead, k = b.types[x].shape
        weight, bias = integers(-128, 127, (out, k), "int8"), integers(-3000, 3000, (out,), "int32")
        return b.node("linear", (x, weight, bias), "int32", (*lead, out))

    def requantize(x: str, typical: float, dtype: str = "int8", count: int = 1, zero_point: int = 0) -> str:
        mult, shift = multiplier(typical, count)
        return b.node(
            "requantize",
            (x, mult),
            dtype,
            b.types[x].shape,
            input_zero_point=0,
            shift=shift,
            **saturate(dtype, zero_point),
        )

    def view(op: str, x: str, result: tuple[int, ...], **attributes) -> str:
        return b.node(op, (x,), b.types[x].dtype, result, **attributes)

    def layer_norm(x: str, dtype: str, scale: float) -> str:
        weight, shift = to_fixed_point(scale * rng.uniform(-1, 1, width) / 2**20)
        bias = np.rint(rng.normal(0, 10, width) * 2.0**shift).astype(np.int64)
        return b.node(
            "layer_norm",
            (x, b.constant(weight), b.constant(bias)),
            dtype,
            b.types[x].shape,
            epsilon=int(rng.integers(1, 1000)),
            shift=shift,
            **saturate(dtype),
        )

    def add(x: str, y: str, mult_x: float, mult_y: float, count_y: int = 1) -> str:
        (mx, my), shift = to_common_fixed_point([mult_x], mult_y * rng.uniform(0.2, 1, count_y))
        shape = tuple(np.broadcast_shapes(b.types[x].shape, b.types[y].shape))
        return b.node(
            "add",
            (x, y, b.constant(mx), b.constant(my)),
            "int16",
            shape,
            zero_point_a=int(rng.integers(-3, 4)),
            zero_point_b=0,
            shift=shift,
            **saturate("int16"),
        )

    image = b.node(
        "quantize", ("image",), "int8", b.inputs[0][1].shape, scale=float(np.float32(0.03)), **saturate("int8", 5)
    )
    patches = b.node(
        "patches",
        (image,),
        "int8",
        (tokens - 1, channels * patch * patch),
        kernel=(patch, patch),
        stride=(patch, patch),
        padding=(0, 0),
        pad_value=5,
    )
    embedded = requantize(linear(patches, width), 0.3, "int16", width)
    cls_token = integers(-32768, 32767, (1, width), "int16")
    tokens_in = b.node("concat", (cls_token, embedded), "int16", (tokens, width), axis=0)
    stream = add(tokens_in, integers(-32768, 32767, (tokens, width), "int16"), 0.4, 0.4)

    normed = layer_norm(stream, "int8", 40.0)
    qkv = requantize(linear(normed, 3 * width), 0.01, "int8", 3 * width, zero_point=-3)
    qkv = view("reshape", qkv, (tokens, 3, heads, head_dim), shape=(tokens, 3, heads, head_dim))
    qkv = view("permute", qkv, (3, heads, tokens, head_dim), axes=(1, 2, 0, 3))
    parts = []
    for index in range(3):
        part = view("slice", qkv, (1, heads, tokens, head_dim), axis=0, start=index, stop=index + 1, step=1)
        parts.append(view("reshape", part, (heads, tokens, head_dim), shape=(heads, tokens, head_dim)))
    query, key, value = parts
    scores = b.node(
        "matmul", (query, key), "int32", (heads, tokens, tokens), zero_point_a=-3, zero_point_b=2, transpose_b=1
    )
    scores = requantize(scores, 0.02)
    table = np.rint(255 * np.exp(-0.05 * np.arange(256))).astype(np.uint8)
    weights = b.node("exponentials", (scores, b.constant(table)), "uint8", (heads, tokens, tokens))
    total = b.node("row_sum", (weights,), "int32", (heads, tokens, 1))
    mixed = b.node(
        "matmul", (weights, value), "int32", (heads, tokens, head_dim), zero_point_a=0, zero_point_b=-3, transpose_b=0
    )
    # Of all heads, or of each.
    numerators = rng.integers(2**36, 2**38, (heads, 1, 1) if seed % 2 else (1,))
    mixed = b.node(
        "normalize_rows",
        (mixed, total, b.constant(numerators)),
        "int8",
        (heads, tokens, head_dim),
        shift=37,
        **saturate("int8"),
    )
    mixed = view("permute", mixed, (tokens, heads, head_dim), axes=(1, 0, 2))
    mixed = view("reshape", mixed, (tokens, width), shape=(tokens, width))
    stream = add(stream, linear(mixed, width), 0.9, 0.5, width)

    hidden = requantize(linear(layer_norm(stream, "int8", 30.0), 2 * width), 0.01, "int8", 2 * width)
    hidden = b.node("lookup", (hidden, integers(-128, 127, (256,), "int8")), "int8", b.types[hidden].shape)
    gate = view("slice", hidden, (tokens, width), axis=1, start=0, stop=2 * width, step=2)
    gated = b.node("multiply", (gate, gate), "int32", (tokens, width), zero_point_a=7, zero_point_b=-1)
    stream = add(stream, linear(requantize(gated, 0.02, "int8"), width), 0.9, 0.5, width)

    final = layer_norm(stream, "int16", 3000.0)
    pooled = b.node("reduce_sum", (final,), "int32", (width,), axis=0, zero_point=0)
    logits = linear(requantize(pooled, 0.01), 10)
    scale = b.constant(rng.uniform(1e-4, 1e-2, 10).astype(np.float32))
    results = [
        b.node("dequantize", (logits, scale), "float32", (10,), zero_point=0),
        b.node("dequantize", (final, b.constant(np.float32([0.25]))), "float32", (tokens, width), zero_point=3),
    ]
    if not probabilities:
        return b.build(*results)
    normalized = b.node(
        "normalize_rows",
        (weights, total, b.constant(np.int64([2**30]))),
        "uint8",
        (heads, tokens, tokens),
        shift=22,
        zero_point=0,
        qmin=0,
        qmax=255,
    )
    return b.build(*results, normalized)


def random_images(program: IntegerProgram, batch: int, seed: int) -> np.ndarray:
    """float32 images of the program's input shape, a few of them far outside the quantizer's range."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1.5, (batch, *program.inputs[0][1].shape)).astype(np.float32)
    images.flat[0] = 1e9
    # Exact ties of the image quantizer.
    images.flat[1:4] = np.float32(0.03) * np.array([0.5, 1.5, -2.5], np.float32)
    return images
