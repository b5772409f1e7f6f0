"""Reading a table of 256 bytes for a whole vector of 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cpu.arithmetic import literal
from tvm_backend.kernels.cpu.function import Buffer, Expr, script
from tvm_backend.kernels.kernel import Array

#: Codes that one lookup takes.
WIDTH = 64
_PERMUTE = "llvm.x86.avx512.vpermi2var.qi.512"


def by_unsigned_code(table: Array, dtype: str) -> Array:
    """Reorder a table that starts with the lowest code of ``dtype`` by the code's bits as an unsigned number."""
    return np.roll(table, -128) if dtype == "int8" else table


def look_up(table: Buffer, codes: Expr) -> Expr:
    """Return ``table[code]`` of 64 codes; needs AVX512-VBMI.

    Args:
        table: 256 bytes, ordered by :func:`by_unsigned_code`.
        codes: int8x64, the bits of the codes.

    Returns:
        int8x64, the bits of the entries.
    """
    tirx = script()
    parts = [
        tirx.reinterpret(table.vload([start], f"{table.dtype}x64"), dtype="int8x64") for start in range(0, 256, 64)
    ]
    identifier = tirx.llvm_lookup_intrinsic_id(_PERMUTE)
    # Each instruction reads 128 entries by the low seven bits; the sign bit chooses between the two.
    low, high = (tirx.call_llvm_pure_intrin(identifier, parts[i], codes, parts[i + 1], dtype="int8x64") for i in (0, 2))
    return import_tvm("tvm.tirx").Select(codes < literal(0, "int8", WIDTH), high, low)


def join(vectors: Sequence[Expr], lanes: int) -> Expr:
    """Return vectors of one element type, ``lanes`` each, one after the other."""
    if len(vectors) == 1:
        return vectors[0]
    return import_tvm("tvm.tirx").Shuffle(list(vectors), list(range(lanes * len(vectors))))
