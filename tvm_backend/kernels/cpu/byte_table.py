"""Reading a table of 256 bytes for a whole vector of 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_backend.imports import import_tvm
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, script
from tvm_backend.targets import CpuTarget

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


class TableStore:
    """A table inside a kernel: codes are replaced by its entries on their way to memory."""

    def __init__(self, table: Array, code_dtype: str, function: Function, target: CpuTarget) -> None:
        """Declare the table as an argument.

        Args:
            table: 256 entries of int8 or uint8.
            code_dtype: type of the codes.
            function: the kernel, open.
            target: decides how the table is read.
        """
        self._code_dtype, self._dtype, self._wide = code_dtype, table.dtype.name, target.byte_tables
        self._table = function.constant(by_unsigned_code(table, code_dtype))

    def store(self, result: Buffer, start: Sequence[Expr], vectors: Sequence[Expr], lanes: int, columns: Expr) -> None:
        """Store the entries of a row of codes.

        Args:
            result: of the table's type; elements of a row follow each other along its last axis.
            start: where the first entry goes.
            vectors: of codes, ``lanes`` each.
            lanes: of a vector.
            columns: how many codes exist, at least one of the last vector.
        """
        tirx = script()
        width = len(vectors) * lanes
        if self._wide and width <= WIDTH:
            # Fewer codes than a lookup takes are repeated.
            padding = [vectors[-1]] * (WIDTH // lanes - len(vectors))
            codes = tirx.reinterpret(join([*vectors, *padding], lanes), dtype=f"int8x{WIDTH}")
            entries = tirx.reinterpret(look_up(self._table, codes), dtype=f"{self._dtype}x{WIDTH}")
            if isinstance(columns, int) and columns == WIDTH:
                tirx.buffer_store(result, entries, [*start[:-1], tirx.ramp(start[-1], 1, WIDTH)])
                return
            store_part(result, start, entries, WIDTH, columns)
            return
        codes = local(width, "uint8")
        joined = join(vectors, lanes)
        unsigned = joined if self._code_dtype == "uint8" else tirx.reinterpret(joined, dtype=f"uint8x{width}")
        tirx.buffer_store(codes, unsigned, [tirx.ramp(0, 1, width)])
        with tirx.serial(columns) as j:
            tirx.buffer_store(result, self._table[cast(codes[j], "int32")], [*start[:-1], start[-1] + j])


def store_part(result: Buffer, start: Sequence[Expr], values: Expr, width: int, columns: Expr) -> None:
    """Store the first ``columns`` of ``width`` values where the others have no place.

    Args:
        result: elements of a row follow each other along its last axis.
        start: where the first value goes.
        values: one vector.
        width: of the vector.
        columns: how many values to store.
    """
    tirx = script()
    part = local(width, result.dtype)
    tirx.buffer_store(part, values, [tirx.ramp(0, 1, width)])
    with tirx.serial(columns) as j:
        tirx.buffer_store(result, part[j], [*start[:-1], start[-1] + j])
