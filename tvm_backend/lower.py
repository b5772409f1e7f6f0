"""IntegerProgram to a module of TIR functions and the schedule that calls them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantizers.integer.program import IntegerProgram
from quantizers.integer.verify import verify
from tvm_backend import schedule
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cpu.dot import DOTS
from tvm_backend.kernels.kernel import Argument, Array, Layout
from tvm_backend.plan import Plan, Step, plan
from tvm_backend.schedule import ARENA, CONSTANT, INPUT, Call, Lifetime, Schedule
from tvm_backend.targets import CpuTarget, Target
from tvm_backend.unsigned import unsigned_activations


@dataclass(frozen=True)
class Lowered:
    """A module and how to run it.

    Args:
        module: ``tvm.IRModule`` of TIR functions.
        schedule: the calls.
        constants: arrays that the calls take.
    """

    module: Any
    schedule: Schedule
    constants: tuple[Array, ...] = field(repr=False)


def lower(program: IntegerProgram, target: Target) -> Lowered:
    """Write a program as functions and calls.

    Args:
        program: verified again here: the kernels rely on what the verifier proves.
        target: decides how some kernels are written.

    Raises:
        ProgramError: the program breaks a rule of the contract.
    """
    bounds = verify(program)
    if isinstance(target, CpuTarget) and DOTS[target.dot].left == "uint8":
        program = unsigned_activations(program)
        bounds = verify(program)
    return _Writer(program, plan(program, target, bounds)).run()


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


class _Functions:
    """TIR functions by symbol; equal functions, as equal layers have them, are one."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}
        self._symbols: dict[int, list[str]] = {}
        self._ffi = import_tvm("tvm_ffi")

    def add(self, name: str, function: Any) -> str:
        """Return the symbol of a function."""
        known = self._symbols.setdefault(self._ffi.structural_hash(function), [])
        for symbol in known:
            if self._ffi.structural_equal(self.functions[symbol], function):
                return symbol
        symbol = f"{name}_{len(self.functions)}"
        self.functions[symbol] = function
        known.append(symbol)
        return symbol

    def module(self) -> Any:
        """Return the functions as an ``IRModule``, each exported under its symbol."""
        named = {symbol: f.with_attr("global_symbol", symbol) for symbol, f in self.functions.items()}
        return import_tvm().IRModule(named)


class _Writer:
    def __init__(self, program: IntegerProgram, planned: Plan) -> None:
        self._program, self._plan = program, planned
        self._pool, self._functions = _ConstantPool(), _Functions()
        self._inputs = {name: index for index, (name, _) in enumerate(program.inputs)}
        self._positions: dict[str, int] = {}

    def run(self) -> Lowered:
        steps = self._plan.steps
        outputs = [self._plan.sources[value] for _, value in self._program.outputs]
        last = {step.name: number for number, step in enumerate(steps)}
        for number, step in enumerate(steps):
            for argument in step.kernel.arguments:
                if isinstance(argument, Argument):
                    last[self._plan.sources[step.inputs[argument.index]]] = number
        last.update(dict.fromkeys(outputs, len(steps)))
        lifetimes = {
            step.name: Lifetime(self._bytes(step), number, last[step.name]) for number, step in enumerate(steps)
        }
        for number, step in enumerate(steps):
            if step.kernel.flags is not None:
                lifetimes[_flags(step)] = Lifetime(4 * step.kernel.flags.rows, number, len(steps))
        self._positions, total = schedule.allocate(lifetimes)
        calls = tuple(self._call(step) for step in steps)
        results = tuple(self._argument(value, Layout.natural(self._shape(value))) for _, value in self._program.outputs)
        checks = tuple(
            (self._inputs[step.inputs[0]], flags) for step in steps if (flags := self._flags_argument(step)) is not None
        )
        return Lowered(self._functions.module(), Schedule(calls, results, checks, total), tuple(self._pool.arrays))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._plan.values[name].type.shape

    def _bytes(self, step: Step) -> int:
        layout = step.kernel.layout
        return layout.rows * math.prod(layout.tail) * np.dtype(self._plan.values[step.name].type.dtype).itemsize

    def _call(self, step: Step) -> Call:
        arguments: Sequence[schedule.Argument] = [
            self._argument(step.inputs[argument.index], argument.layout)
            if isinstance(argument, Argument)
            else self._constant(argument)
            for argument in step.kernel.arguments
        ]
        result = self._argument(step.name, step.kernel.layout)
        name = step.operators.split("+", maxsplit=1)[0]
        symbol = self._functions.add(name, step.kernel.function)
        flags = self._flags_argument(step)
        written = (result,) if flags is None else (flags, result)
        return Call(symbol, step.name, step.operators, step.macs, (*arguments, *written))

    def _flags_argument(self, step: Step) -> schedule.Argument | None:
        if step.kernel.flags is None:
            return None
        return schedule.Argument(ARENA, self._positions[_flags(step)], "int32", step.kernel.flags.rows, ())

    def _constant(self, array: Array) -> schedule.Argument:
        rows, *tail = array.shape
        return schedule.Argument(CONSTANT, self._pool.add(array), array.dtype.name, rows, tuple(tail))

    def _argument(self, name: str, layout: Layout) -> schedule.Argument:
        source = self._plan.sources[name]
        operand = self._plan.values[name]
        if source in self._program.constants:
            array = self._program.constants[source]
            position = self._pool.add(array.reshape(layout.rows, *layout.tail))
            return schedule.Argument(CONSTANT, position, operand.type.dtype, layout.rows, layout.tail)
        if source in self._inputs:
            return schedule.Argument(INPUT, self._inputs[source], operand.type.dtype, layout.rows, layout.tail)
        return schedule.Argument(ARENA, self._positions[source], operand.type.dtype, layout.rows, layout.tail)


def _flags(step: Step) -> str:
    # No value of a program has this name: its step's is taken.
    return f"{step.name} flags"
