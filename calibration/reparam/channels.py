"""Follow the channels of a value, by number, through what moves, joins or scales them to those who read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.graph import EXECUTORS, VIEWS, Graph, Operation

#: Operators that move elements and change none.
MOVES = VIEWS | {"concat"}


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """An operand that holds elements of the followed value.

    Args:
        reader: the operation, or None for a graph output.
        position: of the operand, or of the graph output.
        channels: int64, the operand's sample shape: the channel of each element.
        factor: product of the scalings on the way.
    """

    reader: Operation | None
    position: int
    channels: Tensor
    factor: float


def follow(graph: Graph, value: str, channels: Tensor, passed: frozenset[str]) -> tuple[Read, ...]:
    """Return everything that reads a value, directly or behind operations that are passed.

    Args:
        graph: the graph.
        value: name of an operation.
        channels: int64, the sample shape of ``value``: any numbering of its elements.
        passed: operators to look behind: of :data:`MOVES`, ``scale`` and ``add``. A concat is passed where all its
            parts stem from ``value`` and are scaled alike; a sum where its other operand does not stem from
            ``value``, or holds the same channels in the same places.
    """
    # A leading batch axis of one lets the graph's own executors move the numbers as they move elements.
    held = {value: (channels[None], 1.0)}
    reads: list[Read] = []
    for operation in graph.operations:
        positions = [position for position, name in enumerate(operation.inputs) if name in held]
        if not positions:
            continue
        result = _passed(operation, held) if operation.op in passed else None
        if result is not None:
            held[operation.name] = result
            continue
        for position in positions:
            numbers, factor = held[operation.inputs[position]]
            reads.append(Read(operation, position, numbers[0], factor))
    for index, (_, name) in enumerate(graph.outputs):
        if name in held:
            reads.append(Read(None, index, held[name][0][0], held[name][1]))
    return tuple(reads)


def _passed(operation: Operation, held: Mapping[str, tuple[Tensor, float]]) -> tuple[Tensor, float] | None:
    found = [held[name] for name in operation.inputs if name in held]
    numbers, factors = [entry[0] for entry in found], [entry[1] for entry in found]
    if operation.op == "scale":
        return numbers[0], factors[0] * operation.real("factor")
    if operation.op == "add":
        spread = [_broadcast(entry, operation.shape) for entry in numbers]
        alike = all(torch.equal(entry, spread[0]) for entry in spread)
        return (spread[0], sum(factors)) if alike else None
    if len(found) < len(operation.inputs) or any(factor != factors[0] for factor in factors):
        return None
    return EXECUTORS[operation.op](operation, *numbers), factors[0]


def _broadcast(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Broadcast (1, *sample) to (1, *shape) from the right, as sums do."""
    return numbers[0].expand(shape)[None]


def label(graph: Graph, read: Read) -> str:
    """Return how a refusal calls a reader."""
    if read.reader is None:
        return f"graph output {graph.outputs[read.position][0]!r}"
    return describe(read.reader)


def describe(operation: Operation) -> str:
    """Return operator, name and module of an operation, for people."""
    place = f" of {operation.module}" if operation.module else ""
    return f"{operation.op} {operation.name}{place}"
