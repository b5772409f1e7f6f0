"""Weights of 4 and 3 bits: stored that small, and spread to bytes in cache just before they are used.

A column tile of a packed weight is a run of bytes. With 4 bits, each 64 bytes hold 128 of its codes: the lower
halves the first 64, the upper halves the next. With 3 bits, each 96 bytes hold 256 codes: 64 bytes with the two
lower bits of the codes j, j + 64, j + 128, j + 192, then 32 bytes with the highest bits, bit ``2 q + h`` of byte j
belonging to code ``64 q + 32 h + j``. So whole vectors are spread with shifts and masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from quantizers.integer.bit_packing import narrowest
from tvm_backend.kernels.cpu.byte_table import join
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Buffer, Expr, script


@dataclass(frozen=True, slots=True)
class Width:
    """How codes of one width are stored.

    Args:
        codes: in a block.
        size: bytes of a block.
        offset: added to codes, so that none is negative.
    """

    codes: int
    size: int
    offset: int


#: Bits to the form of storage; 8 bits are stored as they are.
WIDTHS: Mapping[int, Width] = MappingProxyType({3: Width(256, 96, 4), 4: Width(128, 64, 8)})


def needed_bits(weights: Array) -> int:
    """Return the smallest stored width that holds all codes: 3, 4 or 8."""
    needed = narrowest(weights)
    return next((bits for bits in WIDTHS if needed <= bits), 8)


def narrow(packed: Array, bits: int) -> Array:
    """Store int8 codes ``[tiles, ...]`` as uint8 ``[tiles, bytes]``, padded with zeros to whole blocks."""
    width = WIDTHS[bits]
    tiles = len(packed)
    flat = packed.reshape(tiles, -1)
    blocks = -(-flat.shape[1] // width.codes)
    codes = np.zeros((tiles, blocks * width.codes), np.int8)
    codes[:, : flat.shape[1]] = flat
    unsigned = (codes.astype(np.int16) + width.offset).astype(np.uint8).reshape(tiles, blocks, width.codes // 64, 64)
    if bits == 4:
        stored = unsigned[:, :, 0] | unsigned[:, :, 1] << 4
    else:
        low = np.zeros((tiles, blocks, 64), np.uint8)
        high = np.zeros((tiles, blocks, 32), np.uint8)
        for q in range(4):
            low |= (unsigned[:, :, q] & 3) << (2 * q)
            for half in range(2):
                high |= (unsigned[:, :, q, 32 * half : 32 * half + 32] >> 2) << (2 * q + half)
        stored = np.concatenate([low, high], axis=2)
    return np.ascontiguousarray(stored.reshape(tiles, blocks * width.size))


class Spread:
    """The codes of one column tile as bytes, in a copy that a task makes."""

    def __init__(self, stored: Buffer, count: int, bits: int) -> None:
        """Declare the copy.

        Args:
            stored: what :func:`narrow` returned.
            count: codes of a tile.
            bits: their width.
        """
        self._stored, self._width, self._bits = stored, WIDTHS[bits], bits
        self._blocks = -(-count // self._width.codes)
        self.codes: Buffer = script().alloc_buffer((self._blocks * self._width.codes,), "int8", scope="global")

    def fill(self, tile: Expr) -> None:
        """Spread the codes of a tile."""
        tirx = script()
        with tirx.serial(self._blocks) as block:
            start = block * self._width.size
            if self._bits == 4:
                word = tirx.reinterpret(self._stored.vload([tile, start], "uint8x64"), dtype="int32x16")
                for q in range(2):
                    self._store(block, q, _bits(word, 4 * q, 0x0F0F0F0F, 16))
            else:
                low = tirx.reinterpret(self._stored.vload([tile, start], "uint8x64"), dtype="int32x16")
                high = tirx.reinterpret(self._stored.vload([tile, start + 64], "uint8x32"), dtype="int32x8")
                for q in range(4):
                    top = join([_bits(high, 2 * q + half, 0x01010101, 8) for half in range(2)], 8)
                    shifted = tirx.shift_left(top, literal(2, "int32", 16))
                    self._store(block, q, tirx.bitwise_or(_bits(low, 2 * q, 0x03030303, 16), shifted))

    def _store(self, block: Expr, q: int, unsigned: Expr) -> None:
        tirx = script()
        codes = tirx.reinterpret(unsigned, dtype="int8x64") - literal(self._width.offset, "int8", 64)
        tirx.buffer_store(self.codes, codes, [tirx.ramp(block * self._width.codes + q * 64, 1, 64)])


def _bits(word: Expr, shift: int, mask: int, lanes: int) -> Expr:
    tirx = script()
    moved = tirx.shift_right(word, literal(shift, "int32", lanes)) if shift else word
    return tirx.bitwise_and(moved, literal(mask, "int32", lanes))
