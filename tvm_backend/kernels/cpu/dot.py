"""The inner loop of all matrix products, parametrised by what the processor offers.

A register tile is ``rows`` x ``vectors * lanes`` int32 accumulators; each step multiplies ``group`` neighbours
along the reduction. The right operand is int8, packed as ``[column tile][group of K][vectors][lanes][group]``.

The instructions read the left operand as one type of element. Codes of the other sign are shifted by 128
first; the sums then differ by ``128 * sum of the right column``, which whoever packs the right operand
subtracts. Sums wrap around modulo 2^32 and never saturate, so the total is exact even where a partial sum
with shifted codes is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, local, script


@dataclass(frozen=True, slots=True)
class Dot:
    """How a processor adds products of 8-bit codes to int32 sums.

    Args:
        lanes: int32 sums of one vector.
        group: products that one step adds to each of them.
        left: element type of the left operand as the instruction reads it.
        accumulators: vectors of sums that fit the registers beside the operands.
        intrinsic: LLVM's name of the instruction, or of the last one where it takes two.
    """

    lanes: int
    group: int
    left: str
    accumulators: int
    intrinsic: str

    @property
    def _word(self) -> str:
        """Integer as wide as one group of left codes."""
        return f"int{8 * self.group * np.dtype(self.left).itemsize}"

    def shift(self, dtype: str) -> int:
        """Return what is added to left codes of a type before the instruction reads them."""
        return {("int8", "uint8"): 128, ("uint8", "int8"): -128}.get((dtype, self.left), 0)

    def convert(self, codes: Expr, dtype: str, lanes: int = 1) -> Expr:
        """Turn left codes of ``dtype`` into what the instruction reads."""
        if dtype == self.left:
            return codes
        if self.shift(dtype):
            suffix = f"x{lanes}" if lanes > 1 else ""
            flipped = script().bitwise_xor(codes, literal(-128 if dtype == "int8" else 128, dtype, lanes))
            return script().reinterpret(flipped, dtype=f"{self.left}{suffix}")
        return cast(codes, self.left, lanes)

    def word(self, left: Buffer, index: Sequence[Expr]) -> Expr:
        """Load ``group`` neighbouring codes, already converted, and repeat them for each lane.

        Args:
            left: element type :attr:`left`.
            index: of the first code; a multiple of ``group`` along the last axis.
        """
        tirx = script()
        codes = left.vload(list(index), f"{left.dtype}x{self.group}")
        return tirx.broadcast(tirx.reinterpret(codes, dtype=self._word), self.lanes)

    def multiply_add(self, sums: Expr, word: Expr, right: Expr) -> Expr:
        """Add ``group`` products to each lane.

        Args:
            sums: int32 x lanes.
            word: what :meth:`word` returned.
            right: int8 x (lanes * group).
        """
        tirx = script()
        width = self.lanes * self.group
        identifier = tirx.llvm_lookup_intrinsic_id(self.intrinsic)
        dtype = f"int32x{self.lanes}"
        if self.left == "int16":
            codes = tirx.reinterpret(word, dtype=f"int16x{width}")
            return sums + tirx.call_llvm_pure_intrin(identifier, codes, cast(right, "int16", width), dtype=dtype)
        # LLVM takes bytes here, not the int32 lanes of earlier versions.
        codes = tirx.reinterpret(word, dtype=f"int8x{width}")
        if self.group == 2:
            # A product of two int8 fits int16, a sum of two does not: neighbours are widened as they are added.
            products = cast(codes, "int16", width) * cast(right, "int16", width)
            return sums + tirx.call_llvm_pure_intrin(identifier, products, dtype=dtype)
        return tirx.call_llvm_pure_intrin(identifier, sums, codes, right, dtype=dtype)

    def column_sums(self, sums: Expr, right: Expr) -> Expr:
        """Add the codes of each column of ``right`` to its lane."""
        ones = int.from_bytes(np.ones(self.group, self.left).tobytes(), "little")
        return self.multiply_add(sums, literal(ones, self._word, self.lanes), right)


#: Instruction family, as :attr:`tvm_backend.targets.CpuTarget.dot` names it.
DOTS: Mapping[str, Dot] = MappingProxyType(
    {
        "vpdpbusd-512": Dot(16, 4, "uint8", 24, "llvm.x86.avx512.vpdpbusd.512"),
        "vpdpbusd-256": Dot(8, 4, "uint8", 12, "llvm.x86.avx512.vpdpbusd.256"),
        "pmaddwd-512": Dot(16, 2, "int16", 24, "llvm.x86.avx512.pmaddw.d.512"),
        "pmaddwd-256": Dot(8, 2, "int16", 12, "llvm.x86.avx2.pmadd.wd"),
        "pmaddwd-128": Dot(4, 2, "int16", 12, "llvm.x86.sse2.pmadd.wd"),
        "sdot-128": Dot(4, 4, "int8", 24, "llvm.aarch64.neon.sdot.v4i32.v16i8"),
        "smull-128": Dot(4, 2, "int8", 24, "llvm.aarch64.neon.saddlp.v4i32.v8i16"),
    }
)


@dataclass(frozen=True, slots=True)
class Tile:
    """Extents of a register tile.

    Args:
        dot: the instruction.
        rows: rows of the left operand.
        vectors: vectors of the right operand.
    """

    dot: Dot
    rows: int
    vectors: int

    @classmethod
    def choose(cls, columns: int, dot: Dot) -> Tile:
        """Return a tile that fills the registers, of the width that wastes least of the last tile."""
        needed = -(-columns // dot.lanes)
        widest = 4 if dot.accumulators >= 24 else 2
        # A single vector reads the left operand most often, so it is only for results that have no more.
        widths = range(min(widest, needed), min(2, needed) - 1, -1)
        # Ties go to the wider tile: it reads the left operand less often.
        vectors = min(widths, key=lambda width: (-(-needed // width) * width, -width))
        return cls(dot, min(dot.accumulators // vectors, 12), vectors)

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.vectors * self.dot.lanes

    def columns(self, count: int) -> int:
        """Return how many tiles cover ``count`` columns."""
        return -(-count // self.width)

    def groups(self, depth: int) -> int:
        """Return how many groups cover a reduction over ``depth``."""
        return -(-depth // self.dot.group)

    def accumulators(self) -> list[Buffer]:
        """Declare the accumulators, one array a row: all of them together would be too large for the stack."""
        return [local(self.width, "int32") for _ in range(self.rows)]

    def lane(self, vector: int) -> Expr:
        """Return the index of one vector in a row of accumulators."""
        return script().ramp(vector * self.dot.lanes, 1, self.dot.lanes)
