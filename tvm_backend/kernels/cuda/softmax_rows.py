"""What a fused attention makes of the codes of a row of scores, and of the row's product with the values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cuda.rescale import Numbers, Shift
from tvm_backend.kernels.cuda.score_stages import ScoreWriter
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.attention import Attention, Divided, Published
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.shared.ivit import reciprocal, shift_exponentials
from tvm_backend.kernels.shared.softmax import Numerators


class DividedRows:
    """Exponentials of one byte, and a division of each row at the end."""

    def __init__(self, softmax: Divided, function: Function, rule: Attention) -> None:
        self._wide = "int32" if softmax.narrow_reciprocal else "int64"
        self._table = function.constant(softmax.table)
        self._numerators = Numerators(np.broadcast_to(softmax.numerator, (*rule.lead, 1, 1)), function, rule.lead)
        self._shift = Shift(softmax.node, function, narrow=softmax.narrow_reciprocal)

    def hold(self) -> None:
        """Read what is the same for all rows."""
        self._shift.hold()

    def probability(self, distance: Expr, _half: int) -> Expr:
        """Return the exponential of a code, int32."""
        return cast(self._table[distance], "int32")

    def begin_row(self, head: Expr, total: Expr) -> None:
        """Divide, before the first :meth:`code` of a row whose exponentials have a sum."""
        quotient = import_tvm("tvm.tirx").truncdiv(self._numerators.of(head), cast(total, "int64"))
        self._reciprocal = local(1, self._wide)
        script().buffer_store(self._reciprocal, cast(quotient, self._wide), [0])

    def code(self, total: Expr, _head: Expr) -> Expr:
        """Return the code of a sum of values."""
        return self._shift.code(cast(total, "int64") * cast(self._reciprocal[0], "int64"))


class ShiftmaxRows:
    """I-ViT's Shiftmax: a first pass adds up a row, whose reciprocal makes probabilities of exponentials."""

    def __init__(self, softmax: Published, function: Function, rule: Attention) -> None:
        node = softmax.shiftmax
        self._table = function.constant(shift_exponentials(node))
        self._shift = Numbers(function, [32 - node.integer("bits")])
        self._last = ScoreWriter(softmax.last, function, rule)

    def hold(self) -> None:
        """Read what is the same for all rows."""
        self._last.hold()
        (self._held_shift,) = self._shift.hold()
        self._sums = local(2, "int64")
        for half in range(2):
            script().buffer_store(self._sums, literal(0, "int64"), [half])

    def add(self, distance: Expr, half: int) -> None:
        """Add the exponential of a code to its row's sum."""
        script().buffer_store(self._sums, self._sums[half] + self._table[distance], [half])

    def finish_sums(self, over_quad: Callable[[Buffer, int], None]) -> None:
        """Turn the sums of the threads of each row into its factor."""
        for half in range(2):
            over_quad(self._sums, half)
            script().buffer_store(self._sums, reciprocal(self._sums[half]), [half])

    def probability(self, distance: Expr, half: int) -> Expr:
        """Return the probability of a code, int32."""
        return cast(script().shift_right(self._table[distance] * self._sums[half], self._held_shift), "int32")

    def begin_row(self, _head: Expr, _total: Expr) -> None:
        """Nothing is divided at the end."""

    def code(self, total: Expr, head: Expr) -> Expr:
        """Return the code of a sum of values."""
        return self._last.code(total, head, literal(0, "int64"), literal(0, "int32"))
