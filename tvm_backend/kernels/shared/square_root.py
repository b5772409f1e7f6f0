"""The exact integer square root, and the numbers that it is computed in."""

from __future__ import annotations

from collections.abc import Sequence

from tvm_backend.imports import import_tvm
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, local, script

#: Steps after which Newton's iteration from 2^31 is within one of the root, for values in [2^60, 2^62).
#: The error after a step is at most its square over twice the root: 2^30, 2^28, 2^25, 2^19, 2^7, below 1.
_NEWTON_STEPS = 5


def variable(value: Expr, dtype: str = "int64") -> Buffer:
    """Hold a number in a local variable, which later statements may update."""
    buffer = local(1, dtype)
    script().buffer_store(buffer, value, [0])
    return buffer


def divide(value: Expr, divisor: Expr) -> Expr:
    """Quotient of positive numbers, where truncation is the floor."""
    return import_tvm("tvm.tirx").truncdiv(value, divisor)


def floor_sqrt(values: Sequence[Expr]) -> list[Buffer]:
    """Emit ``floor(sqrt(value))`` of int64 values in [2^60, 2^62), step by step for all of them."""
    tirx = script()
    roots = [variable(literal(1 << 31, "int64")) for _ in values]
    for _ in range(_NEWTON_STEPS):
        for value, root in zip(values, roots, strict=True):
            # Never below the floor of the root, because an arithmetic mean is never below the geometric one.
            mean = tirx.shift_right(root[0] + divide(value, root[0]), literal(1, "int64"))
            tirx.buffer_store(root, mean, [0])
    for value, root in zip(values, roots, strict=True):
        tirx.buffer_store(root, root[0] - cast(root[0] * root[0] > value, "int64"), [0])
    return roots
