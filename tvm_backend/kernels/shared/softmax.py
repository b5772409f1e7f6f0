"""Softmax in integers: exponentials by table, their row sums, and one division a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quantizers.integer.program import INTEGER_RANGES, Node
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal, saturate, shift_round
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.shared.rows import Row, each_row
from tvm_backend.targets import Target


def largest_code(row: Row, codes: Buffer, width: int, dtype: str) -> Buffer:
    """Emit the largest code of a row, int32."""
    tirx = script()
    largest = local(1, "int32")
    tirx.buffer_store(largest, literal(INTEGER_RANGES[dtype][0], "int32"), [0])
    with row.columns(width) as (column,):
        tirx.buffer_store(largest, tirx.max(largest[0], cast(codes[row.index, column], "int32")), [0])
    row.find_largest(largest)
    return largest


def emit_exponentials(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``table[max over the row - x]``."""
    tirx = script()
    x, table = operands
    layout = Layout.matrix(x.type.shape)
    function = Function(node, operands, layout)
    with function.body():
        codes, entries = function.value(0, layout), function.constant(table.constant())
        result = function.result()
        with each_row(function.rows) as row:
            largest = largest_code(row, codes, layout.tail[0], x.type.dtype)
            with row.columns(layout.tail[0]) as (column,):
                distance = largest[0] - cast(codes[row.index, column], "int32")
                tirx.buffer_store(result, entries[distance], [row.index, column])
    return function.kernel()


def emit_row_sum(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Sum over the last axis, int32."""
    tirx = script()
    source = Layout.matrix(operands[0].type.shape)
    function = Function(node, operands, Layout.matrix(node.type.shape))
    with function.body():
        x = function.value(0, source)
        result = function.result()
        with each_row(function.rows) as row:
            total = local(1, "int32")
            tirx.buffer_store(total, literal(0, "int32"), [0])
            with row.columns(source.tail[0]) as (column,):
                tirx.buffer_store(total, total[0] + cast(x[row.index, column], "int32"), [0])
            row.add_up(total)
            tirx.buffer_store(result, total[0], [row.index, 0])
    return function.kernel()


class Numerators:
    """What the sums of rows divide, inside a kernel: a literal, or an argument with one entry for each head."""

    def __init__(self, numerator: Array, function: Function, lead: tuple[int, ...]) -> None:
        self.heads = math.prod(lead)
        self._entries = numerator.reshape(-1)
        self._argument: Buffer | None = None
        if self._entries.size > 1:
            self._argument = function.constant(np.broadcast_to(numerator, (*lead, 1, 1)).reshape(-1))

    def of(self, head: Expr) -> Expr:
        """Return the numerator of a head, read here and held for as long as the surrounding loop runs.

        Args:
            head: index into the leading axes, flattened.
        """
        if self._argument is None:
            return literal(int(self._entries[0]), "int64")
        held = local(1, "int64")
        script().buffer_store(held, self._argument[head], [0])
        return held[0]


def emit_normalize_rows(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``saturate((x (numerator // sum) + 2^(shift-1)) >> shift)``."""
    tirx = script()
    layout = Layout.matrix(node.type.shape)
    *lead, rows, _ = (1, *node.type.shape) if len(node.type.shape) == 1 else node.type.shape
    function = Function(node, operands, layout)
    with function.body():
        x, total = function.value(0, layout), function.value(1, Layout.matrix(operands[1].type.shape))
        numerators = Numerators(operands[2].constant(), function, tuple(lead))
        result = function.result()
        with each_row(function.rows) as row:
            reciprocal = local(1, "int64")
            # Both are positive, where truncation is the floor.
            numerator = numerators.of(row.index // rows % numerators.heads)
            quotient = import_tvm("tvm.tirx").truncdiv(numerator, cast(total[row.index, 0], "int64"))
            tirx.buffer_store(reciprocal, quotient, [0])
            with row.columns(layout.tail[0]) as (column,):
                scaled = shift_round(cast(x[row.index, column], "int64") * reciprocal[0], node.integer("shift"))
                tirx.buffer_store(result, saturate(scaled, node), [row.index, column])
    return function.kernel()
