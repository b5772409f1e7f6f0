"""Products of 8-bit codes on tensor cores: a block's tile of sums, and which thread holds which of them.

A block of four warps computes 64 by 64 sums. Codes come from global into shared memory 16 bytes at a time
(``cp.async``), some steps of the depth ahead of the products; ``ldmatrix`` hands them to the threads as
``mma.m16n8k32`` wants them. A thread is given sums of contiguous columns: the rows of the weights are handed out in the
order that makes it so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm_backend.imports import import_tvm
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, local, once, script

#: Rows, columns and depth of a block's tile, and its warps along rows and columns.
TILE, DEPTH, WARPS = 64, 64, 2
THREADS = 32 * WARPS * WARPS
#: Tiles in shared memory: products of one, the others on their way.
STAGES = 3
#: Bytes of a copy, of a row of an ``ldmatrix``, and of what a code's row has to be a multiple of.
CHUNK = 16
_CHUNKS = DEPTH // CHUNK
_SHARE = TILE // WARPS
#: Fragments of a warp: 16 rows and 8 columns each.
_ROW_TILES, _COLUMN_TILES = _SHARE // 16, _SHARE // 8
#: Contiguous columns of a thread.
_COLUMNS = 2 * _COLUMN_TILES

_LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
_COPY = "cp.async.cg.shared.global"

#: Takes row, column and the sum there.
Store = Callable[[Expr, Expr, Expr], None]


@dataclass(frozen=True)
class Product:
    """``left @ right.T``, tile by tile.

    Args:
        left: int8 or uint8 (rows, depth); ``depth`` a multiple of 16.
        right: int8 (columns, depth), both rounded up to whole tiles.
        rows: how many there are.
        depth: of ``left``.
    """

    left: Buffer
    right: Buffer
    rows: Expr
    depth: int

    def run(self, store: Store) -> None:
        """Emit the whole kernel; ``store`` is called with every sum of whole tiles, those beyond the columns too."""
        tirx = script()
        tirx.device_entry()
        columns = int(self.right.shape[0]) // TILE
        blocks = cast((self.rows + (TILE - 1)) // TILE, "int32")
        column_tile, row_tile = tirx.cta_id([columns, blocks])
        thread = tirx.thread_id([THREADS])
        lane, warp = thread % 32, thread // 32
        first_row = once(cast(row_tile, "int64") * TILE)
        left, right = (tirx.alloc_buffer((STAGES * TILE * DEPTH,), "int8", scope="shared") for _ in range(2))
        sums = [local(4, "uint32") for _ in range(_ROW_TILES * _COLUMN_TILES)]
        for fragment in sums:
            for i in range(4):
                tirx.buffer_store(fragment, literal(0, "uint32"), [i])
        steps = int(self.right.shape[1]) // DEPTH

        def fetch(step: Expr, stage: Expr) -> None:
            self._fetch(left, right, thread, first_row, column_tile * TILE, step, stage)

        for step in range(STAGES - 1):
            if step < steps:
                fetch(step, step)
            tirx.evaluate(tirx.ptx["cp.async.commit_group"]())
        with tirx.serial(steps) as step:
            tirx.evaluate(tirx.ptx["cp.async.wait_group"](STAGES - 2))
            tirx.evaluate(tirx.cuda.cta_sync())
            ahead = step + (STAGES - 1)
            with tirx.If(ahead < steps), tirx.Then():
                fetch(ahead, ahead % STAGES)
            tirx.evaluate(tirx.ptx["cp.async.commit_group"]())
            self._multiply(left, right, sums, lane, warp, step % STAGES)
        for i in range(_ROW_TILES):
            for half in range(2):
                row = first_row + cast(warp // WARPS * _SHARE + i * 16 + half * 8 + lane // 4, "int64")
                with tirx.If(row < self.rows), tirx.Then():
                    for j in range(_COLUMN_TILES):
                        for e in range(2):
                            column = column_tile * TILE + warp % WARPS * _SHARE + lane % 4 * _COLUMNS + 2 * j + e
                            store(row, column, cast(sums[i * _COLUMN_TILES + j][half * 2 + e], "int32"))

    def _fetch(
        self, left: Buffer, right: Buffer, thread: Expr, first_row: Expr, first_column: Expr, step: Expr, stage: Expr
    ) -> None:
        """Start the copies of one step of the depth; what lies beyond the codes becomes zeros."""
        tirx = script()
        choose = import_tvm("tvm.tirx").Select
        for i in range(TILE * _CHUNKS // THREADS):
            index = thread + i * THREADS
            place, chunk = index // _CHUNKS, index % _CHUNKS
            at = step * DEPTH + chunk * CHUNK
            row = first_row + cast(place, "int64")
            there = tirx.And(row < self.rows, at < self.depth)
            source = self.left.ptr_to([tirx.min(row, self.rows - 1), tirx.min(at, self.depth - CHUNK)])
            size = choose(there, literal(CHUNK, "uint32"), literal(0, "uint32"))
            tirx.evaluate(tirx.ptx[_COPY](left.ptr_to([_left_place(stage, place, chunk)]), source, CHUNK, size))
            source = self.right.ptr_to([first_column + place, at])
            tirx.evaluate(tirx.ptx[_COPY](right.ptr_to([_right_place(stage, place, chunk)]), source, CHUNK))

    def _multiply(self, left: Buffer, right: Buffer, sums: list[Buffer], lane: Expr, warp: Expr, stage: Expr) -> None:
        """Add the products of one step of the depth."""
        tirx = script()
        kind = "u8" if self.left.dtype == "uint8" else "s8"
        instruction = f"mma.sync.aligned.m16n8k32.row.col.s32.{kind}.s8.s32"
        for part in range(DEPTH // 32):
            rows = [local(4, "uint32") for _ in range(_ROW_TILES)]
            columns = [local(2, "uint32") for _ in range(_COLUMN_TILES)]
            for i, fragment in enumerate(rows):
                place = warp // WARPS * _SHARE + i * 16 + lane % 16
                address = left.ptr_to([_left_place(stage, place, part * 2 + lane // 16)])
                tirx.evaluate(tirx.ptx[_LOAD](*(fragment[k] for k in range(4)), address))
            for j in range(0, _COLUMN_TILES, 2):
                # Eight lanes each point at: this tile's lower depths, its upper ones, and the same of the next tile.
                place = warp % WARPS * _SHARE + lane % 8 // 2 * _COLUMNS + (j + lane // 16) * 2 + lane % 2
                address = right.ptr_to([_right_place(stage, place, part * 2 + lane // 8 % 2)])
                pair = [columns[j + k // 2][k % 2] for k in range(4)]
                tirx.evaluate(tirx.ptx[_LOAD](*pair, address))
            for i, a in enumerate(rows):
                for j, b in enumerate(columns):
                    c = [sums[i * _COLUMN_TILES + j][k] for k in range(4)]
                    operands = [*(a[k] for k in range(4)), *(b[k] for k in range(2))]
                    tirx.evaluate(tirx.ptx[instruction](*c, *operands, *c))


def _left_place(stage: Expr, row: Expr, chunk: Expr) -> Expr:
    """Where a chunk lies: eight rows that one ``ldmatrix`` reads side by side meet different banks."""
    return (stage * TILE + row) * DEPTH + script().bitwise_xor(chunk, row // 2 % _CHUNKS) * CHUNK


def _right_place(stage: Expr, row: Expr, chunk: Expr) -> Expr:
    """Likewise for rows that are a thread's columns apart, two by two."""
    return (stage * TILE + row) * DEPTH + script().bitwise_xor(chunk, row // _COLUMNS % _CHUNKS) * CHUNK
