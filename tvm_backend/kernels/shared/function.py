"""A thin frame around TVM's IRBuilder: arguments with a dynamic leading extent, and whole-row loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.kernel import Argument, Array, Kernel, Layout, Operand
from tvm_backend.schedule import ALIGNMENT

Expr = Any
Buffer = Any


#: Words that replace TVM's while kernels are written, None for no other.
_WORDS: ContextVar[Any] = ContextVar("words", default=None)


def script() -> Any:
    """Return TVM's ``script.ir_builder.tirx``, the vocabulary in which kernels are written, or what replaces it."""
    return other_words() or import_tvm("tvm.script.ir_builder.tirx")


def other_words() -> Any:
    """Return what replaces TVM's words just now, or None."""
    return _WORDS.get()


@contextmanager
def vocabulary(words: Any) -> Iterator[None]:
    """Write kernels with other words of the same names: on a GPU, for one, a parallel loop is a grid of threads."""
    token = _WORDS.set(words)
    try:
        yield
    finally:
        _WORDS.reset(token)


def local(length: int, dtype: str) -> Buffer:
    """Declare a small array on the stack, whose elements LLVM may keep in registers.

    Of all scopes TVM keeps only small arrays of scope "global" on the stack; even one element of scope
    "local" comes from a heap, with a call each time.

    Args:
        length: elements, below 1024 bytes of them.
        dtype: element type.
    """
    return script().alloc_buffer((length,), dtype, scope="global")


def once(value: Expr) -> Expr:
    """Return a value that is computed once, here.

    A kernel without it computes the same, but TVM writes an expression out in every subscript that it occurs in, bound
    to a variable or not, and then spends most of a build on simplifying subscripts.

    Args:
        value: an int64 expression, such as a row that many subscripts name.
    """
    cell = local(1, "int64")
    script().buffer_store(cell, value, [0])
    return cell[0]


def prefetch_line(address: Expr) -> None:
    """Emit a request for a cache line that will be read soon; any address is allowed."""
    tirx = script()
    # LLVM's numbers: to read, into the nearest cache, data.
    read, nearest, data = (import_tvm("tvm.tirx").const(value, "int32") for value in (0, 3, 1))
    identifier = tirx.llvm_lookup_intrinsic_id("llvm.prefetch")
    tirx.evaluate(tirx.call_llvm_intrin(identifier, address, read, nearest, data, dtype="void"))


class Function:
    """Collects the arguments of one kernel while its body is written.

    Args:
        node: names the kernel and gives the element type of the result.
        operands: operands of the node.
        layout: layout of the result.
        dtype: element type of the result, if not the node's.
    """

    def __init__(self, node: Node, operands: Sequence[Operand], layout: Layout, dtype: str | None = None) -> None:
        self._operands = operands
        self._layout = layout
        self._arguments: list[Argument | Array] = []
        self._dtype = dtype or node.type.dtype
        self._name = node.op
        self._function: Any = None
        self._flags: Layout | None = None
        #: Leading extent of the result: ``batch * layout.rows``.
        self.rows: Expr = self._extent("m")

    def _extent(self, name: str) -> Expr:
        return import_tvm("tvm.tirx").Var(name, "int64")

    def value(self, index: int, layout: Layout) -> Buffer:
        """Declare operand ``index`` as an argument of shape ``(batch * layout.rows, *layout.tail)``."""
        operand = self._operands[index]
        if not operand.batched:
            rows = layout.rows
        elif layout.rows == self._layout.rows:
            rows = self.rows
        else:
            rows = self._extent(f"m{index}")
        self._arguments.append(Argument(index, layout))
        # Images come from the caller, who knows nothing of cache lines.
        alignment = 4 if operand.type.dtype == "float32" else ALIGNMENT
        return self._argument((rows, *layout.tail), operand.type.dtype, alignment)

    def constant(self, array: Array) -> Buffer:
        """Declare a prepared constant as an argument."""
        contiguous = np.ascontiguousarray(array)
        self._arguments.append(contiguous)
        return self._argument(contiguous.shape, contiguous.dtype.name)

    def _argument(self, shape: Sequence[Expr], dtype: str, alignment: int = ALIGNMENT) -> Buffer:
        buffer = script().Buffer(tuple(shape), dtype, align=alignment)
        return script().arg(f"a{len(self._arguments)}", buffer)

    def flags(self) -> Buffer:
        """Declare an int32 for each row, in which the kernel says what it refuses; just before the result."""
        self._flags = Layout(self._layout.rows, ())
        return script().arg("flags", script().Buffer((self.rows,), "int32", align=ALIGNMENT))

    def result(self) -> Buffer:
        """Declare the result, after all other arguments."""
        return script().arg("result", script().Buffer((self.rows, *self._layout.tail), self._dtype))

    @contextmanager
    def body(self) -> Iterator[None]:
        """Open the function; arguments and statements belong inside."""
        tirx = script()
        with import_tvm("tvm.script.ir_builder").IRBuilder() as builder:
            with tirx.prim_func(s_tir=True):
                tirx.func_name(self._name)
                # Values of an SSA program never share memory with a result.
                tirx.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
                yield
            self._function = builder.get()

    def kernel(self) -> Kernel:
        """Return the finished kernel."""
        return Kernel(self._function, tuple(self._arguments), self._layout, self._flags)
