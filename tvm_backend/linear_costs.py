"""What each linear of compiled programs takes: bytes of its weight as the bundle stores it, and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantizers.integer.program import IntegerProgram
from tvm_backend.kernels.cpu.narrow_weights import WIDTHS
from tvm_backend.profile import median_call_seconds
from tvm_backend.runtime import CompiledProgram
from tvm_backend.schedule import Call, Schedule

#: Position of the weight among the arguments of a linear's kernel: it comes after the activations.
_WEIGHT = 1


@dataclass(frozen=True, slots=True)
class LinearCost:
    """A linear with all that its kernel computes besides.

    Args:
        weight_bytes: of the packed weight, padding included.
        milliseconds: median of the call.
    """

    weight_bytes: int
    milliseconds: float


@dataclass(frozen=True, slots=True)
class ProgramCost:
    """A program.

    Args:
        linears: by the name of the ``linear`` node.
        other_milliseconds: of all other calls together.
    """

    linears: Mapping[str, LinearCost]
    other_milliseconds: float


def stored_width(bits: int) -> int:
    """Return the bits in which a bundle stores weights of 2 to 8 bits: 3, 4 or 8."""
    return next((width for width in sorted(WIDTHS) if bits <= width), 8)


def measure_costs(
    programs: Sequence[tuple[IntegerProgram, CompiledProgram]],
    *inputs: npt.NDArray[np.float32],
    rounds: int = 30,
) -> list[ProgramCost]:
    """Measure programs that take the same inputs, in interleaved rounds.

    Args:
        programs: each with what was compiled from it.
        inputs: as the programs take them; the size of the batch counts.
        rounds: runs of each program.

    Raises:
        UsageError: ``rounds`` is not positive.
        DataError: the inputs are not what the programs take.
    """
    timed = median_call_seconds([compiled for _, compiled in programs], *inputs, rounds=rounds)
    costs = []
    for (program, compiled), seconds in zip(programs, timed, strict=True):
        calls = compiled.bundle.schedule.calls
        names = linears_of(program, compiled.bundle.schedule)
        linears = {
            name: LinearCost(_weight_bytes(calls[position]), 1000 * seconds[position])
            for position, name in names.items()
        }
        others = sum(taken for position, taken in enumerate(seconds) if position not in names)
        costs.append(ProgramCost(linears, 1000 * others))
    return costs


def linears_of(program: IntegerProgram, schedule: Schedule) -> dict[int, str]:
    """Return the ``linear`` node that each call of a schedule computes, by the call's position; other calls have none.

    Args:
        program: what the schedule was made from.
        schedule: its calls.
    """
    nodes = {node.name: node for node in program.nodes}
    computed = {call.value for call in schedule.calls}
    found = {}
    for position, call in enumerate(schedule.calls):
        first, *rest = call.operators.split("+")
        if first != "linear":
            continue
        # Back from the value of the call: what it takes along was read by nothing else, so that no call computes it.
        node = nodes[call.value]
        for operator in reversed([first, *rest[:-1]] if rest else []):
            node = next(
                nodes[name]
                for name in node.inputs
                if name in nodes and nodes[name].op == operator and name not in computed
            )
        found[position] = node.name
    return found


def _weight_bytes(call: Call) -> int:
    weight = call.arguments[_WEIGHT]
    return weight.rows * math.prod(weight.tail) * np.dtype(weight.dtype).itemsize
