"""Kernels that go through rows: on a CPU each row is one thread's, on a GPU the lanes of a warp share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from tvm_backend.kernels.shared.function import Buffer, Expr, other_words, script


class Row(Protocol):
    """A row while its kernel is written."""

    index: Expr

    @contextmanager
    def columns(self, *extents: int) -> Iterator[tuple[Expr, ...]]:
        """Go through the elements of a row with some axes; those who share it take different ones."""
        ...

    def add_up(self, cell: Buffer) -> None:
        """Replace what each holds in an array of one element by the sum."""

    def find_largest(self, cell: Buffer) -> None:
        """Replace what each holds by the largest."""

    def unite(self, cell: Buffer) -> None:
        """Replace what each holds by the bitwise or."""


class _OwnRow:
    """A row that one thread goes through alone."""

    def __init__(self, index: Expr) -> None:
        self.index = index

    @contextmanager
    def columns(self, *extents: int) -> Iterator[tuple[Expr, ...]]:
        with ExitStack() as loops:
            yield tuple(loops.enter_context(script().serial(extent)) for extent in extents)

    def add_up(self, _cell: Buffer) -> None:
        """It is the sum."""

    find_largest = unite = add_up


@contextmanager
def each_row(extent: Expr) -> Iterator[Row]:
    """Go through rows, all at once as far as there are threads."""
    words = other_words()
    if words is None:
        with script().parallel(extent) as index:
            yield _OwnRow(index)
    else:
        with words.rows(extent) as row:
            yield row
