"""Linear layers: weights packed when the program is built, one register tile at a time, and an epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cpu.dot import DOTS, Tile
from tvm_backend.kernels.cpu.epilogue import Finisher
from tvm_backend.kernels.cpu.narrow_weights import Spread, narrow, needed_bits
from tvm_backend.kernels.cpu.panel import Panel
from tvm_backend.kernels.kernel import Array, Kernel, Layout, Operand
from tvm_backend.kernels.shared.epilogue import Epilogue
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, once, prefetch_line, script
from tvm_backend.schedule import ALIGNMENT
from tvm_backend.targets import CpuTarget

#: Row tiles that one task works through, at most, with the same columns of the weight: few enough to share the work
#: evenly, and enough that spreading a narrow weight, once a task, costs little.
_TILES_PER_TASK = 8
_TILES_PER_SPREAD = 20
#: Row tiles from which on a thread goes through all columns of its rows, as the kernels before and after do,
#: so that it reads what it wrote itself. With fewer it goes through all rows of its columns: reading all weights on
#: every processor would cost more than the exchange of activations.
_MANY_TILES = 128


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


class _Weights:
    """The packed weights of a task's column tile: where they are stored, or spread to bytes."""

    def __init__(self, tile: Tile, stored: Buffer, bits: int, count: int, column_tile: Expr, tiles: int) -> None:
        # Where memory is slower than the products, the first pass over a tile would wait for it.
        self._next = (column_tile + 1) % tiles
        self._bytes = count * bits // 8
        self._length = tile.dot.lanes * tile.dot.group
        self._width = tile.vectors * self._length
        self._stored, self._column_tile = stored, column_tile
        self._spread = None if bits == 8 else Spread(stored, count, bits)
        if self._spread is not None:
            self._spread.fill(column_tile)

    def load(self, group: Expr, vector: int) -> Expr:
        """Return the codes that one instruction reads."""
        kind = f"int8x{self._length}"
        if self._spread is not None:
            return self._spread.codes.vload([group * self._width + vector * self._length], kind)
        return self._stored.vload([self._column_tile, group, vector * self._length], kind)

    def prefetch(self, place: Expr, group: Expr, groups: int) -> None:
        """Ask for one cache line of the next column tile; the first row tiles together ask for all of it."""
        tirx = script()
        last = -(-self._bytes // (groups * ALIGNMENT)) - 1
        line = tirx.min(place, last) * groups + group
        start = [0] * (len(self._stored.shape) - 2)
        address = tirx.address_of(self._stored[(self._next, *start, line * ALIGNMENT)])
        prefetch_line(address)


@dataclass(frozen=True)
class _Task:
    """Buffers and extents that the parts of the kernel share."""

    tile: Tile
    depth: int
    panel: Panel
    weights: _Weights
    bias: Buffer
    result: Buffer
    rows: Expr
    finisher: Finisher

    def run(self, row_tile: Expr, place: Expr, column_tile: Expr, columns: int) -> None:
        """Compute and store the first ``columns`` columns of one tile.

        Args:
            row_tile: number of the tile of rows.
            place: how many tiles of rows this thread has multiplied with the same columns before.
            column_tile: number of the tile of columns.
            columns: how many exist.
        """
        tirx, tile = script(), self.tile
        first_row, groups = row_tile * tile.rows, tile.groups(self.depth)
        # Rows beyond the end repeat the last one, and store the same numbers again.
        rows = [once(tirx.min(first_row + i, self.rows - 1)) for i in range(tile.rows)]
        sums = tile.accumulators()
        lanes = tile.dot.lanes
        used = range(-(-columns // lanes))
        for partial in sums:
            for v in used:
                start = self.bias[tirx.ramp(column_tile * tile.width + v * lanes, 1, lanes)]
                tirx.buffer_store(partial, start, [tile.lane(v)])
        read = self.panel.fill(rows)
        with tirx.serial(groups) as group:
            self.weights.prefetch(place, group, groups)
            for i, partial in enumerate(sums):
                word = read(i, group)
                for v in used:
                    weights = self.weights.load(group, v)
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
        packed = pack(weights, tile)
        bits = needed_bits(weights)
        stored = function.constant(packed if bits == 8 else narrow(packed, bits))
        starts = function.constant(pad_columns(wrapped, tile, count))
        finisher = Finisher(epilogue, function, count, tiles * tile.width, dot.lanes, target)
        result = function.result()
        row_tiles = (function.rows + (tile.rows - 1)) // tile.rows
        choose = import_tvm("tvm.tirx").Select
        by_rows = row_tiles >= _MANY_TILES
        most = _TILES_PER_TASK if bits == 8 else _TILES_PER_SPREAD
        chunks = (row_tiles + (most - 1)) // most
        per_task = (row_tiles + (chunks - 1)) // chunks
        rest = count - (tiles - 1) * tile.width
        with tirx.parallel(chunks * tiles) as index:
            chunk = once(choose(by_rows, index // tiles, index % chunks))
            column_tile = once(choose(by_rows, index % tiles, index // chunks))
            loader = _Weights(tile, stored, bits, packed[0].size, column_tile, tiles)
            panel = Panel(dot, codes, lambda row, k: [row, k], x.type.dtype, depth, tile.rows)
            task = _Task(tile, depth, panel, loader, starts, result, function.rows, finisher)
            with tirx.serial(per_task) as step:
                row_tile = once(chunk * per_task + step)
                with tirx.If(row_tile < row_tiles), tirx.Then():
                    if rest == tile.width:
                        task.run(row_tile, choose(by_rows, step, row_tile), column_tile, tile.width)
                    else:
                        with tirx.If(column_tile < tiles - 1):
                            with tirx.Then():
                                task.run(row_tile, choose(by_rows, step, row_tile), column_tile, tile.width)
                            with tirx.Else():
                                task.run(row_tile, choose(by_rows, step, row_tile), column_tile, rest)
    return function.kernel()
