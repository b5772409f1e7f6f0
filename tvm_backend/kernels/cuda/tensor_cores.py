"""Products of 8-bit codes and weights on tensor cores: a block's tile of sums, and which thread holds which of them.

Codes come from global into shared memory, some steps of the depth ahead of the products; ``ldmatrix`` hands them to the
threads as ``mma.m16n8k32`` wants them, and weights lie in that order already. A thread is given sums of contiguous
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm_backend.kernels.cuda.instructions import CHUNK, Instructions, barrier, load_matrices, words, zero
from tvm_backend.kernels.cuda.shared_rows import SharedRows, Source
from tvm_backend.kernels.cuda.threads import WARP
from tvm_backend.kernels.cuda.tiles import Tile
from tvm_backend.kernels.cuda.weights import STEP, PackedWeights
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, once, script


class StoredWeights(Protocol):
    """Weights in tiles of as many bytes."""

    @property
    def size(self) -> int:
        """Bytes of a tile."""
        ...

    @property
    def spread(self) -> int:
        """Bits that sums are too far to the left."""
        ...

    def pack(self, weights: Array) -> Array:
        """Arrange int8 (columns, depth), padded with zeros to whole tiles, as uint8 (column tiles, steps, bytes)."""
        ...


#: Takes a row and the sums of contiguous columns in it, the first column given.
Store = Callable[[Expr, Expr, list[Expr]], None]


@dataclass(frozen=True)
class Product:
    """``left @ weights.T``, tile by tile.

    Args:
        left: rows of int8 or uint8 codes.
        right: uint8 (column tiles, steps, bytes), from ``packed``.
        packed: how the weights are stored in tiles.
        tile: how the work is cut.
        instructions: of the target.
    """

    left: Source
    right: Buffer
    packed: StoredWeights
    tile: Tile
    instructions: Instructions

    def run(self, prepare: Callable[[], None], store: Store) -> None:
        """Emit the whole kernel.

        Args:
            prepare: called once, before the products, in each thread.
            store: called with every sum of whole tiles, those beyond the columns too.
        """
        tirx, tile = script(), self.tile
        tirx.device_entry()
        column_count, steps = (int(extent) for extent in self.right.shape[:2])
        row_count = cast((self.left.rows + (tile.rows - 1)) // tile.rows, "int32")
        block = tirx.cta_id([row_count * column_count])
        row_tile, column_tile = block // column_count, block % column_count
        thread = tirx.thread_id([tile.threads])
        lane, warp = thread % WARP, thread // WARP
        first_row = once(cast(row_tile, "int64") * tile.rows)
        # Where a swizzle over 64 bytes and eight rows begins again.
        shared = {"scope": "shared", "align": 512}
        codes = tirx.alloc_buffer((tile.stages * tile.rows * tile.depth,), "int8", **shared)
        weights = tirx.alloc_buffer((tile.stages * self.packed.size,), "uint8", **shared)
        sums = [words(4) for _ in range(tile.row_tiles * tile.column_tiles)]
        for fragment in sums:
            zero(fragment, 4)
        prepare()

        def fetch(step: Expr, stage: Expr) -> None:
            self._rows(codes, stage).fetch(
                self.instructions, self.left, first_row, step * tile.depth, thread, tile.threads
            )
            self._fetch_weights(weights, stage, column_tile, step, thread)

        self._accumulate(codes, weights, sums, warp, lane, steps, fetch)
        for i in range(tile.row_tiles):
            for half in range(2):
                local_row = warp // tile.column_warps * (16 * tile.row_tiles) + i * 16 + half * 8 + lane // 4
                row = once(first_row + cast(local_row, "int64"))
                with tirx.If(row < self.left.rows), tirx.Then():
                    fragments = sums[i * tile.column_tiles : (i + 1) * tile.column_tiles]
                    share = warp % tile.column_warps * (8 * tile.column_tiles) + lane % 4 * (2 * tile.column_tiles)
                    found = [self._sum(fragment[half * 2 + e]) for fragment in fragments for e in range(2)]
                    store(row, column_tile * tile.columns + share, found)

    def _accumulate(
        self,
        codes: Buffer,
        weights: Buffer,
        sums: list[Buffer],
        warp: Expr,
        lane: Expr,
        steps: int,
        fetch: Callable[[Expr, Expr], None],
    ) -> None:
        """Fetch and multiply all steps of the depth."""

        def multiply(stage: Expr) -> None:
            self._multiply(codes, weights, sums, lane, warp, stage)

        self._in_turn(steps, self.tile.stages - 1, fetch, multiply)

    def _in_turn(
        self,
        steps: int,
        ahead: int,
        fetch: Callable[[Expr, Expr], None],
        work: Callable[[Expr], None],
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        """Go through the steps of the depth.

        Args:
            steps: how many there are.
            ahead: steps that are on their way while one is worked on, below the number of stages.
            fetch: starts the copies of a step into a stage.
            work: uses a stage.
            arrived: called in each thread once its copies are there, before the others know.
        """
        tirx, stages = script(), self.tile.stages
        for step in range(ahead):
            if step < steps:
                fetch(step, step)
            self.instructions.commit()
        with tirx.serial(steps) as step:
            self.instructions.wait(ahead - 1)
            arrived()
            barrier()
            later = step + ahead
            with tirx.If(later < steps), tirx.Then():
                fetch(later, later % stages)
            self.instructions.commit()
            work(step % stages)

    def _rows(self, storage: Buffer, stage: Expr) -> SharedRows:
        tile = self.tile
        return SharedRows(storage, stage * (tile.rows * tile.depth), tile.rows, tile.depth)

    def _fetch_weights(self, storage: Buffer, stage: Expr, column_tile: Expr, step: Expr, thread: Expr) -> None:
        tirx, size = script(), self.packed.size
        chunks, threads = size // CHUNK, self.tile.threads

        def move(chunk: Expr) -> None:
            source = self.right.ptr_to([column_tile, step, chunk * CHUNK])
            self.instructions.copy(storage.ptr_to([stage * size + chunk * CHUNK]), source, CHUNK)

        with tirx.unroll(chunks // threads) as number:
            move(thread + number * threads)
        if chunks % threads:
            with tirx.If(thread < chunks % threads), tirx.Then():
                move(thread + chunks // threads * threads)

    def _multiply(
        self, codes: Buffer, weights: Buffer, sums: list[Buffer], lane: Expr, warp: Expr, stage: Expr
    ) -> None:
        """Add the products of one step of the depth."""
        tile, kind = self.tile, str(self.left.codes.dtype)
        assert isinstance(self.packed, PackedWeights)
        rows = self._rows(codes, stage)
        for part in range(tile.depth // STEP):
            first = warp // tile.column_warps * (16 * tile.row_tiles) + lane % 16
            left = [
                load_matrices(rows.address(first + i * 16, part * 2 + lane // 16), 4) for i in range(tile.row_tiles)
            ]
            right = self.packed.load(weights, stage * self.packed.size, part, warp % tile.column_warps, lane)
            for i, a in enumerate(left):
                for j, b in enumerate(right):
                    self.instructions.multiply(sums[i * tile.column_tiles + j], a, b, kind, "int8")

    def _sum(self, word: Expr) -> Expr:
        total = cast(word, "int32")
        spread = self.packed.spread
        return script().shift_right(total, literal(spread, "int32")) if spread else total
