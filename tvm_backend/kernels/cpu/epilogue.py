"""What happens to a tile of int32 sums before it is stored: nothing, codes, codes through a table, a residual sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_backend.kernels.cpu.byte_table import TableStore, join, store_part
from tvm_backend.kernels.cpu.rescale import rescale
from tvm_backend.kernels.kernel import Array, Layout
from tvm_backend.kernels.shared.arithmetic import cast, literal, minus
from tvm_backend.kernels.shared.epilogue import Epilogue, operand_zero_point
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.targets import CpuTarget


class Finisher:
    """An epilogue inside a kernel: its constants are arguments, and it turns rows of sums into rows of the result."""

    def __init__(
        self, epilogue: Epilogue, function: Function, count: int, padded: int, lanes: int, target: CpuTarget
    ) -> None:
        """Declare the arguments.

        Args:
            epilogue: what to do.
            function: the kernel, open.
            count: columns.
            padded: columns, rounded up to whole tiles.
            lanes: of a vector of sums.
            target: decides how tables are read.
        """
        self._epilogue, self._lanes = epilogue, lanes
        self._multiplier = self._addend = self._addend_multiplier = None
        self._table: TableStore | None = None
        rule = epilogue.rescale
        if rule is not None:
            self._multiplier = _column_constant(function, rule.multiplier, count, padded)
            if rule.addend is not None:
                assert rule.addend_multiplier is not None
                self._addend = function.value(rule.addend, Layout.matrix(rule.node.type.shape))
                self._addend_multiplier = _column_constant(function, rule.addend_multiplier, count, padded)
        if epilogue.table is not None:
            assert rule is not None
            self._table = TableStore(epilogue.table, rule.node.type.dtype, function, target)

    def finish(self, result: Buffer, row: Expr, column: Expr, sums: Sequence[Expr], columns: int) -> None:
        """Store one row of a tile.

        Args:
            result: int32, or of the epilogue's type.
            row: row of the result.
            column: first column of the tile.
            sums: vectors of sums.
            columns: how many columns exist, at least one of the last vector.
        """
        tirx, lanes = script(), self._lanes
        values = [
            self._codes(value, row, column + v * lanes, min(lanes, columns - v * lanes)) for v, value in enumerate(sums)
        ]
        width = len(values) * lanes
        if self._table is not None:
            self._table.store(result, (row, column), values, lanes, columns)
        elif columns == width:
            tirx.buffer_store(result, join(values, lanes), [row, tirx.ramp(column, 1, width)])
        else:
            store_part(result, (row, column), join(values, lanes), width, columns)

    def _codes(self, sums: Expr, row: Expr, column: Expr, columns: int) -> Expr:
        tirx, lanes, rule = script(), self._lanes, self._epilogue.rescale
        if rule is None:
            return sums
        zero_point = operand_zero_point(rule.node, rule.position)
        centred = sums - literal(zero_point, "int32", lanes) if zero_point else sums
        terms = [(centred, _vector(self._multiplier, column, lanes))]
        if self._addend is not None:
            if columns == lanes:
                codes = cast(self._addend[row, tirx.ramp(column, 1, lanes)], "int32", lanes)
            else:
                part = local(lanes, "int32")
                tirx.buffer_store(part, literal(0, "int32", lanes), [tirx.ramp(0, 1, lanes)])
                with tirx.serial(columns) as j:
                    tirx.buffer_store(part, cast(self._addend[row, column + j], "int32"), [j])
                codes = part[tirx.ramp(0, 1, lanes)]
            other = minus(codes, operand_zero_point(rule.node, 1 - rule.position), "int32", lanes)
            terms.append((other, _vector(self._addend_multiplier, column, lanes)))
        return rescale(rule.node, terms, lanes, narrow=rule.narrow)


def _column_constant(function: Function, array: Array, count: int, padded: int) -> Buffer | int:
    """Return a constant of one entry as a number, else an argument with one entry a padded column."""
    flat = array.reshape(-1)
    if flat.size == 1 or bool((flat == flat[0]).all()):
        return int(flat[0])
    entries = np.zeros(padded, np.int32)
    entries[:count] = np.broadcast_to(flat, (count,))
    return function.constant(entries)


def _vector(source: Buffer | int, column: Expr, lanes: int) -> Expr:
    if isinstance(source, int):
        return literal(source, "int32", lanes)
    return source[script().ramp(column, 1, lanes)]
