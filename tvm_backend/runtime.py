"""Run a compiled program on numpy arrays; needs TVM's small runtime library, neither its compiler nor torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import TargetError
from quantizers.integer.inputs import check_finite, check_inputs
from tvm_backend.bundle import Bundle, load_bundle
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.library import load_library
from tvm_backend.memory import allocate, gather
from tvm_backend.schedule import ARENA, CONSTANT, INPUT, Argument
from tvm_backend.targets import check_runnable, is_cuda
from tvm_backend.threads import check_threads, set_threads

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class _Prepared:
    """The calls for one batch size, on memory of their own.

    Args:
        calls: functions and their arguments, those that are inputs still missing.
        inputs: (number of the call, number of its argument, number of the input, shape) for each of those.
        outputs: views of the arena.
        checks: name of an input, and the flags that say whether it holds NaN or infinity.
    """

    calls: list[tuple[Callable[..., None], list[Any]]]
    inputs: list[tuple[int, int, int, tuple[int, ...]]]
    outputs: list[Array]
    checks: list[tuple[str, Array]]


class CompiledProgram:
    """A compiled program, ready to run; calls from several threads run one after another.

    Args:
        bundle: what to run.
        threads: worker threads, from 1 to the processors of this process; all of them if None.

    Raises:
        ArtifactError: the bundle was compiled by another version of TVM.
        TargetError: this machine lacks what the code needs.
        UsageError: the number of threads is out of range.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        if is_cuda(bundle.target):
            raise TargetError(f"the bundle was built for {bundle.target}; open it with tvm_backend.runtime.open_bundle")
        check_runnable(bundle.target, bundle.arch, bundle.cpu_features)
        self.bundle = bundle
        self.threads = check_threads(threads)
        runtime, self._library = load_library(bundle)
        # All calls share one arena.
        self._running = threading.Lock()
        self._tensor: Callable[[Array], Any] = runtime.from_dlpack
        self._constants = gather(bundle.constants)
        self._expected = [(np.dtype(kind.dtype), kind.shape) for _, kind in bundle.inputs]
        self._prepared: dict[int, _Prepared] = {}
        self._arena: Array = np.empty(0, np.uint8)

    def __call__(self, *inputs: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run the program.

        Args:
            inputs: float32 ``(batch, *shape)``, in the order of ``bundle.inputs``.

        Returns:
            One array ``(batch, *shape)`` for each of ``bundle.outputs``.

        Raises:
            DataError: wrong count, shape or dtype of inputs, or values that are not finite.
        """
        with self._running:
            prepared = self._ready(inputs)
            for function, arguments in prepared.calls:
                function(*arguments)
            # Whoever reads the image flags it, so that it is read once; what was computed from it is dropped here.
            for name, flags in prepared.checks:
                if np.count_nonzero(flags):
                    check_finite(name, finite=False)
            return tuple(output.copy() for output in prepared.outputs)

    def time_calls(self, *inputs: npt.NDArray[np.float32]) -> list[float]:
        """Run the program and return the seconds that each call of its schedule took."""
        seconds = []
        with self._running:
            prepared = self._ready(inputs)
            for function, arguments in prepared.calls:
                started = time.perf_counter()
                function(*arguments)
                seconds.append(time.perf_counter() - started)
        return seconds

    def _ready(self, inputs: Sequence[Array]) -> _Prepared:
        """Check the inputs and return the calls that read them."""
        arrays = [np.asarray(array) for array in inputs]
        # Names of dtypes are slow; they are for the message only.
        batch = arrays[0].shape[:1] if arrays else ()
        fits = [(a.dtype, a.shape) for a in arrays] == [(kind, batch + shape) for kind, shape in self._expected]
        if not fits or batch in ((), (0,)):
            check_inputs(self.bundle.inputs, [(array.shape, array.dtype.name) for array in arrays])
        # TVM's pool belongs to the calling thread and another program may have set it since.
        set_threads(self.threads)
        prepared = self._prepare(len(arrays[0]))
        self._set_inputs(prepared, arrays)
        return prepared

    def _set_inputs(self, prepared: _Prepared, arrays: Sequence[Array]) -> None:
        # Images are read where they lie: the code that quantizes them expects no alignment.
        placed = [array if _is_plain(array) else array.copy() for array in arrays]
        for call, position, index, shape in prepared.inputs:
            prepared.calls[call][1][position] = self._tensor(placed[index].reshape(shape))

    def _prepare(self, batch: int) -> _Prepared:
        """Return the calls for a batch size; those of another size stay only while the arena does."""
        if batch not in self._prepared:
            needed = batch * self.bundle.schedule.arena_bytes
            if needed > self._arena.nbytes:
                self._prepared.clear()
                self._arena = allocate(needed)
            self._prepared[batch] = self._bind(batch)
        return self._prepared[batch]

    def _bind(self, batch: int) -> _Prepared:
        calls: list[tuple[Callable[..., None], list[Any]]] = []
        inputs = []
        for call in self.bundle.schedule.calls:
            arguments: list[Any] = []
            for argument in call.arguments:
                if argument.place == INPUT:
                    inputs.append((len(calls), len(arguments), argument.position, argument.shape(batch)))
                    arguments.append(None)
                else:
                    arguments.append(self._tensor(self._view(argument, batch)))
            calls.append((self._library[call.function], arguments))
        outputs = [self._view(argument, batch) for argument in self.bundle.schedule.outputs]
        checks = [(self.bundle.inputs[i][0], self._view(flags, batch)) for i, flags in self.bundle.schedule.checks]
        return _Prepared(calls, inputs, outputs, checks)

    def _view(self, argument: Argument, batch: int) -> Array:
        if argument.place == CONSTANT:
            return self._constants[argument.position].reshape(argument.shape(batch))
        assert argument.place == ARENA
        start = batch * argument.position
        stored = self._arena[start : start + argument.nbytes(batch)]
        return stored.view(argument.dtype).reshape(argument.shape(batch))


def load(directory: Path | str, threads: int | None = None) -> CompiledProgram | CudaProgram:
    """Load a bundle that :func:`tvm_backend.bundle.save_bundle` wrote.

    Raises:
        ArtifactError: the bundle is damaged, or was compiled by another version of TVM.
        TargetError: this machine lacks what the code needs.
        UsageError: the number of threads is out of range.
    """
    return open_bundle(load_bundle(directory), threads)


def open_bundle(bundle: Bundle, threads: int | None = None) -> CompiledProgram | CudaProgram:
    """Make a bundle ready to run; worker threads are for processors, a GPU takes none.

    Raises:
        ArtifactError, TargetError, UsageError: as above.
    """
    return CudaProgram(bundle) if is_cuda(bundle.target) else CompiledProgram(bundle, threads)


def _is_plain(array: Array) -> bool:
    """Whether an array's elements are in order, and it can be lent out: a read-only array cannot."""
    return array.flags.c_contiguous and array.flags.writeable
