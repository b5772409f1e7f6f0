"""Where the time of a compiled program goes, and how far its matrix products are from the machine's peak."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import UsageError
from quantizers.integer.program import Node, TensorType
from tvm_backend.imports import import_runtime, import_tvm
from tvm_backend.kernels.cpu.dot import DOTS, Tile
from tvm_backend.kernels.kernel import Layout
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Function, script
from tvm_backend.memory import aligned
from tvm_backend.runtime import CompiledProgram
from tvm_backend.schedule import Call, Schedule
from tvm_backend.targets import NATIVE, CpuTarget, get_cpu_target
from tvm_backend.threads import check_threads, set_threads

#: Groups of the reduction in the kernel that measures the peak: both operands stay in the first cache.
_GROUPS = 32
_TASKS = 16
_REPEATS = 200
_WARM_UPS = 20


@dataclass(frozen=True, slots=True)
class KernelTime:
    """The calls of one kind of kernel on equal shapes.

    Args:
        kernel: operators that it stands for, joined by ``+``.
        shape: of the operand and of the result, for people.
        calls: how many.
        macs: multiplications and additions of 8-bit codes of all calls.
        size: bytes that all calls read and write, each array once.
        median_ms: sum of the calls' medians.
    """

    kernel: str
    shape: str
    calls: int
    macs: int
    size: int
    median_ms: float


def profile(compiled: CompiledProgram, *inputs: npt.NDArray[np.float32], rounds: int = 30) -> list[KernelTime]:
    """Time every kernel of a program on its own.

    Args:
        compiled: what to run, with its number of threads.
        inputs: as the program takes them.
        rounds: runs of the whole program.

    Returns:
        One entry for each kind of kernel and shape, slowest first.

    Raises:
        UsageError: ``rounds`` is not positive.
        DataError: the inputs are not what the program takes.
    """
    (seconds,) = median_call_seconds([compiled], *inputs, rounds=rounds)
    return by_kernel(compiled.bundle.schedule, len(inputs[0]), [1000 * taken for taken in seconds])


def by_kernel(schedule: Schedule, batch: int, times: Sequence[float]) -> list[KernelTime]:
    """Put calls of one kind on equal shapes together, slowest first.

    Args:
        schedule: of a program.
        batch: samples.
        times: milliseconds of each call.
    """
    groups: dict[tuple[str, str], list[tuple[Call, float]]] = {}
    for call, taken in zip(schedule.calls, times, strict=True):
        first, last = call.arguments[0], call.arguments[-1]
        shape = " -> ".join("x".join(map(str, a.shape(batch))) for a in (first, last))
        groups.setdefault((call.operators, shape), []).append((call, taken))
    found = [
        KernelTime(
            kernel,
            shape,
            len(calls),
            sum(batch * call.macs for call, _ in calls),
            sum(argument.nbytes(batch) for call, _ in calls for argument in set(call.arguments)),
            sum(taken for _, taken in calls),
        )
        for (kernel, shape), calls in groups.items()
    ]
    return sorted(found, key=lambda entry: -entry.median_ms)


def median_call_seconds(
    programs: Sequence[CompiledProgram], *inputs: npt.NDArray[np.float32], rounds: int = 30
) -> list[list[float]]:
    """Time every call of several programs that take the same inputs, a run of each a round: noise meets all alike.

    Args:
        programs: what to run, each with its number of threads.
        inputs: as the programs take them.
        rounds: runs of each program.

    Returns:
        For each program the median seconds of each call of its schedule.

    Raises:
        UsageError: ``rounds`` is not positive.
        DataError: the inputs are not what the programs take.
    """
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}, expected at least 1")
    for compiled in programs:
        compiled(*inputs)
    runs = [[compiled.time_calls(*inputs) for compiled in programs] for _ in range(rounds)]
    return [[statistics.median(taken) for taken in zip(*samples, strict=True)] for samples in zip(*runs, strict=True)]


def int8_peak(target: str = NATIVE, threads: int | None = None, rounds: int = 30) -> float:
    """Return the multiply-adds of 8-bit codes a second that this machine reaches, operands in the first cache.

    Args:
        target: which instructions are measured.
        threads: as for :class:`tvm_backend.runtime.CompiledProgram`.
        rounds: measurements; the median counts.

    Raises:
        TargetError: unknown target, or this machine cannot run it.
        UsageError: the number of threads is out of range.
    """
    chosen, workers = get_cpu_target(target), check_threads(threads)
    function, macs, arrays = _peak_kernel(chosen)
    runtime = import_runtime()
    set_threads(workers)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "peak.so"
        tvm = import_tvm()
        module = tvm.IRModule({"peak": function.with_attr("global_symbol", "peak")})
        tvm.compile(module, target=chosen.to_tvm()).export_library(str(path))
        kernel = runtime.load_module(str(path))["peak"]
        tensors = [runtime.from_dlpack(aligned(array)) for array in arrays]
        taken = []
        # Threads that have just been chosen need a few calls until they run beside one another.
        for _ in range(_WARM_UPS):
            kernel(*tensors)
        for _ in range(rounds):
            started = time.perf_counter()
            kernel(*tensors)
            taken.append(time.perf_counter() - started)
        del kernel
    return macs / statistics.median(taken)


def _peak_kernel(target: CpuTarget) -> tuple[Any, int, Sequence[npt.NDArray[np.generic]]]:
    """Return a function that repeats one register tile, its multiply-adds, and its operands."""
    tirx, dot = script(), DOTS[target.dot]
    tile = Tile.choose(4 * dot.lanes, dot)
    left = np.ones((tile.rows, _GROUPS * dot.group), dot.left)
    right = np.ones((_GROUPS, tile.width * dot.group), np.int8)
    result = np.zeros((_TASKS, tile.rows, tile.width), np.int32)
    node = Node("peak", "peak", (), {}, TensorType("int32", result.shape[1:]))
    function = Function(node, (), Layout(_TASKS, result.shape[1:]))
    width = dot.lanes * dot.group
    with function.body():
        x, weights, sums = function.constant(left), function.constant(right), function.result()
        with tirx.parallel(_TASKS) as task:
            partial = tile.accumulators()
            for row in partial:
                for v in range(tile.vectors):
                    tirx.buffer_store(row, literal(0, "int32", dot.lanes), [tile.lane(v)])
            with tirx.serial(_REPEATS), tirx.serial(_GROUPS) as group:
                for i, row in enumerate(partial):
                    word = dot.word(x, [i, group * dot.group])
                    for v in range(tile.vectors):
                        codes = weights.vload([group, v * width], f"int8x{width}")
                        tirx.buffer_store(row, dot.multiply_add(row[tile.lane(v)], word, codes), [tile.lane(v)])
            for i, row in enumerate(partial):
                for v in range(tile.vectors):
                    tirx.buffer_store(sums, row[tile.lane(v)], [task, i, tirx.ramp(v * dot.lanes, 1, dot.lanes)])
    macs = _TASKS * _REPEATS * _GROUPS * dot.group * tile.rows * tile.width
    return function.kernel().function, macs, (left, right, result)
