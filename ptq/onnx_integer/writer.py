"""The state of writing one program, and the integer arithmetic that ONNX has no operator for.

ONNX shifts unsigned numbers only, and its division truncates. Adding 2^63 modulo 2^64, which is one exclusive or, maps
int64 onto uint64 in order; so

    x >> s = int64((uint64(x) ^ 2^63) >> s) - 2^(63-s)        exact for every int64 x and 1 <= s <= 63
    floor(x / d) = (x - x mod d) / d                          exact for every int64 x, d > 0; mod has the sign of d

Clip, Min, Max and ReduceMax of int64 compare the lower halves as signed numbers in ONNX Runtime up to 1.31 on x86
(its pull request 32475), so that 2^31 is below 0: comparisons and selections take their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from ptq.onnx_export.builder import Array, NodeBuilder
from quantizers.integer.program import IntegerProgram, Node

#: Element types of a program as ONNX numbers them.
ELEMENT_TYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint64": TensorProto.UINT64,
}
_SIGN = 1 << 63


class ProgramWriter:
    """What the writers of the operators share; every tensor has the batch as its first axis.

    Args:
        program: the program; verified, so that no int64 number overflows.
        builder: where nodes go.
        names: ONNX names of the program's inputs, and of values that are outputs.
    """

    def __init__(self, program: IntegerProgram, builder: NodeBuilder, names: Mapping[str, str]) -> None:
        self.program = program
        self.types = program.types()
        self._builder = builder
        self._names = dict(names)
        self._node: Node | None = None
        self._batched = {name for name, _ in program.inputs}

    # Values -----------------------------------------------------------------------------------------

    def value(self, name: str) -> str:
        """Return the ONNX name of a value; a constant is stored with a batch axis of 1."""
        if name in self.program.constants:
            return self.array(self.program.constants[name][None], name)
        return self._names[name]

    def is_batched(self, name: str) -> bool:
        """Return whether a value depends on an input; else it is the same for every sample, with batch extent 1."""
        return name in self._batched

    def constant(self, name: str) -> Array:
        """Return a constant of the program, without a batch axis."""
        return self.program.constants[name]

    def aligned(self, name: str, rank: int) -> str:
        """Return a value whose sample has ``rank`` axes, so that it broadcasts behind the batch axis."""
        shape = self.types[name].shape
        full = (1,) * (rank - len(shape)) + shape
        if name in self.program.constants:
            return self.array(self.program.constants[name].reshape(1, *full), name)
        return self.value(name) if full == shape else self.step("Reshape", self.value(name), self.integers(0, *full))

    def begin(self, node: Node) -> None:
        """Name what follows after a node of the program."""
        self._node = node
        if any(name in self._batched for name in node.inputs):
            self._batched.add(node.name)

    def finish(self, result: str) -> None:
        """Take an ONNX value as the result of the node that was begun."""
        assert self._node is not None
        public = self._names.get(self._node.name)
        if public is not None:
            self._builder.node("Identity", (result,), public, self._node.source)
        self._names[self._node.name] = public or result

    # Nodes ------------------------------------------------------------------------------------------

    def step(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append an ONNX node; return the name of its result."""
        assert self._node is not None
        name = self._builder.fresh(f"{self._node.name}_{kind.lower()}")
        return self._builder.node(kind, inputs, name, self._node.source, **attributes)

    def array(self, array: Array, hint: str) -> str:
        """Store a constant; equal ones under one hint are stored once."""
        return self._builder.initializer(array, hint)

    def integers(self, *numbers: int) -> str:
        """Store extents, axes or indices."""
        return self._builder.integers(numbers)

    def scalar(self, number: int, dtype: str = "int64") -> str:
        """Store a number of a type, int64 where none is given."""
        return self.array(np.array(number, dtype), f"{dtype}_{number}")

    # Arithmetic -------------------------------------------------------------------------------------

    def cast(self, x: str, dtype: str) -> str:
        """Convert; integers wrap, which nothing here relies on but :meth:`shift_right`."""
        return self.step("Cast", x, to=ELEMENT_TYPES[dtype])

    def centred(self, x: str, zero_point: int, dtype: str = "int64") -> str:
        """Convert an integer tensor and subtract a zero point."""
        wide = self.cast(x, dtype)
        return wide if zero_point == 0 else self.step("Sub", wide, self.scalar(zero_point, dtype))

    def shift_right(self, x: str, shift: int | str) -> str:
        """Return ``x >> shift``, arithmetic, of int64.

        Args:
            x: int64.
            shift: 1 to 63, or the name of a uint64 tensor of such numbers.
        """
        amount = self.scalar(shift, "uint64") if isinstance(shift, int) else shift
        sign = self.scalar(_SIGN, "uint64")
        moved = self.step("BitwiseXor", self.cast(x, "uint64"), sign)
        shifted = self.cast(self.step("BitShift", moved, amount, direction="RIGHT"), "int64")
        if isinstance(shift, int):
            return self.step("Sub", shifted, self.scalar(_SIGN >> shift))
        return self.step("Sub", shifted, self.cast(self.step("BitShift", sign, amount, direction="RIGHT"), "int64"))

    def power_of_two(self, exponent: str) -> str:
        """Return ``2^exponent``, int64, of a uint64 tensor of numbers from 0 to 62."""
        return self.cast(self.step("BitShift", self.scalar(1, "uint64"), exponent, direction="LEFT"), "int64")

    def shift_round(self, x: str, shift: int) -> str:
        """Return ``(x + 2^(shift-1)) >> shift`` of int64."""
        return self.shift_right(self.step("Add", x, self.scalar(1 << (shift - 1))), shift)

    def smaller(self, x: str, other: int | str) -> str:
        """Return the smaller of int64 numbers."""
        bound = self.scalar(other) if isinstance(other, int) else other
        return self.step("Where", self.step("Less", x, bound), x, bound)

    def larger(self, x: str, other: int) -> str:
        """Return the larger of int64 numbers."""
        bound = self.scalar(other)
        return self.step("Where", self.step("Less", x, bound), bound, x)

    def floor_divide(self, x: str, divisor: int) -> str:
        """Return ``floor(x / divisor)`` of int64 by a positive number."""
        by = self.scalar(divisor)
        return self.step("Div", self.step("Sub", x, self.step("Mod", x, by)), by)

    def saturate(self, x: str) -> str:
        """Add the zero point of the node that was begun to int64, clip, and convert to the node's element type."""
        node = self._node
        assert node is not None
        zero_point = node.integer("zero_point")
        shifted = x if zero_point == 0 else self.step("Add", x, self.scalar(zero_point))
        clipped = self.smaller(self.larger(shifted, node.integer("qmin")), node.integer("qmax"))
        return self.cast(clipped, node.type.dtype)
