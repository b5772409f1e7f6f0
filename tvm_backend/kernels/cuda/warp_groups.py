"""Products of Hopper's warp groups: four warps multiply what lies in shared memory, both operands, while they go on.

``wgmma.m64nNk32`` reads rows of 64 bytes, whose chunks of 16 lie as :class:`SharedRows` puts them: the swizzle over 64
bytes. A step of the depth is two products. Sums lie in the threads as those of ``mma.m16n8k32`` do, with all columns of
the tile side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tvm_backend.kernels.cuda.instructions import CHUNK, SIGNS
from tvm_backend.kernels.cuda.tensor_cores import Product
from tvm_backend.kernels.cuda.threads import WARP
from tvm_backend.kernels.cuda.tiles import GROUP, GROUP_DEPTH, GROUP_ROWS, Tile
from tvm_backend.kernels.cuda.weights import STEP
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, local, script

#: Bytes of the eight rows after which the swizzle repeats.
_REPEAT = 8 * GROUP_DEPTH
#: The swizzle over 64 bytes in a descriptor of a matrix.
_SWIZZLE = 2 << 62
# Keeps the compiler from moving registers that a product in flight writes.
_PIN = """__forceinline__ __device__ void tvm_builtin_ptx_pin_register(uint32_t& word) {
  asm volatile("" : "+r"(word) :: "memory");
}
"""


@dataclass(frozen=True)
class SwizzledWeights:
    """Weights of 8 bits as a tile of them lies in shared memory.

    Args:
        tile: of a warp group, whose depth is 64.
    """

    tile: Tile

    @property
    def spread(self) -> int:
        """Bits that sums are too far to the left."""
        return 0

    @property
    def size(self) -> int:
        """Bytes of a tile."""
        return self.tile.columns * GROUP_DEPTH

    def pack(self, weights: Array) -> Array:
        """Arrange int8 (columns, depth), padded with zeros to whole tiles, as uint8 (column tiles, steps, bytes)."""
        columns = self.tile.columns
        padded = np.pad(weights, [(0, -weights.shape[0] % columns), (0, -weights.shape[1] % GROUP_DEPTH)])
        tiles, steps = padded.shape[0] // columns, padded.shape[1] // GROUP_DEPTH
        # A thread's columns are neighbours: rows 8 j + 2 q and the next one hold its columns 2 j and 2 j + 1.
        split = padded.reshape(tiles, 4, columns // 8, 2, steps, GROUP_DEPTH // CHUNK, CHUNK)
        rows = split.transpose(0, 4, 2, 1, 3, 5, 6).reshape(tiles, steps, columns, GROUP_DEPTH // CHUNK, CHUNK)
        row, chunk = np.indices((columns, GROUP_DEPTH // CHUNK))
        swizzled = np.empty_like(rows)
        swizzled[:, :, row, chunk ^ (row // 2 % 4)] = rows
        return np.ascontiguousarray(swizzled.reshape(tiles, steps, -1).view(np.uint8))


@dataclass(frozen=True)
class GroupProduct(Product):
    """``left @ weights.T`` by warp groups, tile by tile; ``packed`` are :class:`SwizzledWeights`."""

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
        """Fetch and multiply, a product behind: what a stage held may go once all warps have waited for its product."""
        del lane
        tirx, tile = script(), self.tile
        group = warp // (GROUP // WARP)
        left = self._descriptor(codes, group * (GROUP_ROWS * GROUP_DEPTH))
        right = self._descriptor(weights, 0)

        def settle() -> None:
            # What copies wrote is not yet seen by products that read shared memory on their own.
            tirx.evaluate(tirx.ptx["fence.proxy.async.shared::cta"]())

        def multiply(stage: Expr) -> None:
            self._multiply_stage(left, right, sums, stage)

        self._in_turn(steps, tile.stages - 2, fetch, multiply, settle)
        tirx.evaluate(tirx.ptx["wgmma.wait_group.sync.aligned"](0))
        self._pin(sums)

    def _multiply_stage(self, left: Expr, right: Expr, sums: list[Buffer], stage: Expr) -> None:
        tirx, tile = script(), self.tile
        kind = f"{SIGNS[str(self.left.codes.dtype)]}.s8"
        name = f"wgmma.mma_async.sync.aligned.m64n{tile.columns}k32.s32.{kind}"
        registers = [fragment[i] for fragment in sums for i in range(4)]
        self._pin(sums)
        tirx.evaluate(tirx.ptx["wgmma.fence.sync.aligned"]())
        for part in range(GROUP_DEPTH // STEP):
            # Descriptors count in units of 16 bytes.
            first, second = (
                place + cast(stage * (size // CHUNK) + part * (STEP // CHUNK), "uint64")
                for place, size in ((left, tile.rows * GROUP_DEPTH), (right, self.packed.size))
            )
            tirx.evaluate(tirx.ptx[name](*registers, first, second, tirx.ptx.pred(literal(1, "uint32"))))
        tirx.evaluate(tirx.ptx["wgmma.commit_group.sync.aligned"]())
        tirx.evaluate(tirx.ptx["wgmma.wait_group.sync.aligned"](1))

    def _pin(self, sums: list[Buffer]) -> None:
        tirx = script()
        for fragment in sums:
            for i in range(4):
                tirx.evaluate(tirx.cuda.func_call("tvm_builtin_ptx_pin_register", fragment[i], source_code=_PIN))

    def _descriptor(self, storage: Buffer, offset: Expr) -> Expr:
        """Return the descriptor of a matrix that begins in the first stage."""
        tirx = script()
        address = tirx.cuda.cvta_generic_to_shared(storage.ptr_to([offset]))
        start = cast(
            tirx.bitwise_and(tirx.shift_right(address, literal(4, "uint32")), literal(0x3FFF, "uint32")), "uint64"
        )
        # The leading dimension means nothing here; eight rows further lie the next ones.
        fixed = _SWIZZLE | (_REPEAT // CHUNK) << 32 | 1 << 16
        held = local(1, "uint64")
        tirx.buffer_store(held, tirx.bitwise_or(start, literal(fixed, "uint64")), [0])
        return held[0]
