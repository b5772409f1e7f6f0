"""The inner loop of all matrix products: a register tile of int32 accumulators.

A tile is ``rows`` x ``vectors * LANES`` accumulators; each step multiplies ``group`` neighbours along the
reduction. The right operand is packed as ``[column tile][group of K][vectors][LANES][group]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm_backend.kernels.cpu.arithmetic import cast, literal
from tvm_backend.kernels.cpu.function import Buffer, Expr, local, script
from tvm_backend.targets import CpuTarget

LANES = 16
#: Turns int8 codes into uint8 codes that are 128 larger, four at a time.
_SIGN_BITS = 0x80808080 - 2**32
_VPDPBUSD = "llvm.x86.avx512.vpdpbusd.512"


@dataclass(frozen=True, slots=True)
class Tile:
    """Extents of a register tile.

    Args:
        rows: rows of the left operand.
        vectors: vectors of LANES columns of the right operand.
        group: neighbours along the reduction in one step: 4 with the u8 x s8 instruction, else 1.
    """

    rows: int
    vectors: int
    group: int

    @classmethod
    def choose(cls, columns: int, target: CpuTarget, *, dot4: bool) -> Tile:
        """Return a tile that fits the registers and does not exceed the columns."""
        if dot4:
            # 24 accumulators of the 32 registers: enough to hide the latency of the instruction.
            vectors = min(4, -(-columns // LANES))
            return cls(24 // max(vectors, 2), vectors, 4)
        wide = "avx512f" in target.features
        return cls(4 if wide else 2, min(2 if wide else 1, -(-columns // LANES)), 1)

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.vectors * LANES

    def columns(self, count: int) -> int:
        """Return how many tiles cover ``count`` columns."""
        return -(-count // self.width)

    def groups(self, depth: int) -> int:
        """Return how many groups cover a reduction over ``depth``."""
        return -(-depth // self.group)


def accumulators(tile: Tile) -> list[Buffer]:
    """Declare the accumulators, one array a row: all of them together would be too large for the stack."""
    return [local(tile.width, "int32") for _ in range(tile.rows)]


def lane(vector: int) -> Expr:
    """Return the index of one vector in a row of accumulators."""
    return script().ramp(vector * LANES, 1, LANES)


def dot4(accumulator: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Add four products of bytes to each of 16 int32 lanes; wraps, never saturates.

    Args:
        accumulator: int32x16.
        unsigned: int32x16, each four uint8.
        signed: int8x64.
    """
    tirx = script()
    return tirx.call_llvm_pure_intrin(
        tirx.llvm_lookup_intrinsic_id(_VPDPBUSD),
        accumulator,
        # LLVM 22 takes bytes here, not the int32 lanes of earlier versions.
        tirx.reinterpret(unsigned, dtype="int8x64"),
        signed,
        dtype="int32x16",
    )


def load_group(left: Buffer, prefix: list[Expr], start: Expr, count: int, *, signed: bool) -> Expr:
    """Return four codes of a row as one int32 of uint8; int8 codes come out 128 larger.

    Args:
        left: int8 or uint8.
        prefix: index of the row.
        start: first code.
        count: 4, or fewer at the end of a row; the rest then has no meaning beyond being defined.
        signed: whether the codes are int8.
    """
    tirx = script()
    if count == 4:
        word = tirx.reinterpret(left.vload([*prefix, start], f"{left.dtype}x4"), dtype="int32")
    else:
        word = literal(0, "int32")
        for offset in range(count):
            byte = tirx.bitwise_and(cast(left[(*prefix, start + offset)], "int32"), literal(255, "int32"))
            word = tirx.bitwise_or(word, tirx.shift_left(byte, literal(8 * offset, "int32")))
    return tirx.bitwise_xor(word, literal(_SIGN_BITS, "int32")) if signed else word
