"""Measure the tiles of a program's linears on a GPU, and keep the fastest."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantizers.errors import TargetError, UsageError
from quantizers.integer.program import IntegerProgram
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.machines import Machine
from tvm_backend.gpu.tile_database import Entry
from tvm_backend.kernels.cuda.tiles import DEFAULT, VARIANTS, LinearShape, Tile, Tiles
from tvm_backend.kernels.cuda.weights import stored_bits
from tvm_backend.targets import CudaTarget

Array = npt.NDArray[np.generic]

#: Share of the time in which new tiles may still be compiled; the rest measures.
_BUILDING = 0.6
#: Calls in a row, for the clock.
_IN_A_ROW = 20
_LEAST_ROUNDS = 3
#: What another tile has to save to take the default's place: less is noise.
_WORTHWHILE = 0.01


@dataclass
class _Candidate:
    """A tile, and what was measured with it.

    Args:
        tile: of all linears.
        program: number of the program on the machine.
        ms: linear and batch size to the milliseconds of each round.
    """

    tile: Tile
    program: int
    ms: dict[tuple[LinearShape, int], list[float]] = field(default_factory=dict)


def tune(
    program: IntegerProgram,
    images: Array,
    expected: Sequence[Array],
    machine: Machine,
    build: Callable[[CudaTarget], Bundle],
    batches: Sequence[int],
    budget: float,
    report: Callable[[str], None],
    variants: Sequence[Tile] = VARIANTS,
) -> list[Entry]:
    """Find the best tile of each linear of a program.

    Every tile is compiled into the whole program, whose answers have to be the expected ones before it is timed. The
    programs then take turns, so that whatever disturbs the GPU meets all of them.

    Args:
        program: with at least one linear.
        images: float32 (batch, *shape), for the answers.
        expected: what the interpreter makes of them, one array for each output.
        machine: with the GPU.
        build: compiles the program for a target.
        batches: sizes that count alike.
        budget: seconds for all of it; the default tile and one other are measured in any case.
        report: takes lines for people.
        variants: tiles to try, the likeliest first.

    Raises:
        UsageError: the program has no linear.
        TargetError: a tile computes other integers than the interpreter, or the machine refuses.
    """
    shapes = linear_shapes(program)
    if not shapes:
        raise UsageError("the program has no linear layer, so there is nothing to tune")
    started = time.monotonic()
    architecture, device = machine.describe()
    report(f"{device} ({architecture}): {len(set(shapes.values()))} shapes of linears")
    candidates: list[_Candidate] = []
    positions: list[tuple[int, LinearShape]] = []
    tried = {tile: CudaTarget((architecture,), Tiles(default=tile)) for tile in (DEFAULT, *variants)}
    # Not every tile is for every architecture.
    fitting = {tile: target for tile, target in tried.items() if target.tiles.default == tile}
    for tile, target in fitting.items():
        if len(candidates) > 1 and time.monotonic() - started > _BUILDING * budget:
            report(f"{len(candidates)} of {len(fitting)} tiles fit the time; --budget gives more")
            break
        bundle = build(target)
        number = machine.load(bundle)
        for found, wanted in zip(machine.run(number, images), expected, strict=True):
            if not np.array_equal(found, wanted):
                raise TargetError(f"{tile} computes other integers than the interpreter on {device}; please report it")
        candidates.append(_Candidate(tile, number))
        positions = _linear_calls(program, bundle, shapes)
    rounds = 0
    while rounds < _LEAST_ROUNDS or time.monotonic() - started < budget:
        for candidate in candidates:
            _measure(machine, candidate, positions, batches)
        rounds += 1
    report(f"{len(candidates)} tiles, {rounds} rounds")
    return [_best(candidates, shape, batches, architecture, device) for shape in sorted(set(shapes.values()))]


def linear_shapes(program: IntegerProgram) -> dict[str, LinearShape]:
    """Return the shape of each linear by the name of its node."""
    found = {}
    for node in program.nodes:
        if node.op == "linear":
            weights = program.constants[node.inputs[1]]
            columns, depth = weights.shape
            found[node.name] = LinearShape(columns, depth, stored_bits(weights))
    return found


def _linear_calls(
    program: IntegerProgram, bundle: Bundle, shapes: Mapping[str, LinearShape]
) -> list[tuple[int, LinearShape]]:
    """Return the numbers of the calls that compute linears, whose values are those of the last operators in them."""
    numbers = {call.value: number for number, call in enumerate(bundle.schedule.calls)}
    readers = {name: node.name for node in program.nodes for name in node.inputs}
    found = []
    for value, shape in shapes.items():
        while value not in numbers:
            value = readers[value]  # noqa: PLW2901 - a linear inside a kernel has one reader
        found.append((numbers[value], shape))
    return found


def _measure(
    machine: Machine, candidate: _Candidate, positions: Sequence[tuple[int, LinearShape]], batches: Sequence[int]
) -> None:
    for batch in batches:
        taken = machine.time_calls(candidate.program, batch, [number for number, _ in positions], _IN_A_ROW)
        sums: dict[LinearShape, list[float]] = {}
        for (_, shape), ms in zip(positions, taken, strict=True):
            sums.setdefault(shape, []).append(ms)
        for shape, each in sums.items():
            candidate.ms.setdefault((shape, batch), []).append(statistics.mean(each))


def _best(
    candidates: Sequence[_Candidate], shape: LinearShape, batches: Sequence[int], architecture: str, device: str
) -> Entry:
    medians = {
        candidate.tile: {batch: statistics.median(candidate.ms[shape, batch]) for batch in batches}
        for candidate in candidates
        if Tiles(default=candidate.tile).of(shape) == candidate.tile
    }

    def cost(tile: Tile) -> float:
        # No time is 0, but a clock may say so.
        return sum(math.log(max(ms, 1e-9)) for ms in medians[tile].values()) / len(batches)

    best = min(medians, key=cost)
    if cost(best) > cost(DEFAULT) + math.log(1 - _WORTHWHILE):
        best = DEFAULT
    return Entry(architecture, device, shape, best, medians[best], medians[DEFAULT])
