"""The words of kernels on a GPU: a parallel loop is a grid of threads, what a thread holds lies in its registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm_backend.imports import import_tvm

Expr = Any

#: Threads of a block where nothing binds them together.
BLOCK = 128


class Threads:
    """TVM's ``script.ir_builder.tirx`` with loops and memory as a GPU has them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_tvm("tvm.script.ir_builder.tirx"), name)

    @contextmanager
    def parallel(self, extent: Expr) -> Iterator[Expr]:
        """Give each index below ``extent`` a thread."""
        blocks = (extent + (BLOCK - 1)) // BLOCK
        with self.launch_thread("blockIdx.x", blocks) as block, self.launch_thread("threadIdx.x", BLOCK) as thread:
            index = block * BLOCK + thread
            with self.If(index < extent), self.Then():
                yield index

    def alloc_buffer(self, shape: Sequence[int], dtype: str, scope: str) -> Any:
        """Declare an array of one thread, which lies in registers where its subscripts are known."""
        assert scope == "global", scope
        return import_tvm("tvm.script.ir_builder.tirx").alloc_buffer(shape, dtype, scope="local")
