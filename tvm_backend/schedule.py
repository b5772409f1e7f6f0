"""A compiled program without its code: which function is called with which pieces of memory, in order.

All values live in one arena. Sizes and positions are those of one sample; a batch of n takes n times the room
at n times the position, so that one schedule serves every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_backend.kernels.kernel import Array

#: Bytes to which every value is aligned: a cache line, and the widest vector register.
ALIGNMENT = 64
CONSTANT, INPUT, ARENA = "constant", "input", "arena"


@dataclass(frozen=True, slots=True)
class Argument:
    """A piece of memory as a function takes it, a row-major array ``(batch * rows, *tail)``.

    Args:
        place: ``constant``, ``input`` or ``arena``.
        position: number of the constant or input, or bytes from the start of the arena for a batch of one.
        dtype: element type.
        rows: leading extent for a batch of one; all of it for a constant.
        tail: other extents.
    """

    place: str
    position: int
    dtype: str
    rows: int
    tail: tuple[int, ...]

    def shape(self, batch: int) -> tuple[int, ...]:
        """Return the extents for a batch size."""
        return (self.rows if self.place == CONSTANT else batch * self.rows, *self.tail)

    def nbytes(self, batch: int) -> int:
        """Return the bytes for a batch size."""
        return math.prod(self.shape(batch)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Call:
    """One function call.

    Args:
        function: symbol in the library.
        value: the value of the program that it computes.
        operators: the operators of the program that it stands for, joined by ``+``.
        macs: multiplications and additions of 8-bit codes for one sample.
        arguments: what it reads, then what it writes.
    """

    function: str
    value: str
    operators: str
    macs: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """All calls.

    Args:
        calls: in order.
        outputs: where the results lie in the arena.
        checks: number of an input and where the flags lie, not all 0 if it holds NaN or infinity.
        arena_bytes: size of the arena for a batch of one.
    """

    calls: tuple[Call, ...]
    outputs: tuple[Argument, ...]
    checks: tuple[tuple[int, Argument], ...]
    arena_bytes: int


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A value that needs room from its call to the last call that reads it.

    Args:
        size: bytes for one sample.
        first: number of the call that writes it.
        last: number of the last call that reads it.
    """

    size: int
    first: int
    last: int


def allocate(lifetimes: Mapping[str, Lifetime]) -> tuple[dict[str, int], int]:
    """Return a position for each value so that no two that live at once overlap, and the size of the arena.

    Largest first, each at the lowest position that is free for as long as it lives.
    """
    positions: dict[str, int] = {}
    total = 0
    placed: list[tuple[int, int, Lifetime]] = []
    for name, life in sorted(lifetimes.items(), key=lambda item: (-item[1].size, item[1].first, item[0])):
        size = -(-life.size // ALIGNMENT) * ALIGNMENT
        position = 0
        for start, end, other in sorted(placed, key=lambda entry: entry[0]):
            if other.last < life.first or life.last < other.first:
                continue
            if position + size <= start:
                break
            position = max(position, end)
        positions[name] = position
        placed.append((position, position + size, life))
        total = max(total, position + size)
    return positions, total


def to_json(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as plain lists, numbers and texts."""
    return {
        "arena_bytes": schedule.arena_bytes,
        "outputs": [_argument(argument) for argument in schedule.outputs],
        "checks": [[index, _argument(argument)] for index, argument in schedule.checks],
        "calls": [
            [call.function, call.value, call.operators, call.macs, [_argument(argument) for argument in call.arguments]]
            for call in schedule.calls
        ],
    }


def from_json(document: Mapping[str, Any]) -> Schedule:
    """Read what :func:`to_json` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    return Schedule(
        calls=tuple(
            Call(_text(function), _text(value), _text(operators), _count(macs), _arguments(arguments))
            for function, value, operators, macs, arguments in document["calls"]
        ),
        outputs=_arguments(document["outputs"]),
        checks=tuple((_count(index), _arguments([argument])[0]) for index, argument in document["checks"]),
        arena_bytes=_count(document["arena_bytes"]),
    )


def check_places(schedule: Schedule, inputs: int, constants: Sequence[Array]) -> None:
    """Refuse a schedule with an argument that is not there, or a constant of another type or shape.

    Args:
        schedule: the schedule.
        inputs: how many inputs there are.
        constants: arrays that the schedule refers to by position.

    Raises:
        ValueError, TypeError: names the argument, what it takes and what there is.
    """
    for call in schedule.calls:
        for argument in call.arguments:
            _check_place(f"{call.function} for {call.value}", argument, schedule.arena_bytes, inputs, constants)
    for number, argument in enumerate(schedule.outputs):
        _check_place(f"output {number}", argument, schedule.arena_bytes, 0, constants)
    for index, argument in schedule.checks:
        if index >= inputs:
            raise ValueError(f"input {index} is checked, there are {inputs}")
        _check_place(f"the check of input {index}", argument, schedule.arena_bytes, 0, ())


def _check_place(where: str, argument: Argument, arena_bytes: int, inputs: int, constants: Sequence[Array]) -> None:
    place, position, shape = argument.place, argument.position, (argument.rows, *argument.tail)
    if place == ARENA:
        end = position + math.prod(shape) * np.dtype(argument.dtype).itemsize
        if end > arena_bytes:
            raise ValueError(f"{where} reaches byte {end} of the arena, which has {arena_bytes}")
        return
    counts = {INPUT: inputs, CONSTANT: len(constants)}
    if place not in counts:
        raise ValueError(f"{where} takes {place!r}, expected {INPUT}, {CONSTANT} or {ARENA}")
    if position >= counts[place]:
        raise ValueError(f"{where} takes {place} {position}, there are {counts[place]} that it may take")
    if place == CONSTANT and (constants[position].dtype.name, constants[position].shape) != (argument.dtype, shape):
        found = f"{constants[position].dtype.name} of shape {constants[position].shape}"
        raise ValueError(f"{where} takes constant {position} as {argument.dtype} of shape {shape}, it is {found}")


def _argument(argument: Argument) -> list[object]:
    return [argument.place, argument.position, argument.dtype, argument.rows, list(argument.tail)]


def _arguments(entries: Sequence[Sequence[Any]]) -> tuple[Argument, ...]:
    return tuple(
        Argument(_text(place), _count(position), _text(dtype), _count(rows), tuple(map(_count, tail)))
        for place, position, dtype, rows, tail in entries
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"expected a number that is not negative, got {value!r}")
    return value
