"""The words of kernels on a GPU: a warp for each row, a thread for each index, and what a thread holds in registers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm_backend.imports import import_tvm

Expr = Any

#: Threads of a block where nothing binds them together.
BLOCK = 128
WARP, _ALL_LANES = 32, 0xFFFFFFFF


class Threads:
    """TVM's ``script.ir_builder.tirx`` with loops and memory as a GPU has them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_tvm("tvm.script.ir_builder.tirx"), name)

    def prim_func(self, **_: object) -> Any:
        """Open a function that is written down to its threads."""
        return import_tvm("tvm.script.ir_builder.tirx").prim_func()

    @contextmanager
    def parallel(self, extent: Expr) -> Iterator[Expr]:
        """Give each index below ``extent`` a thread."""
        self.device_entry()
        block = self.cta_id([self.Cast("int32", (extent + (BLOCK - 1)) // BLOCK)])
        index = self.Cast("int64", block) * BLOCK + self.Cast("int64", self.thread_id([BLOCK]))
        with self.If(index < extent), self.Then():
            yield index

    @contextmanager
    def rows(self, extent: Expr) -> Iterator[WarpRow]:
        """Give each index below ``extent`` a warp."""
        self.device_entry()
        block = self.cta_id([self.Cast("int32", (extent + (BLOCK // WARP - 1)) // (BLOCK // WARP))])
        thread = self.thread_id([BLOCK])
        index = self.Cast("int64", block) * (BLOCK // WARP) + self.Cast("int64", thread // WARP)
        with self.If(index < extent), self.Then():
            yield WarpRow(self, index, thread % WARP)

    def alloc_buffer(self, shape: Sequence[int], dtype: str, scope: str, align: int = -1) -> Any:
        """Declare an array: what a CPU has on its stack lies in a thread's registers where its subscripts are known."""
        chosen = "local" if scope == "global" else scope
        return import_tvm("tvm.script.ir_builder.tirx").alloc_buffer(shape, dtype, scope=chosen, align=align)


class WarpRow:
    """A row whose elements lie side by side in the lanes of a warp.

    Args:
        words: of the kernel.
        index: of the row.
        lane: number of the lane, int32.
    """

    def __init__(self, words: Threads, index: Expr, lane: Expr) -> None:
        self._words, self.index, self._lane = words, index, lane

    @contextmanager
    def columns(self, *extents: int) -> Iterator[tuple[Expr, ...]]:
        """Go through the elements of a row with some axes, neighbours in neighbouring lanes."""
        words, count = self._words, math.prod(extents)
        with words.serial(-(-count // WARP)) as step:
            place = step * WARP + self._lane
            if count % WARP:
                with words.If(place < count), words.Then():
                    yield _split(place, extents)
            else:
                yield _split(place, extents)

    def add_up(self, cell: Any) -> None:
        """Replace what each lane holds in an array of one element by the sum over the warp."""
        self._over_lanes(cell, lambda a, b: a + b)

    def find_largest(self, cell: Any) -> None:
        """Replace it by the largest."""
        self._over_lanes(cell, self._words.max)

    def unite(self, cell: Any) -> None:
        """Replace it by the bitwise or."""
        self._over_lanes(cell, self._words.bitwise_or)

    def _over_lanes(self, cell: Any, combine: Callable[[Expr, Expr], Expr]) -> None:
        over_lanes(cell, 0, (16, 8, 4, 2, 1), combine)


def over_lanes(values: Any, index: int, distances: Sequence[int], combine: Callable[[Expr, Expr], Expr]) -> None:
    """Combine what lanes of a warp hold in an element of an array, with one lane after the other that differs in a bit.

    Args:
        values: in each lane.
        index: of the element.
        distances: powers of two; lanes whose numbers differ in these bits only end with the same.
        combine: two elements to one.
    """
    words = import_tvm("tvm.script.ir_builder.tirx")
    for distance in distances:
        other = words.tvm_warp_shuffle_xor(words.uint32(_ALL_LANES), values[index], distance, WARP, WARP)
        words.buffer_store(values, combine(values[index], other), [index])


def _split(place: Expr, extents: Sequence[int]) -> tuple[Expr, ...]:
    found: list[Expr] = []
    for number, extent in enumerate(reversed(extents)):
        found.insert(0, place if number == len(extents) - 1 else place % extent)
        place = place // extent
    return tuple(found)
