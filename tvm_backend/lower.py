"""IntegerProgram to a Relax module: one function that calls the planned TIR kernels with a dynamic batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantizers.integer.program import IntegerProgram
from quantizers.integer.verify import verify
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.kernel import Argument, Array, Layout, Operand
from tvm_backend.plan import Plan, Step, plan
from tvm_backend.targets import CpuTarget

#: Name of the function in the module: takes the inputs, then a tuple of all constants; returns a tuple.
ENTRY = "main"


@dataclass(frozen=True)
class Lowered:
    """A module and the arrays that its constants stand for.

    Args:
        module: ``tvm.IRModule`` with the function :data:`ENTRY`.
        constants: the last argument of the entry, in order.
    """

    module: Any
    constants: tuple[Array, ...] = field(repr=False)


def lower(program: IntegerProgram, target: CpuTarget) -> Lowered:
    """Write a program as a Relax module.

    Args:
        program: verified again here: the kernels rely on what the verifier proves.
        target: decides how some kernels are written.

    Raises:
        ProgramError: the program breaks a rule of the contract.
    """
    verify(program)
    return _Writer(program, plan(program, target)).run()


class _ConstantPool:
    """Constants in order of first use; equal arrays are one."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._index: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def add(self, array: Array) -> int:
        """Return the position of an array."""
        key = (array.dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._index:
            self._index[key] = len(self.arrays)
            self.arrays.append(np.ascontiguousarray(array))
        return self._index[key]


class _Writer:
    def __init__(self, program: IntegerProgram, planned: Plan) -> None:
        self._program, self._plan = program, planned
        self._relax = import_tvm("tvm.relax")
        self._builder = self._relax.BlockBuilder()
        self._batch = import_tvm("tvm.tirx").Var("n", "int64")
        self._pool = _ConstantPool()
        self._parameters: Any = None
        self._constants: dict[int, Any] = {}
        self._variables: dict[tuple[str, Layout], Any] = {}
        self._holders: dict[str, Any] = {}

    def run(self) -> Lowered:
        relax, program = self._relax, self._program
        # The tuple of constants is an argument, so all of them are known before the body is written.
        prepared = [
            [None if isinstance(a, Argument) else self._pool.add(a) for a in step.kernel.arguments]
            for step in self._plan.steps
        ]
        values = {self._plan.sources[name] for step in self._plan.steps for name in step.inputs}
        values |= {self._plan.sources[value] for _, value in program.outputs}
        standing = {name: self._pool.add(array[None]) for name, array in program.constants.items() if name in values}
        inputs = [
            relax.Var(name, self._type(Operand(kind), Layout.natural(kind.shape))) for name, kind in program.inputs
        ]
        types = [relax.TensorType(array.shape, array.dtype.name) for array in self._pool.arrays]
        self._parameters = relax.Var("constants", relax.TupleType(types))
        with self._builder.function(ENTRY, [*inputs, self._parameters]):
            with self._builder.dataflow():
                for (name, kind), variable in zip(program.inputs, inputs, strict=True):
                    self._define(name, Layout.natural(kind.shape), variable)
                for name, index in standing.items():
                    self._define(name, Layout.natural(self._shape(name)), self._constant(index))
                for step, indices in zip(self._plan.steps, prepared, strict=True):
                    self._call(step, indices)
                results = [self._read(value, Layout.natural(self._shape(value))) for _, value in program.outputs]
                output = self._builder.emit_output(relax.Tuple(results))
            self._builder.emit_func_output(output)
        return Lowered(self._builder.get(), tuple(self._pool.arrays))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._plan.values[name].type.shape

    def _extents(self, operand: Operand, layout: Layout) -> tuple[Any, ...]:
        return (self._batch * layout.rows if operand.batched else layout.rows, *layout.tail)

    def _type(self, operand: Operand, layout: Layout) -> Any:
        return self._relax.TensorType(self._extents(operand, layout), operand.type.dtype)

    def _constant(self, index: int) -> Any:
        if index not in self._constants:
            self._constants[index] = self._builder.emit(self._relax.TupleGetItem(self._parameters, index))
        return self._constants[index]

    def _read(self, name: str, layout: Layout) -> Any:
        """Return a value in a layout; another layout of the same elements is a view without a copy."""
        source = self._plan.sources[name]
        if (source, layout) not in self._variables:
            variable = self._holders[source]
            extents = self._extents(self._plan.values[source], layout)
            reshaped = self._relax.op.reshape(variable, self._relax.ShapeExpr(extents))
            self._variables[source, layout] = self._builder.emit(reshaped)
        return self._variables[source, layout]

    def _call(self, step: Step, indices: Sequence[int | None]) -> None:
        arguments = []
        for argument, index in zip(step.kernel.arguments, indices, strict=True):
            if isinstance(argument, Argument):
                arguments.append(self._read(step.inputs[argument.index], argument.layout))
            else:
                assert index is not None
                arguments.append(self._constant(index))
        function = self._builder.add_func(step.kernel.function, "kernel")
        result = self._type(self._plan.values[step.name], step.kernel.layout)
        variable = self._builder.emit(self._relax.call_tir(function, arguments, result))
        self._define(step.name, step.kernel.layout, variable)

    def _define(self, name: str, layout: Layout, variable: Any) -> None:
        self._holders[name] = variable
        self._variables[name, layout] = variable
