"""``requantize`` and ``add`` of one element.

What differs between the layers of a network is an argument, so that layers of one shape share a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizers.integer.program import INTEGER_RANGES, Node
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Expr, Function, once, script


class Numbers:
    """Integers of a node as an argument.

    Args:
        function: the kernel, whose arguments are being declared.
        values: the integers.
    """

    def __init__(self, function: Function, values: Sequence[int]) -> None:
        self._count = len(values)
        self._argument = function.constant(np.array(values, np.int64))

    def hold(self) -> list[Expr]:
        """Read them, here."""
        return [once(self._argument[i]) for i in range(self._count)]


class Shift:
    """The rounded shift, zero point and limits at the end of a node's arithmetic.

    Args:
        node: with ``shift``, ``zero_point``, ``qmin`` and ``qmax``.
        function: the kernel, whose arguments are being declared.
        narrow: whether what comes out is proved to fit int32 before it is clipped.
    """

    def __init__(self, node: Node, function: Function, *, narrow: bool) -> None:
        self._node, self._dtype = node, "int32" if narrow else "int64"
        self._numbers = Numbers(function, [node.integer("shift"), node.integer("zero_point")])

    def hold(self) -> None:
        """Read the numbers, before the first :meth:`code`."""
        self._shift, self._zero_point = self._numbers.hold()
        self._half = once(script().shift_left(literal(1, "int64"), self._shift - 1))

    def code(self, total: Expr) -> Expr:
        """Return the code of an int64 sum of products."""
        tirx, node, dtype = script(), self._node, self._dtype
        shifted = cast(tirx.shift_right(total + self._half, self._shift), dtype) + cast(self._zero_point, dtype)
        low, high = node.integer("qmin"), node.integer("qmax")
        # All of int32 needs no limits; its lowest number, as TVM writes it, would be a long in C++.
        if dtype == "int32" and (low, high) == INTEGER_RANGES["int32"]:
            return shifted
        return cast(tirx.max(tirx.min(shifted, literal(high, dtype)), literal(low, dtype)), node.type.dtype)


class Rescaling:
    """A whole node.

    Args:
        node: ``requantize`` or ``add``.
        function: the kernel, whose arguments are being declared.
        narrow: as for :class:`Shift`.
    """

    def __init__(self, node: Node, function: Function, *, narrow: bool) -> None:
        keys = ("input_zero_point",) if node.op == "requantize" else ("zero_point_a", "zero_point_b")
        self._shift = Shift(node, function, narrow=narrow)
        self._numbers = Numbers(function, [node.integer(key) for key in keys])

    def hold(self) -> None:
        """Read the numbers, before the first :meth:`code`."""
        self._shift.hold()
        self._zero_points = self._numbers.hold()

    def code(self, terms: Sequence[tuple[int, Expr, Expr]]) -> Expr:
        """Return a code.

        Args:
            terms: which of the node's operands, an element of it that fits int32 without its zero point too, and its
                int32 multiplier.
        """
        products = []
        for position, value, multiplier in terms:
            centred = cast(value, "int32") - cast(self._zero_points[position], "int32")
            products.append(cast(centred, "int64") * cast(multiplier, "int64"))
        total = products[0]
        for product in products[1:]:
            total = total + product
        return self._shift.code(total)
