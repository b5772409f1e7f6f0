"""Fixed-point rescaling of a vector of int32 sums: ``(sum of x m + 2^(shift-1)) >> shift``, exact.

The products need 64 bits but the result needs 32. So the even and the odd lanes are multiplied on their own
(one widening multiplication each), and the 32 bits that are wanted of each are put back side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.shared.arithmetic import cast, clip, literal, saturate, shift_round
from tvm_backend.kernels.shared.function import Expr, script

_LOW_HALF = 2**32 - 1


def rescale(node: Node, terms: Sequence[tuple[Expr, Expr]], lanes: int, *, narrow: bool) -> Expr:
    """Return the saturated codes of a vector.

    Args:
        node: gives shift, zero point, bounds and element type.
        terms: int32 x and int32 multiplier of each product.
        lanes: even.
        narrow: what :func:`fits_int32` proved.
    """
    tirx = script()
    shift = node.integer("shift")
    if not narrow:
        total = None
        for x, multiplier in terms:
            product = cast(x, "int64", lanes) * cast(multiplier, "int64", lanes)
            total = product if total is None else total + product
        return saturate(shift_round(total, shift, lanes), node, lanes)
    half = lanes // 2
    even, odd = (_sum(part, terms, half) for part in (_even, _odd))
    if shift <= 32:
        rounding = literal(1 << (shift - 1), "int64", half)
        even, odd = even + rounding, odd + rounding
    low = literal(_LOW_HALF, "int64", half)
    high = literal(-(_LOW_HALF + 1), "int64", half)
    if shift > 32:
        even = tirx.bitwise_and(tirx.shift_right(even, literal(32, "int64", half)), low)
        odd = tirx.bitwise_and(odd, high)
    else:
        even = tirx.bitwise_and(tirx.shift_right(even, literal(shift, "int64", half)), low)
        odd = tirx.shift_left(odd, literal(32 - shift, "int64", half)) if shift < 32 else odd
        odd = tirx.bitwise_and(odd, high)
    codes = tirx.reinterpret(tirx.bitwise_or(even, odd), dtype=f"int32x{lanes}")
    if shift > 32:
        # Half a unit has no bits in the lower word, so it is added to the upper one.
        rounded = codes + literal(1 << (shift - 33), "int32", lanes)
        codes = tirx.shift_right(rounded, literal(shift - 32, "int32", lanes))
    return clip(codes, node, lanes)


def _sum(part: Callable[[Expr, int], Expr], terms: Sequence[tuple[Expr, Expr]], half: int) -> Expr:
    """Add the products of the even or of the odd lanes."""
    products = [part(x, half) * part(multiplier, half) for x, multiplier in terms]
    return sum(products[1:], start=products[0])


def _even(vector: Expr, half: int) -> Expr:
    """Sign-extend the even int32 lanes to int64."""
    tirx = script()
    wide, bits = tirx.reinterpret(vector, dtype=f"int64x{half}"), literal(32, "int64", half)
    return tirx.shift_right(tirx.shift_left(wide, bits), bits)


def _odd(vector: Expr, half: int) -> Expr:
    """Sign-extend the odd int32 lanes to int64."""
    wide = script().reinterpret(vector, dtype=f"int64x{half}")
    return script().shift_right(wide, literal(32, "int64", half))
