"""The operators of an IntegerProgram: signatures, as one literal table.

``[...]`` is any number of leading axes. ``saturate`` adds ``zero_point`` and clips to ``[qmin, qmax]``;
``>>`` is the arithmetic shift (floor), ``//`` the floor division of positive integers. All arithmetic
between the operands and the result is int64 and, as the verifier proves, never overflows.

===============  =====================================================================================
quantize         float32 x: ``saturate(round_half_even(x / scale))``; the division is float32
dequantize       ``float32(x - zero_point) * scale``, float32 product; scale broadcasts from the right
linear           x[..., K], weight int8[N, K], bias int32[N]: ``sum_k x w + bias``, int32[..., N]
matmul           a[..., M, K], b[..., K, N] (or [..., N, K] with transpose_b):
                 ``sum_k (a - zero_point_a) (b - zero_point_b)``, int32; a may be int16
multiply         ``(a - zero_point_a) (b - zero_point_b)``, int32
requantize       ``saturate(((x - input_zero_point) m + 2^(shift-1)) >> shift)``
add              ``saturate(((a - zero_point_a) ma + (b - zero_point_b) mb + 2^(shift-1)) >> shift)``
lookup           8-bit x: ``table[x - min(dtype)]``
exponentials     8-bit x: ``table[max over the last axis - x]``, uint8
row_sum          sum of ``exponentials`` over the last axis, kept as extent 1, int32
normalize_rows   ``saturate((x (numerator // sum) + 2^(shift-1)) >> shift)``: one division a row;
                 int64 numerator, one or one a head: its last two extents are 1
layer_norm       x[..., C]: ``S = sum x``, ``V = C sum x^2 - S^2 + epsilon``, ``e`` the largest with
                 ``V 4^e < 2^62``, ``r = 2^61 // floor(sqrt(V 4^e))``,
                 ``n = ((C x - S) r + 2^(40-e)) >> (41-e)``,
                 ``saturate((n weight + bias + 2^(shift-1)) >> shift)``
reduce_sum       ``sum (x - zero_point)`` over one axis, which goes, int32
patches          x[C, H, W]: windows as rows, [windows, C kh kw], outside = pad_value
reshape, permute, slice, concat: views; one dtype
===============  =====================================================================================

The published operators of I-ViT (arXiv 2207.01405). ``E(d)`` is the exponential by shifts of
:mod:`quantizers.integer.ivit` with ``inverse_scale`` and ``window``, ``M = 2^31 - 1``:

===============  =====================================================================================
shiftmax         8-bit x, rows along the last axis: ``e_i = E(x_i - max x)``, ``F = M // min(sum e, M)``,
                 ``(e_i F) >> (32 - bits)``: int8 or int16 by ``bits``, codes of ``2^-(bits-1)``
shift_gelu       8-bit x, ``x' = x - input_zero_point``, ``m = max x'`` of the row,
                 ``e_i = E(x'_i - m)``, ``c = E(-m)``, ``F_i = M // min(e_i + c, M)``,
                 ``x'_i ((e_i F_i) >> (32 - bits))``, int32, codes of the input's scale times ``2^-(bits-1)``
i_layer_norm     x[..., C]: ``y = x - round_half_even(sum x / C)``, ``v = sum y^2``, ``k = 2^start`` or
                 with start -1 ``2^(bits of v // 2)``, ``iterations`` times
                 ``k = max(1, (k + v // k) >> 1)``, ``n = (y (M // k)) >> 1``,
                 ``saturate(((n + bias) weight + 2^(shift-1)) >> shift)``
===============  =====================================================================================

``m``, ``ma``, ``mb`` are int32 constants, ``numerator`` an int64 one, that broadcast from the right against one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

#: Fraction bits of the normalized value ``n`` inside ``layer_norm``.
LAYER_NORM_FRACTION_BITS = 20


@dataclass(frozen=True, slots=True)
class OpSignature:
    """What an operator takes.

    Args:
        values: names of the operands that are values (or constants standing for one).
        constants: names of the operands that must be constants, after the values.
        attributes: names of the attributes, all required.
        variadic: whether the last value may be repeated.
    """

    values: tuple[str, ...]
    constants: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    variadic: bool = False


_SATURATE = ("zero_point", "qmin", "qmax")
_OPERAND_ZEROS = ("zero_point_a", "zero_point_b")

OPS: Mapping[str, OpSignature] = MappingProxyType(
    {
        "quantize": OpSignature(("x",), (), ("scale", *_SATURATE)),
        "dequantize": OpSignature(("x",), ("scale",), ("zero_point",)),
        "linear": OpSignature(("x",), ("weight", "bias")),
        "matmul": OpSignature(("a", "b"), (), (*_OPERAND_ZEROS, "transpose_b")),
        "multiply": OpSignature(("a", "b"), (), _OPERAND_ZEROS),
        "requantize": OpSignature(("x",), ("multiplier",), ("input_zero_point", "shift", *_SATURATE)),
        "add": OpSignature(("a", "b"), ("multiplier_a", "multiplier_b"), (*_OPERAND_ZEROS, "shift", *_SATURATE)),
        "lookup": OpSignature(("x",), ("table",)),
        "exponentials": OpSignature(("x",), ("table",)),
        "row_sum": OpSignature(("x",)),
        "normalize_rows": OpSignature(("x", "sum"), ("numerator",), ("shift", *_SATURATE)),
        "layer_norm": OpSignature(("x",), ("weight", "bias"), ("epsilon", "shift", *_SATURATE)),
        "reduce_sum": OpSignature(("x",), (), ("axis", "zero_point")),
        "patches": OpSignature(("x",), (), ("kernel", "stride", "padding", "pad_value")),
        "reshape": OpSignature(("x",), (), ("shape",)),
        "permute": OpSignature(("x",), (), ("axes",)),
        "slice": OpSignature(("x",), (), ("axis", "start", "stop", "step")),
        "concat": OpSignature(("x",), (), ("axis",), variadic=True),
        "shiftmax": OpSignature(("x",), (), ("inverse_scale", "window", "bits")),
        "shift_gelu": OpSignature(("x",), (), ("input_zero_point", "inverse_scale", "window", "bits")),
        "i_layer_norm": OpSignature(("x",), ("weight", "bias"), ("start", "iterations", "shift", *_SATURATE)),
    }
)
