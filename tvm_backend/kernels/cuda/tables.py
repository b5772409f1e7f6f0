"""Tables of 256 entries, read with a code."""

from __future__ import annotations

from tvm_backend.kernels.shared.arithmetic import lowest, minus
from tvm_backend.kernels.shared.function import Buffer, Expr, local, script


def look_up(table: Buffer, code: Expr, dtype: str) -> Expr:
    """Return the entry of a code, int8 or uint8 as ``dtype`` says; the code is computed once, here."""
    held = local(1, "int32")
    script().buffer_store(held, minus(code, lowest(dtype), "int32"), [0])
    return table[held[0]]
