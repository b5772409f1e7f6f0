"""Linear layers: sums on tensor cores where they can be, and what an epilogue makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.kernels.cuda.tensor_cores import CHUNK, DEPTH, TILE, Product, Store
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal, lowest, minus, saturate, shift_round
from tvm_backend.kernels.shared.epilogue import Epilogue, operand_zero_point
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.targets import CudaTarget


def emit_linear(
    node: Node, operands: Sequence[Operand], target: CudaTarget, epilogue: Epilogue | None = None
) -> Kernel:
    """``x @ weight.T + bias``, int32, or what an epilogue makes of it.

    Args:
        node: the ``linear`` node.
        operands: x, weight, bias, and the addend of the epilogue if it has one.
        target: decides which instructions there are.
        epilogue: the operators that alone read the sums.
    """
    tirx = script()
    epilogue = epilogue or Epilogue(None, None, "int32")
    x, weights, bias = operands[0], operands[1].constant(), operands[2].constant()
    count, depth = weights.shape
    function = Function(node, operands, Layout.matrix(node.type.shape), epilogue.dtype)
    with function.body():
        codes = function.value(0, Layout.matrix(x.type.shape))
        # A row of codes that is no multiple of what a copy moves would be read across its end.
        fast = depth % CHUNK == 0 and target.tensor_cores
        stored = function.constant(_whole_tiles(weights) if fast else weights)
        starts = function.constant(bias)
        finisher = _Finisher(epilogue, function, count)
        result = function.result()

        def store(row: Expr, column: Expr, total: Expr) -> None:
            with tirx.If(column < count), tirx.Then():
                value = finisher.finish(total + starts[column], row, column)
                tirx.buffer_store(result, value, [row, column])

        if fast:
            Product(codes, stored, function.rows, depth).run(store)
        else:
            _element_by_element(codes, stored, function.rows * count, store)
    return function.kernel()


def _element_by_element(codes: Buffer, weights: Buffer, elements: Expr, store: Store) -> None:
    """Give each sum a thread."""
    tirx = script()
    count, depth = weights.shape
    with tirx.parallel(elements) as index:
        row, column = index // int(count), index % int(count)
        total = local(1, "int32")
        tirx.buffer_store(total, literal(0, "int32"), [0])
        with tirx.serial(int(depth)) as k:
            term = cast(codes[row, k], "int32") * cast(weights[column, k], "int32")
            tirx.buffer_store(total, total[0] + term, [0])
        store(row, column, total[0])


def _whole_tiles(weights: Array) -> Array:
    """Pad with zeros to whole tiles."""
    padding = [(0, -weights.shape[0] % TILE), (0, -weights.shape[1] % DEPTH)]
    return np.pad(weights, padding)


class _Finisher:
    """An epilogue inside a kernel, for one sum."""

    def __init__(self, epilogue: Epilogue, function: Function, count: int) -> None:
        self._rule = rule = epilogue.rescale
        self._multiplier = self._addend = self._addend_multiplier = self._table = None
        if rule is not None:
            self._multiplier = _per_column(function, rule.multiplier, count)
            if rule.addend is not None:
                assert rule.addend_multiplier is not None
                self._addend = function.value(rule.addend, Layout.matrix(rule.node.type.shape))
                self._addend_multiplier = _per_column(function, rule.addend_multiplier, count)
        if epilogue.table is not None:
            self._table = function.constant(epilogue.table)

    def finish(self, total: Expr, row: Expr, column: Expr) -> Expr:
        """Return what is stored in place of a sum."""
        rule = self._rule
        if rule is None:
            return total
        sum_of = minus(total, operand_zero_point(rule.node, rule.position), "int64")
        product = sum_of * cast(_entry(self._multiplier, column), "int64")
        if self._addend is not None:
            other = minus(self._addend[row, column], operand_zero_point(rule.node, 1 - rule.position), "int64")
            product = product + other * cast(_entry(self._addend_multiplier, column), "int64")
        code = saturate(shift_round(product, rule.node.integer("shift")), rule.node)
        if self._table is None:
            return code
        held = local(1, "int32")
        script().buffer_store(held, minus(code, lowest(rule.node.type.dtype), "int32"), [0])
        return self._table[held[0]]


def _per_column(function: Function, array: Array, count: int) -> Buffer | int:
    flat = array.reshape(-1)
    if bool((flat == flat[0]).all()):
        return int(flat[0])
    return function.constant(np.broadcast_to(flat, (count,)).astype(np.int32))


def _entry(source: Buffer | int, column: Expr) -> Expr:
    return literal(source, "int32") if isinstance(source, int) else source[column]
