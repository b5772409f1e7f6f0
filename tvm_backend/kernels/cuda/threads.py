"""The words of kernels on a GPU: a parallel loop is a grid of threads, what a thread holds lies in its registers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm_backend.imports import import_tvm

Expr = Any

#: Threads of a block where nothing binds them together.
BLOCK = 128
WARP, ALL_LANES = 32, 0xFFFFFFFF


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
    def warps(self, extent: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Give each index below ``extent`` a warp; yields the index and the number of the lane, int32."""
        self.device_entry()
        block = self.cta_id([self.Cast("int32", (extent + (BLOCK // WARP - 1)) // (BLOCK // WARP))])
        thread = self.thread_id([BLOCK])
        index = self.Cast("int64", block) * (BLOCK // WARP) + self.Cast("int64", thread // WARP)
        with self.If(index < extent), self.Then():
            yield index, thread % WARP

    def add_lanes(self, value: Any) -> None:
        """Replace what each lane holds in an array of one element by the sum over the warp."""
        step = WARP // 2
        while step:
            other = self.tvm_warp_shuffle_xor(self.uint32(ALL_LANES), value[0], step, WARP, WARP)
            self.buffer_store(value, value[0] + other, [0])
            step //= 2

    def alloc_buffer(self, shape: Sequence[int], dtype: str, scope: str) -> Any:
        """Declare an array: what a CPU has on its stack lies in a thread's registers where its subscripts are known."""
        chosen = "local" if scope == "global" else scope
        return import_tvm("tvm.script.ir_builder.tirx").alloc_buffer(shape, dtype, scope=chosen)
