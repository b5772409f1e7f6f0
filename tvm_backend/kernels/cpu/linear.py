"""Linear layers: weights packed when the program is built, one register tile at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.arithmetic import cast, requantize
from tvm_backend.kernels.cpu.dot import LANES, Tile, accumulators, dot4, lane, load_group
from tvm_backend.kernels.cpu.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.targets import CpuTarget

#: Row tiles that one task works through with the same columns of the weight.
_TILES_PER_TASK = 8


def pack(weight: Array, tile: Tile) -> Array:
    """Arrange int8[N, K] as ``[column tile][group][width * group]``, padded with zeros."""
    count, depth = weight.shape
    tiles, groups = tile.columns(count), tile.groups(depth)
    padded = np.zeros((tiles * tile.width, groups * tile.group), weight.dtype)
    padded[:count, :depth] = weight
    packed = padded.reshape(tiles, tile.width, groups, tile.group).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(packed.reshape(tiles, groups, tile.width * tile.group))


def pad_columns(vector: Array, tile: Tile, count: int) -> Array:
    """Broadcast to one entry a column and pad with zeros to whole tiles."""
    padded = np.zeros(tile.columns(count) * tile.width, vector.dtype)
    padded[:count] = vector.reshape(-1)
    return padded


@dataclass(frozen=True)
class _Task:
    """Buffers and extents that the parts of the kernel share."""

    node: Node
    tile: Tile
    depth: int
    count: int
    signed: bool
    x: Buffer
    weight: Buffer
    bias: Buffer
    multiplier: Buffer | None
    result: Buffer
    rows: Expr

    def accumulate(self, sums: Sequence[Buffer], first_row: Expr, column_tile: Expr) -> None:
        """Compute one tile of sums, bias included."""
        tirx, tile = script(), self.tile
        for i in range(tile.rows):
            for v in range(tile.vectors):
                start = self.bias[tirx.ramp(column_tile * tile.width + v * LANES, 1, LANES)]
                tirx.buffer_store(sums[i], start, [lane(v)])
        whole = self.depth // tile.group
        with tirx.serial(whole) as group:
            self._step(sums, first_row, column_tile, group, tile.group)
        if self.depth % tile.group:
            self._step(sums, first_row, column_tile, whole, self.depth % tile.group)

    def _step(self, sums: Sequence[Buffer], first_row: Expr, column_tile: Expr, group: Expr, count: int) -> None:
        tirx, tile = script(), self.tile
        length = LANES * tile.group
        for i in range(tile.rows):
            # Rows beyond the end repeat the last one; they are computed and not stored.
            row = tirx.min(first_row + i, self.rows - 1)
            if tile.group == 4:
                word = load_group(self.x, [row], group * 4, count, signed=self.signed)
            else:
                word = cast(self.x[row, group], "int32")
            for v in range(tile.vectors):
                weights = self.weight.vload([column_tile, group, v * length], f"int8x{length}")
                old = sums[i][lane(v)]
                codes = tirx.broadcast(word, LANES)
                new = dot4(old, codes, weights) if tile.group == 4 else old + codes * cast(weights, "int32", LANES)
                tirx.buffer_store(sums[i], new, [lane(v)])

    def _finished(self, sums: Sequence[Buffer], row: int, vector: int, column: Expr) -> Expr:
        value = sums[row][lane(vector)]
        if self.multiplier is None:
            return value
        return requantize(self.node, value, self.multiplier[script().ramp(column, 1, LANES)], LANES)

    def store(self, sums: Sequence[Buffer], first_row: Expr, column_tile: Expr, columns: int) -> None:
        """Store the first ``columns`` columns of a tile, for the rows that exist."""
        tirx, tile = script(), self.tile
        for i in range(tile.rows):
            with tirx.If(first_row + i < self.rows), tirx.Then():
                for v in range(-(-columns // LANES)):
                    column = column_tile * tile.width + v * LANES
                    value = self._finished(sums, i, v, column)
                    if (v + 1) * LANES <= columns:
                        tirx.buffer_store(self.result, value, [first_row + i, tirx.ramp(column, 1, LANES)])
                        continue
                    partial = local(LANES, self.result.dtype)
                    tirx.buffer_store(partial, value, [tirx.ramp(0, 1, LANES)])
                    with tirx.serial(columns - v * LANES) as j:
                        tirx.buffer_store(self.result, partial[j], [first_row + i, column + j])


def emit_linear(
    node: Node, operands: Sequence[Operand], target: CpuTarget, rescale: tuple[Node, Array] | None = None
) -> Kernel:
    """``x @ weight.T + bias``, int32, or its requantized codes.

    Args:
        node: the ``linear`` node.
        operands: x, weight, bias.
        target: decides between the dot-product instruction and widening multiplies.
        rescale: the ``requantize`` node that alone reads the result, and its multiplier, of one entry or one a column.
    """
    tirx = script()
    x, weights = operands[0], operands[1].constant()
    bias = operands[2].constant().astype(np.int64)
    count, depth = weights.shape
    signed = x.type.dtype == "int8"
    tile = Tile.choose(count, target, dot4=target.vnni)
    if tile.group == 4 and signed:
        # The instruction sees codes that are 128 larger. Both this and the sums wrap around modulo 2^32,
        # so the total is exact even where an intermediate is not.
        bias = bias - 128 * weights.astype(np.int64).sum(1)
    wrapped = bias.astype(np.uint32).view(np.int32)
    last = node if rescale is None else rescale[0]
    function = Function(last, operands[:1], Layout.matrix(node.type.shape))
    tiles = tile.columns(count)
    with function.body():
        task = _Task(
            last, tile, depth, count, signed,
            x=function.value(0, Layout.matrix(x.type.shape)),
            weight=function.constant(pack(weights, tile)),
            bias=function.constant(pad_columns(wrapped, tile, count)),
            multiplier=None if rescale is None else function.constant(
                pad_columns(np.broadcast_to(rescale[1].reshape(-1), (count,)), tile, count)
            ),
            result=function.result(),
            rows=function.rows,
        )  # fmt: skip
        rows_per_task = tile.rows * _TILES_PER_TASK
        chunks = (function.rows + (rows_per_task - 1)) // rows_per_task
        with tirx.parallel(chunks * tiles) as index, tirx.serial(_TILES_PER_TASK) as step:
            column_tile = index // chunks
            first_row = (index % chunks) * rows_per_task + step * tile.rows
            with tirx.If(first_row < function.rows), tirx.Then():
                sums = accumulators(tile)
                task.accumulate(sums, first_row, column_tile)
                rest = count - (tiles - 1) * tile.width
                if rest == tile.width:
                    task.store(sums, first_row, column_tile, tile.width)
                else:
                    with tirx.If(column_tile < tiles - 1):
                        with tirx.Then():
                            task.store(sums, first_row, column_tile, tile.width)
                        with tirx.Else():
                            task.store(sums, first_row, column_tile, rest)
    return function.kernel()
