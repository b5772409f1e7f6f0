"""Linear layers: weights packed when the program is built, one register tile at a time, and an epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.dot import DOTS, Tile
from tvm_backend.kernels.cpu.epilogue import Epilogue, Finisher
from tvm_backend.kernels.cpu.function import Buffer, Expr, Function, script
from tvm_backend.kernels.cpu.panel import Panel
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.targets import CpuTarget

#: Row tiles that one task works through with the same columns of the weight.
_TILES_PER_TASK = 8


def pack(weight: Array, tile: Tile) -> Array:
    """Arrange int8[N, K] as ``[column tile][group][width * group]``, padded with zeros."""
    count, depth = weight.shape
    tiles, groups, group = tile.columns(count), tile.groups(depth), tile.dot.group
    padded = np.zeros((tiles * tile.width, groups * group), weight.dtype)
    padded[:count, :depth] = weight
    packed = padded.reshape(tiles, tile.width, groups, group).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(packed.reshape(tiles, groups, tile.width * group))


def pad_columns(vector: Array, tile: Tile, count: int) -> Array:
    """Pad with zeros to whole tiles."""
    padded = np.zeros(tile.columns(count) * tile.width, vector.dtype)
    padded[:count] = vector
    return padded


@dataclass(frozen=True)
class _Task:
    """Buffers and extents that the parts of the kernel share."""

    tile: Tile
    depth: int
    panel: Panel
    weight: Buffer
    bias: Buffer
    result: Buffer
    rows: Expr
    finisher: Finisher

    def run(self, first_row: Expr, column_tile: Expr, columns: int) -> None:
        """Compute and store the first ``columns`` columns of one tile."""
        tirx, tile = script(), self.tile
        # Rows beyond the end repeat the last one, and store the same numbers again.
        rows = [tirx.min(first_row + i, self.rows - 1) for i in range(tile.rows)]
        sums = tile.accumulators()
        lanes = tile.dot.lanes
        used = range(-(-columns // lanes))
        for partial in sums:
            for v in used:
                start = self.bias[tirx.ramp(column_tile * tile.width + v * lanes, 1, lanes)]
                tirx.buffer_store(partial, start, [tile.lane(v)])
        read = self.panel.fill(rows)
        length = lanes * tile.dot.group
        with tirx.serial(tile.groups(self.depth)) as group:
            for i, partial in enumerate(sums):
                word = read(i, group)
                for v in used:
                    weights = self.weight.vload([column_tile, group, v * length], f"int8x{length}")
                    tirx.buffer_store(
                        partial, tile.dot.multiply_add(partial[tile.lane(v)], word, weights), [tile.lane(v)]
                    )
        for row, partial in zip(rows, sums, strict=True):
            vectors = [partial[tile.lane(v)] for v in used]
            self.finisher.finish(self.result, row, column_tile * tile.width, vectors, columns)


def emit_linear(node: Node, operands: Sequence[Operand], target: CpuTarget, epilogue: Epilogue | None = None) -> Kernel:
    """``x @ weight.T + bias``, int32, or what an epilogue makes of it.

    Args:
        node: the ``linear`` node.
        operands: x, weight, bias, and the addend of the epilogue if it has one.
        target: decides which instruction multiplies.
        epilogue: the operators that alone read the sums.
    """
    tirx = script()
    epilogue = epilogue or Epilogue(None, None, "int32")
    x, weights = operands[0], operands[1].constant()
    bias = operands[2].constant().astype(np.int64)
    count, depth = weights.shape
    dot = DOTS[target.dot]
    tile = Tile.choose(count, dot)
    # The instruction sees shifted codes; both this and the sums wrap around modulo 2^32.
    bias = bias - dot.shift(x.type.dtype) * weights.astype(np.int64).sum(1)
    wrapped = bias.astype(np.uint32).view(np.int32)
    function = Function(node, operands, Layout.matrix(node.type.shape), epilogue.dtype)
    tiles = tile.columns(count)
    with function.body():
        codes = function.value(0, Layout.matrix(x.type.shape))
        weight = function.constant(pack(weights, tile))
        starts = function.constant(pad_columns(wrapped, tile, count))
        finisher = Finisher(epilogue, function, count, tiles * tile.width, dot.lanes, target)
        result = function.result()
        rows_per_task = tile.rows * _TILES_PER_TASK
        chunks = (function.rows + (rows_per_task - 1)) // rows_per_task
        rest = count - (tiles - 1) * tile.width
        with tirx.parallel(chunks * tiles) as index:
            panel = Panel(dot, codes, lambda row, k: [row, k], x.type.dtype, depth, tile.rows)
            task = _Task(tile, depth, panel, weight, starts, result, function.rows, finisher)
            column_tile = index // chunks
            with tirx.serial(_TILES_PER_TASK) as step:
                first_row = (index % chunks) * rows_per_task + step * tile.rows
                with tirx.If(first_row < function.rows), tirx.Then():
                    if rest == tile.width:
                        task.run(first_row, column_tile, tile.width)
                    else:
                        with tirx.If(column_tile < tiles - 1):
                            with tirx.Then():
                                task.run(first_row, column_tile, tile.width)
                            with tirx.Else():
                                task.run(first_row, column_tile, rest)
    return function.kernel()
