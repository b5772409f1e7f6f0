"""Rows of a left operand as the dot-product instruction reads them: where they lie, or converted in a small copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm_backend.kernels.cpu.dot import Dot
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Buffer, Expr, script

_VECTOR = 32
#: Row and position along the reduction to the index of a code.
Index = Callable[[Expr, Expr], list[Expr]]


class Panel:
    """The rows of one register tile; declared once a task, filled for each tile.

    Args:
        dot: the instruction.
        codes: the left operand.
        index: where a code lies; neighbours along the reduction are neighbours in memory.
        dtype: element type of the operand.
        depth: length of the reduction.
        rows: rows of a tile.
    """

    def __init__(self, dot: Dot, codes: Buffer, index: Index, dtype: str, depth: int, rows: int) -> None:
        self._dot, self._codes, self._index, self._dtype, self._depth = dot, codes, index, dtype, depth
        self._padded = -(-depth // dot.group) * dot.group
        self._copy: Buffer | None = None
        if dtype != dot.left or depth != self._padded:
            self._copy = script().alloc_buffer((rows, self._padded), dot.left, scope="global")

    def fill(self, rows: Sequence[Expr]) -> Callable[[int, Expr], Expr]:
        """Emit the conversion; the function that is returned loads the word of a row and group."""
        tirx, dot, copy, depth = script(), self._dot, self._copy, self._depth
        if copy is None:
            return lambda i, group: dot.word(self._codes, self._index(rows[i], group * dot.group))
        for i, row in enumerate(rows):
            whole = depth // _VECTOR
            if whole:
                with tirx.serial(whole) as block:
                    vector = self._codes.vload(self._index(row, block * _VECTOR), f"{self._dtype}x{_VECTOR}")
                    converted = dot.convert(vector, self._dtype, _VECTOR)
                    tirx.buffer_store(copy, converted, [i, tirx.ramp(block * _VECTOR, 1, _VECTOR)])
            for k in range(whole * _VECTOR, depth):
                code = self._codes[tuple(self._index(row, k))]
                tirx.buffer_store(copy, dot.convert(code, self._dtype), [i, k])
            for k in range(depth, self._padded):
                tirx.buffer_store(copy, literal(0, dot.left), [i, k])
        return lambda i, group: dot.word(copy, [i, group * dot.group])
