"""Linear layers: sums on tensor cores, and what an epilogue makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.kernels.cuda.instructions import Instructions
from tvm_backend.kernels.cuda.rescale import Rescaling
from tvm_backend.kernels.cuda.runs import Run
from tvm_backend.kernels.cuda.shared_rows import Source, common_unit
from tvm_backend.kernels.cuda.tables import look_up
from tvm_backend.kernels.cuda.tensor_cores import Product, StoredWeights
from tvm_backend.kernels.cuda.tiles import LinearShape, Tile
from tvm_backend.kernels.cuda.warp_groups import GroupProduct, SwizzledWeights
from tvm_backend.kernels.cuda.weights import PackedWeights, stored_bits
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.kernels.shared.epilogue import Epilogue
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, script
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
    bits = stored_bits(weights)
    tile = target.tiles.of(LinearShape(count, depth, bits))
    packed: StoredWeights = PackedWeights(bits, tile.depth, tile.column_warps, tile.column_tiles)
    product = Product
    if tile.groups:
        packed, product = SwizzledWeights(tile), GroupProduct
    function = Function(node, operands, Layout.matrix(node.type.shape), epilogue.dtype)
    with function.body():
        codes = function.value(0, Layout.matrix(x.type.shape))
        stored = function.constant(packed.pack(weights))
        finisher = _Finisher(epilogue, function, bias, tile)
        result = function.result()
        run = Run(result, 2 * tile.column_tiles, aligned=count % (2 * tile.column_tiles) == 0)

        def store(row: Expr, column: Expr, sums: list[Expr]) -> None:
            with tirx.If(column < count), tirx.Then():
                run.store([row, column], finisher.finish(sums, row, column), count)

        source = Source(codes, lambda row, byte: [row, byte], function.rows, depth, common_unit(depth))
        product(source, stored, packed, tile, Instructions(target)).run(finisher.hold, store)
    return function.kernel()


class _Finisher:
    """An epilogue inside a kernel, for the sums of neighbouring columns."""

    def __init__(self, epilogue: Epilogue, function: Function, bias: Array, tile: Tile) -> None:
        self._rule, self._function = epilogue.rescale, function
        count, self._length = len(bias), 2 * tile.column_tiles
        # What each column has is read for whole runs.
        self._room = count + -count % self._length
        self._starts = self._of_columns(bias)
        self._table: Buffer | None = None
        self._addend: Run | None = None
        rule = self._rule
        if rule is not None:
            self._rescaling = Rescaling(rule.node, function, narrow=rule.narrow)
            self._multipliers = self._of_columns(np.broadcast_to(rule.multiplier.reshape(-1), (count,)))
            if rule.addend is not None:
                assert rule.addend_multiplier is not None
                addend = function.value(rule.addend, Layout.matrix(rule.node.type.shape))
                self._addend = Run(addend, self._length, aligned=count == self._room)
                others = np.broadcast_to(rule.addend_multiplier.reshape(-1), (count,))
                self._addend_multipliers = self._of_columns(others)
        if epilogue.table is not None:
            self._table = function.constant(epilogue.table)
        self._count = count

    def _of_columns(self, array: Array) -> Run:
        padded = np.zeros(self._room, np.int32)
        padded[: len(array)] = array
        return Run(self._function.constant(padded), self._length, aligned=True)

    def hold(self) -> None:
        """Read what is the same for all sums of a thread."""
        if self._rule is not None:
            self._rescaling.hold()

    def finish(self, sums: list[Expr], row: Expr, column: Expr) -> list[Expr]:
        """Return what is stored in place of sums."""
        totals = [total + start for total, start in zip(sums, self._starts.load([column]), strict=True)]
        rule = self._rule
        if rule is None:
            return totals
        terms = [
            [(rule.position, total, multiplier)]
            for total, multiplier in zip(totals, self._multipliers.load([column]), strict=True)
        ]
        if self._addend is not None:
            others = self._addend.load([row, column], self._count)
            factors = self._addend_multipliers.load([column])
            for term, other, factor in zip(terms, others, factors, strict=True):
                term.append((1 - rule.position, other, factor))
        codes = [self._rescaling.code(term) for term in terms]
        if self._table is None:
            return codes
        return [look_up(self._table, code, rule.node.type.dtype) for code in codes]
