"""What a linear does to its int32 sums before they are stored: nothing, codes, a table, a residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quantizers.integer.bounds import Interval
from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Array


@dataclass(frozen=True)
class Rescale:
    """The sums times a multiplier, as codes.

    Args:
        node: ``requantize``, or ``add`` where the sums are one of its operands.
        multiplier: one entry, or one a column.
        narrow: whether the result is proved to fit int32 before it is clipped.
        position: which of the node's operands the sums are.
        addend: index of the kernel's operand that ``add`` adds, if it does.
        addend_multiplier: one entry, or one a column.
    """

    node: Node
    multiplier: Array = field(repr=False)
    narrow: bool
    position: int = 0
    addend: int | None = None
    addend_multiplier: Array | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Epilogue:
    """A chain of operators that alone read the sums.

    Args:
        rescale: None leaves the sums as they are.
        table: 256 entries of int8 or uint8 that replace the codes.
        dtype: element type of the result.
    """

    rescale: Rescale | None
    table: Array | None = field(repr=False)
    dtype: str


def fits_int32(terms: Sequence[tuple[Interval, Interval]], shift: int, zero_point: int) -> bool:
    """Whether the rounded result and its sum with the zero point are proved to fit int32.

    Args:
        terms: bounds of each x, its zero point taken off, and of its multiplier.
        shift: right shift.
        zero_point: added after the shift.
    """
    reach = sum(x.magnitude * m.magnitude for x, m in terms)
    return ((reach + (1 << (shift - 1))) >> shift) + abs(zero_point) + 1 < 2**31


def operand_zero_point(node: Node, position: int) -> int:
    """Return the zero point of one of the values that a node rescales.

    Args:
        node: ``requantize`` or ``add``.
        position: 0, or for ``add`` also 1.
    """
    keys = ("input_zero_point",) if node.op == "requantize" else ("zero_point_a", "zero_point_b")
    return node.integer(keys[position])
