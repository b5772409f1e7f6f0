"""The reference interpreter: the slow, obvious definition that every backend equals bit for bit.

Integer torch tensors throughout; the only float operations are the two doors. See
:mod:`quantizers.integer.ops` for the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from quantizers.integer.inputs import check_finite, check_inputs
from quantizers.integer.interpret_ivit import IVIT_INTERPRETERS
from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import INTEGER_RANGES, IntegerProgram, Node
from quantizers.integer.saturation import saturate, shift_round
from quantizers.rounding import round_half_even


def interpret(program: IntegerProgram, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run a program.

    Args:
        program: a verified program.
        inputs: float32 tensors ``(batch, *shape)``, in the order of ``program.inputs``.

    Returns:
        One tensor ``(batch, *shape)`` for each output.

    Raises:
        DataError: wrong count, shape or dtype of inputs, or values that are not finite.
    """
    values = run(program, inputs)
    return tuple(values[value] for _, value in program.outputs)


def run(program: IntegerProgram, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run a program and return every value by name, constants included (they have batch extent 1)."""
    check_inputs(program.inputs, [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs])
    values: dict[str, Tensor] = {
        name: torch.from_numpy(np.array(array))[None] for name, array in program.constants.items()
    }
    for (name, _), tensor in zip(program.inputs, inputs, strict=True):
        check_finite(name, finite=bool(torch.isfinite(tensor).all()))
        values[name] = tensor
    for node in program.nodes:
        values[node.name] = INTERPRETERS[node.op](node, *(values[name] for name in node.inputs))
    return values


def integer_sqrt(value: Tensor) -> Tensor:
    """Return ``floor(sqrt(value))`` of int64 values in [0, 2^62), digit by digit (two bits a step)."""
    root, rest = torch.zeros_like(value), value
    for bit in range(60, -1, -2):
        trial = root + (1 << bit)
        fits = rest >= trial
        rest = torch.where(fits, rest - trial, rest)
        root = torch.where(fits, (root >> 1) + (1 << bit), root >> 1)
    return root


def _align(value: Tensor, node: Node) -> Tensor:
    """Insert axes after the batch: shapes of samples, not of batches, broadcast from the right."""
    missing = len(node.type.shape) + 1 - value.ndim
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])


def _quantize(node: Node, x: Tensor) -> Tensor:
    scale = torch.tensor(node.real("scale"), dtype=torch.float32)
    # Clamping before the conversion keeps values beyond int32 defined; it cannot change the code.
    codes = round_half_even(x / scale).clamp(-(2.0**24), 2.0**24).to(torch.int64)
    return saturate(codes, node)


def _dequantize(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    return (x.to(torch.int32) - node.integer("zero_point")).to(torch.float32) * scale


def _linear(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.to(torch.int32) @ weight[0].to(torch.int32).T + bias[0]


def _matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    left = a.to(torch.int32) - node.integer("zero_point_a")
    right = b.to(torch.int32) - node.integer("zero_point_b")
    return left @ (right.transpose(-1, -2) if node.integer("transpose_b") else right)


def _multiply(node: Node, a: Tensor, b: Tensor) -> Tensor:
    left = _align(a, node).to(torch.int32) - node.integer("zero_point_a")
    return left * (_align(b, node).to(torch.int32) - node.integer("zero_point_b"))


def _requantize(node: Node, x: Tensor, multiplier: Tensor) -> Tensor:
    centred = x.to(torch.int64) - node.integer("input_zero_point")
    return saturate(shift_round(centred * multiplier[0].to(torch.int64), node), node)


def _add(node: Node, a: Tensor, b: Tensor, multiplier_a: Tensor, multiplier_b: Tensor) -> Tensor:
    left = (_align(a, node).to(torch.int64) - node.integer("zero_point_a")) * multiplier_a[0].to(torch.int64)
    right = (_align(b, node).to(torch.int64) - node.integer("zero_point_b")) * multiplier_b[0].to(torch.int64)
    return saturate(shift_round(left + right, node), node)


def _lookup(node: Node, x: Tensor, table: Tensor) -> Tensor:
    lowest = 0 if x.dtype == torch.uint8 else INTEGER_RANGES["int8"][0]
    return table[0][x.to(torch.int64) - lowest]


def _exponentials(node: Node, x: Tensor, table: Tensor) -> Tensor:
    codes = x.to(torch.int64)
    return table[0][codes.amax(-1, keepdim=True) - codes]


def _row_sum(node: Node, x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True, dtype=torch.int32)


def _normalize_rows(node: Node, x: Tensor, total: Tensor, numerator: Tensor) -> Tensor:
    reciprocal = numerator[0] // total.to(torch.int64)
    return saturate(shift_round(x.to(torch.int64) * reciprocal, node), node)


def normalized_deviations(codes: Tensor, epsilon: int) -> Tensor:
    """Return deviations from the row's mean in 2^-20 standard deviations, int64, same shape.

    Args:
        codes: int64 (..., C).
        epsilon: added to ``C^2 variance``, at least 1.
    """
    width = codes.shape[-1]
    total = codes.sum(-1, keepdim=True)
    variance = width * (codes * codes).sum(-1, keepdim=True) - total * total + epsilon
    exponent = torch.zeros_like(variance)
    for step in (16, 8, 4, 2, 1):
        room = variance < (1 << (62 - 2 * step))
        variance = torch.where(room, variance << (2 * step), variance)
        exponent = torch.where(room, exponent + step, exponent)
    reciprocal = (1 << 61) // integer_sqrt(variance)
    shift = 61 - LAYER_NORM_FRACTION_BITS - exponent
    return ((width * codes - total) * reciprocal + (torch.ones_like(shift) << (shift - 1))) >> shift


def _layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normalized = normalized_deviations(x.to(torch.int64), node.integer("epsilon"))
    return saturate(shift_round(normalized * weight[0].to(torch.int64) + bias[0], node), node)


def _reduce_sum(node: Node, x: Tensor) -> Tensor:
    return (x.to(torch.int32) - node.integer("zero_point")).sum(node.integer("axis") + 1, dtype=torch.int32)


def _patches(node: Node, x: Tensor) -> Tensor:
    (kernel_h, kernel_w), (stride_h, stride_w) = node.integers("kernel"), node.integers("stride")
    pad_h, pad_w = node.integers("padding")
    padded = torch.nn.functional.pad(x, (pad_w, pad_w, pad_h, pad_h), value=node.integer("pad_value"))
    windows = padded.unfold(2, kernel_h, stride_h).unfold(3, kernel_w, stride_w)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(x.shape[0], *node.type.shape)


def _reshape(node: Node, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *node.integers("shape"))


def _permute(node: Node, x: Tensor) -> Tensor:
    return x.permute(0, *(axis + 1 for axis in node.integers("axes")))


def _slice(node: Node, x: Tensor) -> Tensor:
    index = [slice(None)] * x.ndim
    index[node.integer("axis") + 1] = slice(node.integer("start"), node.integer("stop"), node.integer("step"))
    return x[tuple(index)]


def _concat(node: Node, *parts: Tensor) -> Tensor:
    batch = max(part.shape[0] for part in parts)
    expanded = [part.expand(batch, *part.shape[1:]) for part in parts]
    return torch.cat(expanded, node.integer("axis") + 1)


INTERPRETERS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "linear": _linear,
        "matmul": _matmul,
        "multiply": _multiply,
        "requantize": _requantize,
        "add": _add,
        "lookup": _lookup,
        "exponentials": _exponentials,
        "row_sum": _row_sum,
        "normalize_rows": _normalize_rows,
        "layer_norm": _layer_norm,
        "reduce_sum": _reduce_sum,
        "patches": _patches,
        "reshape": _reshape,
        "permute": _permute,
        "slice": _slice,
        "concat": _concat,
        **IVIT_INTERPRETERS,
    }
)
