"""Which kernels run a program: a list of steps, before any Relax is written.

Views wait until another operator reads them and become one copy for a whole chain, or none for a
chain of reshapes. A linear whose only reader rescales it by column is one kernel with that reader.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantizers.integer.program import IntegerProgram, Node, TensorType
from tvm_backend.kernels.cpu.emitters import EMITTERS
from tvm_backend.kernels.cpu.linear import emit_linear
from tvm_backend.kernels.cpu.views import SOURCE_INDEX, emit_views
from tvm_backend.kernels.kernel import Kernel, Operand
from tvm_backend.targets import CpuTarget


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Args:
        name: the value that it computes.
        kernel: what to call; its arguments count ``inputs``.
        inputs: names of values, as :attr:`Plan.sources` maps them.
    """

    name: str
    kernel: Kernel = field(repr=False)
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A program as kernel calls.

    Args:
        steps: in execution order.
        values: type and batch of every value that a step or an output reads.
        sources: value to the value that holds its elements, itself unless it is a reshape of another.
    """

    steps: tuple[Step, ...]
    values: Mapping[str, Operand] = field(repr=False)
    sources: Mapping[str, str] = field(repr=False)


def plan(program: IntegerProgram, target: CpuTarget) -> Plan:
    """Choose the kernels of a verified program."""
    return _Planner(program, target).run()


def rescaled_linears(program: IntegerProgram) -> dict[str, Node]:
    """Return the linears, by name, whose one reader is a requantize with one multiplier or one a column."""
    readers: Counter[str] = Counter(name for node in program.nodes for name in node.inputs)
    readers.update(value for _, value in program.outputs)
    linears = {node.name for node in program.nodes if node.op == "linear"}
    return {
        node.inputs[0]: node
        for node in program.nodes
        if node.op == "requantize"
        and node.inputs[0] in linears
        and readers[node.inputs[0]] == 1
        and math.prod(program.constants[node.inputs[1]].shape[:-1]) == 1
    }


class _Planner:
    def __init__(self, program: IntegerProgram, target: CpuTarget) -> None:
        self._program, self._target = program, target
        self._values = {name: Operand(kind) for name, kind in program.inputs}
        for name, array in program.constants.items():
            kind = TensorType(array.dtype.name, tuple(array.shape))
            self._values[name] = Operand(kind, array, batched=False)
        self._sources = {name: name for name in self._values}
        self._chains: dict[str, tuple[str, tuple[Node, ...]]] = {}
        self._steps: list[Step] = []

    def run(self) -> Plan:
        rescaled = rescaled_linears(self._program)
        producers = {node.name: node for node in self._program.nodes if node.name in rescaled}
        for node in self._program.nodes:
            operands = tuple(self._values[name] for name in node.inputs)
            self._values[node.name] = Operand(node.type)
            if node.name in rescaled:
                continue
            if node.op in SOURCE_INDEX:
                base, chain = self._chains.get(node.inputs[0], (node.inputs[0], ()))
                self._chains[node.name] = (base, (*chain, node))
            elif node.op == "requantize" and node.inputs[0] in producers:
                linear = producers[node.inputs[0]]
                inputs = tuple(self._values[name] for name in linear.inputs)
                multiplier = operands[1].constant()
                self._add(node.name, emit_linear(linear, inputs, self._target, (node, multiplier)), linear.inputs)
            else:
                self._add(node.name, EMITTERS[node.op](node, operands, self._target), node.inputs)
        for _, value in self._program.outputs:
            self._materialize(value)
        return Plan(tuple(self._steps), self._values, self._sources)

    def _add(self, name: str, kernel: Kernel, inputs: tuple[str, ...]) -> None:
        for value in inputs:
            self._materialize(value)
        self._sources[name] = name
        self._steps.append(Step(name, kernel, inputs))

    def _materialize(self, name: str) -> None:
        """Give the end of a chain of views its elements, if it has none yet."""
        if name in self._sources:
            return
        base, chain = self._chains[name]
        self._materialize(base)
        if all(node.op == "reshape" for node in chain):
            self._sources[name] = self._sources[base]
            return
        self._add(name, emit_views(chain, self._values[base]), (base,))
