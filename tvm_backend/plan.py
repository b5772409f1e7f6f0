"""Which kernels run a program: a list of steps, before any code is generated.

Groups of operators that :mod:`tvm_backend.patterns` finds are one kernel each. Views wait until another operator
reads them and become one copy for a whole chain, or none for a chain of reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantizers.integer.bounds import Interval
from quantizers.integer.program import IntegerProgram, Node, TensorType
from tvm_backend.kernels.kernel import Argument, Kernel, Operand
from tvm_backend.kernels.sets import kernel_set
from tvm_backend.kernels.shared.function import vocabulary
from tvm_backend.kernels.shared.views import emit_views
from tvm_backend.patterns import FusedAttention, FusedLinear, Patterns
from tvm_backend.strides import VIEWS
from tvm_backend.targets import Target


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Args:
        name: the value that it computes.
        operators: what it stands for, for people: operators joined by ``+``.
        macs: multiplications and additions of 8-bit codes for one sample.
        kernel: what to call; its arguments count ``inputs``.
        inputs: names of values, as :attr:`Plan.sources` maps them.
    """

    name: str
    operators: str
    macs: int
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


def plan(program: IntegerProgram, target: Target, bounds: Mapping[str, Interval]) -> Plan:
    """Choose the kernels of a verified program.

    Args:
        program: the program.
        target: decides how kernels are written.
        bounds: of every value, as the verifier returned them.
    """
    with vocabulary(kernel_set(target).words):
        return _Planner(program, target, bounds).run()


class _Planner:
    def __init__(self, program: IntegerProgram, target: Target, bounds: Mapping[str, Interval]) -> None:
        self._program, self._target = program, target
        self._kernels = kernel_set(target)
        self._values = {name: Operand(kind) for name, kind in program.inputs}
        for name, array in program.constants.items():
            kind = TensorType(array.dtype.name, tuple(array.shape))
            self._values[name] = Operand(kind, array, batched=False)
        self._sources = {name: name for name in self._values}
        self._chains: dict[str, tuple[str, tuple[Node, ...]]] = {}
        self._steps: list[Step] = []
        groups = Patterns(program, bounds).find()
        self._groups = {
            name: group
            for name, group in groups.items()
            if isinstance(group, FusedLinear) or self._kernels.attention_fits(group.rule)
        }

    def run(self) -> Plan:
        inside = {
            node.name for group in self._groups.values() for node in group.members if node.name != group.last.name
        }
        for node in self._program.nodes:
            operands = tuple(self._values[name] for name in node.inputs)
            self._values[node.name] = Operand(node.type)
            group = self._groups.get(node.name)
            if node.name in inside:
                continue
            if isinstance(group, FusedLinear):
                self._linear(group)
            elif isinstance(group, FusedAttention):
                self._attention(group)
            elif node.op in VIEWS:
                base, chain = self._chains.get(node.inputs[0], (node.inputs[0], ()))
                self._chains[node.name] = (base, (*chain, node))
            else:
                kernel = self._kernels.emitters[node.op](node, operands, self._target)
                self._add(node.name, node.op, _macs(node, operands), kernel, node.inputs)
        for _, value in self._program.outputs:
            self._materialize(value)
        return Plan(tuple(self._steps), self._values, self._sources)

    def _linear(self, group: FusedLinear) -> None:
        inputs = group.linear.inputs if group.addend is None else (*group.linear.inputs, group.addend)
        operands = tuple(self._values[name] for name in inputs)
        kernel = self._kernels.linear(group.linear, operands, self._target, group.epilogue)
        macs = _macs(group.linear, operands)
        self._add(group.last.name, "+".join(node.op for node in group.members), macs, kernel, inputs)

    def _attention(self, group: FusedAttention) -> None:
        operands = tuple(self._values[name] for name in group.operands)
        kernel = self._kernels.attention(group.rule, operands, self._target)
        macs = sum(
            _macs(node, [self._values[name] for name in node.inputs]) for node in group.members if node.op == "matmul"
        )
        self._add(group.last.name, "attention", macs, kernel, group.operands)

    def _add(self, name: str, operators: str, macs: int, kernel: Kernel, inputs: tuple[str, ...]) -> None:
        for argument in kernel.arguments:
            if isinstance(argument, Argument):
                self._materialize(inputs[argument.index])
        self._sources[name] = name
        self._steps.append(Step(name, operators, macs, kernel, inputs))

    def _materialize(self, name: str) -> None:
        """Give the end of a chain of views its elements, if it has none yet."""
        if name in self._sources:
            return
        base, chain = self._chains[name]
        self._materialize(base)
        if all(node.op == "reshape" for node in chain):
            self._sources[name] = self._sources[base]
            return
        self._add(name, "+".join(node.op for node in chain), 0, emit_views(chain, self._values[base]), (base,))


def _macs(node: Node, operands: tuple[Operand, ...] | list[Operand]) -> int:
    if node.op not in ("linear", "matmul"):
        return 0
    return math.prod(node.type.shape) * operands[0].type.shape[-1]
