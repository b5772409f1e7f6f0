"""What the forms of an operator know of the program that is being written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from calibration.calibrated import QParams
from calibration.graph import Graph, Operation
from calibration.integerize.builder import ProgramBuilder
from calibration.integerize.multipliers import RowDivision
from calibration.integerize.operands import OperandQParams
from calibration.integerize.scales import Scales, compress
from calibration.integerize.shared_requantize import saturation
from calibration.sites import Edge, Structure
from quantizers.integer.fixed_point import to_fixed_point
from quantizers.integer.program import TensorType
from quantizers.uniform import UniformQParams


@dataclass(frozen=True, slots=True, eq=False)
class Accumulator:
    """An int32 value and what one unit of it is worth; ``scale`` broadcasts to the value's sample shape."""

    name: str
    scale: Scales


class Context(Protocol):
    """The program so far, and the requests that it can answer."""

    graph: Graph
    structure: Structure
    builder: ProgramBuilder
    formats: Mapping[Edge, QParams]
    shapes: Mapping[str, tuple[int, ...]]
    #: See :class:`calibration.integerize.multipliers.Multipliers`.
    factors: dict[str, tuple[Scales, ...]]
    rows: dict[str, RowDivision]
    #: Factors of the weights of LayerNorms, one for each format that is made of a result.
    norms: dict[str, list[Scales]]

    def codes(self, value: str, qparams: OperandQParams) -> str:
        """Return the program value that holds ``value`` in a format: codes, or the levels of a codebook."""

    def accumulator(self, value: str) -> Accumulator:
        """Return a value as int32 sums with their scale."""

    def uniform(self, operation: str, position: int) -> UniformQParams:
        """Return the format of an operand that must be uniform."""

    def operand(self, operation: str, position: int) -> OperandQParams:
        """Return the format of an operand of a product."""

    def product(self, operation: Operation, a: str, zero_a: int, b: str, zero_b: int) -> str:
        """Emit the int32 product of two values, for a matmul of the graph."""

    def once(self, key: tuple[str, OperandQParams], make: Callable[[], str]) -> str:
        """Return what ``make`` returned the first time that the key was asked for."""


#: Emits an operation of the graph in a format and returns the value that holds the codes.
Form = Callable[[Context, Operation, UniformQParams], str]


@dataclass(frozen=True, slots=True, eq=False)
class AddOperand:
    """One side of a sum: the program value, what a step of it is worth, and its zero point."""

    name: str
    scale: Scales
    zero_point: int


def add_operands(context: Context, operation: Operation) -> list[AddOperand]:
    """Return both sides of a sum, reshaped to its rank; accumulators as they are, everything else as codes."""
    operands = []
    for position, value in enumerate(operation.inputs):
        if (operation.name, position) in context.formats:
            source = context.uniform(operation.name, position)
            name, scale, zero_point = context.codes(value, source), source.scales(), source.zero_point
        else:
            accumulator = context.accumulator(value)
            name, scale, zero_point = accumulator.name, accumulator.scale, 0
        if value not in context.graph.constants:
            shape = (1,) * (len(operation.shape) - len(context.shapes[value])) + tuple(context.shapes[value])
            name = context.builder.reshape(name, shape, operation.module)
        operands.append(AddOperand(name, scale, zero_point))
    return operands


def requantize(builder: ProgramBuilder, operation: Operation, x: str, ratio: Scales, qparams: UniformQParams) -> str:
    """Emit one rescaling of int32 sums to codes.

    Args:
        builder: the program.
        operation: names the node.
        x: int32 value.
        ratio: scale of the sums over scale of the codes, broadcasts to the value's sample shape.
        qparams: format of the codes.
    """
    multiplier, shift = to_fixed_point(compress(np.asarray(ratio)))
    return builder.node(
        "requantize",
        (x, builder.constant(multiplier, f"{operation.name}.multiplier")),
        TensorType(qparams.dtype, builder.type(x).shape),
        f"{operation.name}.codes",
        operation.module,
        input_zero_point=0,
        shift=shift,
        **saturation(qparams),
    )
