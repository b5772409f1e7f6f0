"""Weights in the order in which the threads of a tile want them, in 8, 4 or 3 bits a code.

A lane of a warp needs eight codes of each of its tiles of 8 columns for a step of 32 along the depth: one word of the
lower depths and one of the upper. All words of a lane lie side by side, so that whole vectors are read. With 4 bits one
word holds both, in the upper and the lower halves of its bytes. With 3 bits four such words share one for their two
upper bits, and eight share one for the lowest. A code is spread to the upper bits of a byte, which leaves it
multiplied by 16 or 32: sums are shifted back at the end, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from quantizers.integer.bit_packing import narrowest
from tvm_backend.kernels.cuda.instructions import load_words
from tvm_backend.kernels.cuda.threads import WARP
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Buffer, Expr, script

Bytes = npt.NDArray[np.uint8]

#: Depth of one product of tensor cores.
STEP = 32
#: Bits to how far codes are spread to the left of their place.
_SPREAD: Mapping[int, int] = MappingProxyType({8: 0, 4: 4, 3: 5})
#: Sums of the longest row of products, 255 times -128 each, fit int32 also where codes fill their bytes.
_LONGEST = 2**31 // (255 * 128)


@dataclass(frozen=True)
class PackedWeights:
    """How the weights of a linear are stored.

    Args:
        bits: of a code as stored: 8, 4 or 3.
        depth_step: depth of a tile, a multiple of 32.
        warps: along the columns of a tile.
        column_tiles: of 8 columns, for each warp, a multiple of 4.
    """

    bits: int
    depth_step: int
    warps: int
    column_tiles: int

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return 8 * self.warps * self.column_tiles

    @property
    def spread(self) -> int:
        """Bits that sums are too far to the left."""
        return _SPREAD[self.bits]

    @property
    def words(self) -> int:
        """Words of a lane for one product of each of its column tiles."""
        return 2 * self.column_tiles * self.bits // 8

    @property
    def vector(self) -> int:
        """Words that are read at once."""
        return math.gcd(self.words, 4)

    @property
    def size(self) -> int:
        """Bytes of a tile."""
        return self.depth_step // STEP * self.warps * WARP * self.words * 4

    def pack(self, weights: Array) -> Array:
        """Arrange int8 (columns, depth), padded with zeros to whole tiles, as uint8 (column tiles, steps, bytes)."""
        padding = [(0, -weights.shape[0] % self.columns), (0, -weights.shape[1] % self.depth_step)]
        padded = np.pad(weights, padding)
        tiles, steps = padded.shape[0] // self.columns, padded.shape[1] // STEP
        # Of a lane, the columns of all its tiles are neighbours.
        split = padded.reshape(tiles, self.warps, 4, self.column_tiles, 2, steps, 2, 4, 4)
        codes = split.transpose(0, 5, 1, 2, 4, 7, 3, 6, 8).reshape(tiles, steps, self.warps, WARP, -1, 4)
        stored = _narrowed(codes.view(np.uint8), self.bits)
        vectors = stored.reshape(tiles, steps, self.warps, WARP, -1, 4 * self.vector)
        ordered = vectors.transpose(0, 1, 2, 4, 3, 5)
        return np.ascontiguousarray(ordered.reshape(tiles, -1, self.size))

    def load(self, stored: Buffer, offset: Expr, part: int, warp: Expr, lane: Expr) -> list[list[Expr]]:
        """Read a lane's codes from shared memory.

        Args:
            stored: int8, a tile of :meth:`pack`.
            offset: of its first byte.
            part: which step of 32 of the tile.
            warp: number of the warp along the columns.
            lane: of the warp.

        Returns:
            Two words for each column tile.
        """
        size = 4 * self.vector
        start = offset + (part * self.warps + warp) * (WARP * 4 * self.words) + lane * size
        found: list[Expr] = []
        for number in range(self.words // self.vector):
            address = stored.ptr_to([start + number * (WARP * size)])
            found += load_words(address, self.vector, "shared")
        spread = _SPREADERS[self.bits](found)
        return [spread[2 * tile : 2 * tile + 2] for tile in range(self.column_tiles)]


def stored_bits(weights: Array) -> int:
    """Return the fewest bits that a linear's weights (columns, depth) are stored with: 3, 4 or 8."""
    needed = narrowest(weights) if weights.shape[1] <= _LONGEST else 8
    return next((bits for bits in (3, 4) if needed <= bits), 8)


def _narrowed(codes: Bytes, bits: int) -> Bytes:
    """Store bytes ``[..., words, 4]`` in fewer words."""
    if bits == 4:
        return np.bitwise_or(codes[..., 0::2, :] << 4, codes[..., 1::2, :] & 15, dtype=np.uint8)
    if bits == 3:
        upper, lowest = codes >> 1 & 3, codes & 1
        shape = (*codes.shape[:-2], -1)
        pairs = upper.reshape(*shape, 4, 4)
        joined = sum((pairs[..., i, :] << (6 - 2 * i) for i in range(4)), start=np.zeros_like(pairs[..., 0, :]))
        singles = lowest.reshape(*shape, 8, 4)
        bitmap = sum((singles[..., i, :] << i for i in range(8)), start=np.zeros_like(singles[..., 0, :]))
        return np.concatenate([joined, bitmap], axis=-2)
    return codes


def _as_they_are(stored: list[Expr]) -> list[Expr]:
    return stored


def _from_halves(stored: list[Expr]) -> list[Expr]:
    mask = literal(0xF0F0F0F0, "uint32")
    tirx = script()
    found = []
    for word in stored:
        found += [tirx.bitwise_and(word, mask), tirx.bitwise_and(tirx.shift_left(word, literal(4, "uint32")), mask)]
    return found


def _from_planes(stored: list[Expr]) -> list[Expr]:
    tirx = script()
    count = len(stored) // 3 * 8
    upper, lowest = stored[: count // 4], stored[count // 4 :]
    found = []
    for number in range(count):
        high = _shifted(upper[number // 4], 2 * (number % 4))
        low = _shifted(lowest[number // 8], 5 - number % 8)
        two, one = literal(0xC0C0C0C0, "uint32"), literal(0x20202020, "uint32")
        found.append(tirx.bitwise_or(tirx.bitwise_and(high, two), tirx.bitwise_and(low, one)))
    return found


def _shifted(word: Expr, left: int) -> Expr:
    tirx = script()
    if left == 0:
        return word
    amount = literal(abs(left), "uint32")
    return tirx.shift_left(word, amount) if left > 0 else tirx.shift_right(word, amount)


_SPREADERS = MappingProxyType({8: _as_they_are, 4: _from_halves, 3: _from_planes})
