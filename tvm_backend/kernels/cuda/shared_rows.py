"""Rows of codes in shared memory, where ``ldmatrix`` finds eight of them in different banks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm_backend.kernels.cuda.instructions import CHUNK, UNITS, Instructions
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, script

#: Chunks that lie in the banks of shared memory at once.
_BANKS = 8


@dataclass(frozen=True)
class Source:
    """Rows of codes in global memory.

    Args:
        codes: int8 or uint8.
        at: subscripts of a row's byte.
        rows: how many there are; reading begins at none beyond them.
        width: bytes of a row.
        unit: bytes that every row and every step of ``at`` is a multiple of: 16, 8, 4 or 1.
    """

    codes: Buffer
    at: Callable[[Expr, Expr], list[Expr]]
    rows: Expr
    width: int
    unit: int


def common_unit(*extents: int) -> int:
    """Return the most bytes that one copy may move where everything is a multiple of some extents."""
    return next((unit for unit in UNITS if math.gcd(unit, *extents) == unit), 1)


@dataclass(frozen=True)
class SharedRows:
    """A part of shared memory.

    Args:
        storage: int8.
        offset: of the first byte.
        rows: rows.
        width: bytes of a row, a multiple of 16.
    """

    storage: Buffer
    offset: Expr
    rows: int
    width: int

    def place(self, row: Expr, chunk: Expr) -> Expr:
        """Return where a chunk of 16 bytes lies."""
        chunks = self.width // CHUNK
        period = math.gcd(chunks, _BANKS)
        moved = script().bitwise_xor(chunk, row // (_BANKS // period) % period) if period > 1 else chunk
        return self.offset + row * self.width + moved * CHUNK

    def address(self, row: Expr, chunk: Expr) -> Expr:
        """Return the address of a chunk."""
        return self.storage.ptr_to([self.place(row, chunk)])

    def fetch(
        self, instructions: Instructions, source: Source, first_row: Expr, first_byte: Expr, thread: Expr, threads: int
    ) -> None:
        """Start to copy a rectangle; what lies beyond the source becomes zeros.

        Args:
            instructions: of the target.
            source: where from.
            first_row: of the source.
            first_byte: of its rows, a multiple of the unit.
            thread: number of this thread.
            threads: that share the work.
        """
        tirx = script()
        unit = source.unit
        across = self.width // unit
        pieces = self.rows * across

        def move(index: Expr) -> None:
            place, piece = index // across, index % across
            row, byte = first_row + place, first_byte + piece * unit
            there = tirx.And(row < source.rows, byte < source.width)
            nearest = source.at(tirx.min(row, source.rows - 1), tirx.min(byte, source.width - unit))
            start = self.place(place, piece * unit // CHUNK) + piece * unit % CHUNK
            if unit == 1:
                code = tirx.if_then_else(there, cast(source.codes[tuple(nearest)], "int8"), literal(0, "int8"))
                tirx.buffer_store(self.storage, code, [start])
            else:
                instructions.copy(self.storage.ptr_to([start]), source.codes.ptr_to(nearest), unit, there)

        with tirx.unroll(pieces // threads) as step:
            move(thread + step * threads)
        if pieces % threads:
            with tirx.If(thread < pieces % threads), tirx.Then():
                move(thread + pieces // threads * threads)
