"""Neighbouring elements of a thread, read and written at once where they lie on whole words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tvm_backend.kernels.cuda.instructions import load_words, store_words
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, script

_WIDEST = 16


class Run:
    """``count`` neighbours in the last axis of an array.

    Args:
        buffer: the array.
        count: elements, a power of two.
        aligned: whether all runs begin at multiples of their own size.
    """

    def __init__(self, buffer: Buffer, count: int, *, aligned: bool) -> None:
        self._buffer, self._count = buffer, count
        self._dtype = str(buffer.dtype)
        self._size = np.dtype(self._dtype).itemsize
        self._whole = aligned and self._size <= 4 and count * self._size % 4 == 0

    def load(self, start: Sequence[Expr], limit: Expr | None = None) -> list[Expr]:
        """Return the elements from a place on; in a run that is not aligned, the last one below ``limit`` repeats."""
        tirx = script()
        *lead, first = start
        if not self._whole:
            places = [first + i if limit is None else tirx.min(first + i, limit - 1) for i in range(self._count)]
            return [self._buffer[(*lead, place)] for place in places]
        each, found = 4 // self._size, []
        for offset, count in self._pieces():
            loaded = load_words(self._buffer.ptr_to([*lead, first + offset * each]), count, "global")
            for word in loaded:
                for i in range(each):
                    bits = tirx.shift_right(word, literal(8 * self._size * i, "uint32"))
                    found.append(cast(bits, self._dtype))
        return found

    def store(self, start: Sequence[Expr], values: Sequence[Expr], limit: Expr | None = None) -> None:
        """Write the elements; of a run that is not aligned, those below ``limit`` only."""
        tirx = script()
        *lead, first = start
        if not self._whole:
            for i, value in enumerate(values):
                if limit is None:
                    tirx.buffer_store(self._buffer, value, [*lead, first + i])
                else:
                    with tirx.If(first + i < limit), tirx.Then():
                        tirx.buffer_store(self._buffer, value, [*lead, first + i])
            return
        each = 4 // self._size
        unsigned = f"uint{8 * self._size}"
        for offset, count in self._pieces():
            packed = []
            for number in range(offset, offset + count):
                word = None
                for i in range(each):
                    bits = cast(cast(values[number * each + i], unsigned), "uint32")
                    part = tirx.shift_left(bits, literal(8 * self._size * i, "uint32")) if i else bits
                    word = part if word is None else tirx.bitwise_or(word, part)
                packed.append(word)
            store_words(self._buffer.ptr_to([*lead, first + offset * each]), packed, "global")

    def _pieces(self) -> list[tuple[int, int]]:
        """Split the run into (first word, words) of one instruction each."""
        total = self._count * self._size // 4
        widest = min(total, _WIDEST // 4)
        return [(start, widest) for start in range(0, total, widest)]
