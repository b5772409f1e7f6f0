"""Run a program that was compiled for NVIDIA GPUs; needs the driver and TVM's small runtime library."""

from __future__ import annotations

import math
import platform
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import DataError, TargetError
from quantizers.integer.inputs import check_finite, check_inputs
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.driver import Driver, Graph
from tvm_backend.gpu.tensors import DeviceArray, DeviceTensor, Lent, borrow
from tvm_backend.library import load_library
from tvm_backend.schedule import CONSTANT, INPUT, Argument

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class _Prepared:
    """The calls for one batch size.

    Args:
        graph: all of them, launched as one: a call of its own costs the processor more than many kernels cost the GPU.
        calls: functions and their arguments.
        held: the memory that the arguments describe.
    """

    graph: Graph
    calls: list[tuple[Callable[..., None], list[Any]]]
    held: list[DeviceArray]


@dataclass(frozen=True)
class _Slot:
    """What tells of one run, and of another one once that is over.

    Args:
        event: happens when the run is done.
        flags: host memory for each check of the schedule; anything but 0 says that its input is not finite.
    """

    event: int
    flags: list[Array]


class Pending:
    """A run that the device may still be busy with.

    Args:
        driver: of the program.
        names: the input of each of the flags.
        slot: tells when the run is done, and what was wrong with its inputs.
        free: where the slot goes afterwards.
        held: the tensors that the run reads and writes.
    """

    def __init__(
        self, driver: Driver, names: Sequence[str], slot: _Slot, free: deque[_Slot], held: Sequence[Lent]
    ) -> None:
        self._driver, self._names, self._slot, self._free, self._held = driver, names, slot, free, held

    def __del__(self) -> None:
        # Whoever takes it waits for its event.
        self._free.append(self._slot)

    def wait(self) -> None:
        """Wait until the outputs are there.

        Raises:
            DataError: an input holds NaN or infinity; the outputs mean nothing.
        """
        self._driver.use()
        self._driver.wait(self._slot.event)
        self._held = ()
        for name, flags in zip(self._names, self._slot.flags, strict=True):
            if np.count_nonzero(flags):
                check_finite(name, finite=False)


class CudaProgram:
    """A compiled program, ready to run; calls from several threads run one after another.

    Args:
        bundle: what to run.
        driver: the machine's own where None.

    Raises:
        ArtifactError: the bundle was compiled by another version of TVM.
        TargetError: no driver, no device, or host code for another machine.
    """

    def __init__(self, bundle: Bundle, driver: Driver | None = None) -> None:
        if bundle.arch != platform.machine():
            raise TargetError(
                f"the bundle's host code was built for {bundle.arch}, this machine is {platform.machine()}; "
                "build it again here"
            )
        self.bundle = bundle
        self._driver = driver or Driver()
        self._driver.use()
        self._runtime, self._library = load_library(bundle)
        self._tensor: Callable[[DeviceArray], Any] = self._runtime.from_dlpack
        self._running = threading.Lock()
        self._constants = [self._placed(array) for array in bundle.constants]
        self._prepared: dict[int, _Prepared] = {}
        self._inputs: list[int] = []
        self._arena, self._room = 0, 0
        self._slots: dict[int, deque[_Slot]] = {}
        self._last: int | None = None
        self._clock = tuple(self._driver.event(timed=True) for _ in range(2))

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run the program.

        Args:
            inputs: ``(batch, *shape)`` of the types, and in the order, of ``bundle.inputs``: float32 images.

        Returns:
            One array ``(batch, *shape)`` for each of ``bundle.outputs``.

        Raises:
            DataError: wrong count, shape or dtype of inputs, or values that are not finite.
        """
        arrays = [np.ascontiguousarray(array) for array in inputs]
        check_inputs(self.bundle.inputs, [(array.shape, array.dtype.name) for array in arrays])
        batch = len(arrays[0])
        with self._running:
            self._driver.use()
            prepared = self._prepare(batch)
            self._after_the_last(self._driver.stream)
            for address, array in zip(self._inputs, arrays, strict=True):
                self._driver.upload(address, array)
            self._driver.launch(prepared.graph, self._driver.stream)
            schedule = self.bundle.schedule
            for index, flags in schedule.checks:
                if np.count_nonzero(self._fetch(flags, batch)):
                    check_finite(self.bundle.inputs[index][0], finite=False)
            return tuple(self._fetch(output, batch) for output in schedule.outputs)

    def poison(self, batch: int, value: int) -> None:
        """Set all bytes of the device that runs of a batch size read and write, but the constants, to a value.

        A run that reads what it has not written then gives another answer than after an equal run.

        Args:
            batch: samples.
            value: 0 to 255.
        """
        with self._running:
            self._driver.use()
            self._prepare(batch)
            self._after_the_last(self._driver.stream)
            for address, size in zip(self._inputs, self._input_sizes(), strict=True):
                self._driver.fill(address, value, self._room * size, self._driver.stream)
            size = self._room * self.bundle.schedule.arena_bytes
            self._driver.fill(self._arena, value, size, self._driver.stream)
            # The next run may come on another stream.
            self._driver.synchronize()

    def time_runs(self, batch: int, count: int) -> float:
        """Return the device's milliseconds for a run, of several one after the other on what lies in the inputs."""
        with self._running:
            self._driver.use()
            prepared = self._prepare(batch)
            self._after_the_last(self._driver.stream)
            return self._time(prepared.graph, count)

    def time_calls(self, batch: int, count: int, positions: Sequence[int] | None = None) -> list[float]:
        """Return the device's milliseconds for calls of the schedule, each on its own ``count`` times in a row.

        Args:
            batch: samples.
            count: runs of each call.
            positions: of the calls in the schedule; None for all.
        """
        found = []
        with self._running:
            self._driver.use()
            prepared = self._prepare(batch)
            self._after_the_last(self._driver.stream)
            for position in range(len(prepared.calls)) if positions is None else positions:
                graph = self._record([prepared.calls[position]] * count)
                found.append(self._time(graph, 1) / count)
                self._driver.drop(graph)
        return found

    def _time(self, graph: Graph, count: int) -> float:
        driver = self._driver
        start, end = self._clock
        # The first launch of a graph costs more.
        driver.launch(graph, driver.stream)
        driver.record(start, driver.stream)
        for _ in range(count):
            driver.launch(graph, driver.stream)
        driver.record(end, driver.stream)
        return driver.elapsed_ms(start, end) / count

    def enqueue(self, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor], stream: int) -> Pending:
        """Run on tensors of the device, without waiting for it.

        All of it happens on the caller's stream, after the runs that were asked for before. The first run of a batch
        size records it, which waits.

        Args:
            inputs: float32 ``(batch, *shape)`` on GPU 0, contiguous, in the order of ``bundle.inputs``.
            outputs: likewise, of the types and shapes of ``bundle.outputs``, which are written.
            stream: handle of a stream of the caller's, as ``torch.cuda.current_stream().cuda_stream``.

        Returns:
            What to wait for before the outputs are read outside of the stream; only waiting tells of NaN or infinity.

        Raises:
            DataError: wrong count, shape, dtype or place of the tensors.
        """
        given = [borrow(tensor, f"input {number}") for number, tensor in enumerate(inputs)]
        check_inputs(self.bundle.inputs, [(lent.shape, lent.dtype) for lent in given])
        batch = given[0].shape[0]
        wanted = [borrow(tensor, f"output {number}") for number, tensor in enumerate(outputs)]
        self._check_outputs(wanted, batch)
        driver = self._driver
        with self._running:
            driver.use()
            prepared = self._prepare(batch)
            self._after_the_last(stream)
            for address, lent in zip(self._inputs, given, strict=True):
                driver.copy(address, lent.address, lent.nbytes, stream)
            driver.launch(prepared.graph, stream)
            for output, lent in zip(self.bundle.schedule.outputs, wanted, strict=True):
                driver.copy(lent.address, self._address(output, batch), lent.nbytes, stream)
            free = self._slots.setdefault(batch, deque())
            slot = self._slot(batch, free)
            checks = self.bundle.schedule.checks
            for (_, check), memory in zip(checks, slot.flags, strict=True):
                driver.write_host(memory, self._address(check, batch), stream)
            driver.record(slot.event, stream)
            self._last = slot.event
            names = [self.bundle.inputs[index][0] for index, _ in checks]
            return Pending(driver, names, slot, free, [*given, *wanted])

    def _slot(self, batch: int, free: deque[_Slot]) -> _Slot:
        if not free:
            sizes = [batch * check.rows * 4 for _, check in self.bundle.schedule.checks]
            return _Slot(self._driver.event(), [self._driver.host_memory(size) for size in sizes])
        slot = free.popleft()
        self._driver.wait(slot.event)
        return slot

    def _after_the_last(self, stream: int) -> None:
        """Let a stream wait for what another one may still do with the arena."""
        if self._last is not None:
            self._driver.let_wait(stream, self._last)

    def _check_outputs(self, found: Sequence[Lent], batch: int) -> None:
        expected = [((batch, *kind.shape), kind.dtype) for _, kind in self.bundle.outputs]
        if [(lent.shape, lent.dtype) for lent in found] != expected:
            described = ", ".join(f"{lent.dtype} {lent.shape}" for lent in found) or "none"
            wanted = ", ".join(f"{dtype} {shape}" for shape, dtype in expected)
            raise DataError(f"outputs are {described}; expected {wanted}")

    def _placed(self, array: Array) -> int:
        address = self._driver.allocate(array.nbytes)
        self._driver.upload(address, np.ascontiguousarray(array))
        return address

    def _prepare(self, batch: int) -> _Prepared:
        """Return the calls for a batch size; those of another size stay only while the memory does."""
        if batch not in self._prepared:
            if self._last is not None:
                self._driver.wait(self._last)
            if batch > self._room:
                self._make_room(batch)
            self._prepared[batch] = self._bind(batch)
        return self._prepared[batch]

    def _make_room(self, batch: int) -> None:
        for prepared in self._prepared.values():
            self._driver.drop(prepared.graph)
        self._prepared.clear()
        for address in (*self._inputs, self._arena):
            if address:
                self._driver.free(address)
        self._inputs, self._arena, self._room = [], 0, 0
        self._inputs = [self._driver.allocate(batch * size) for size in self._input_sizes()]
        self._arena = self._driver.allocate(batch * self.bundle.schedule.arena_bytes)
        self._room = batch

    def _input_sizes(self) -> list[int]:
        """Return the bytes of one sample of each input."""
        return [math.prod(kind.shape) * np.dtype(kind.dtype).itemsize for _, kind in self.bundle.inputs]

    def _bind(self, batch: int) -> _Prepared:
        held: list[DeviceArray] = []
        calls: list[tuple[Callable[..., None], list[Any]]] = []
        for call in self.bundle.schedule.calls:
            arrays = [DeviceArray(self._address(a, batch), a.shape(batch), a.dtype) for a in call.arguments]
            held += arrays
            calls.append((self._library[call.function], [self._tensor(array) for array in arrays]))
        with self._launching():
            # Outside of a capture first: modules are loaded when a kernel of theirs is launched for the first time,
            # which a capture does not allow.
            for function, arguments in calls:
                function(*arguments)
        graph = self._record(calls)
        # Other streams do not wait for what this one has uploaded and tried.
        self._driver.synchronize()
        return _Prepared(graph, calls, held)

    def _launching(self) -> Any:
        """Let TVM launch on the driver's own stream."""
        return self._runtime.use_raw_stream(self._runtime.device("cuda", 0), self._driver.stream)

    def _record(self, calls: Sequence[tuple[Callable[..., None], list[Any]]]) -> Graph:
        with self._launching(), self._driver.capture() as graph:
            for function, arguments in calls:
                function(*arguments)
        return graph

    def _address(self, argument: Argument, batch: int) -> int:
        if argument.place == CONSTANT:
            return self._constants[argument.position]
        if argument.place == INPUT:
            return self._inputs[argument.position]
        return self._arena + batch * argument.position

    def _fetch(self, argument: Argument, batch: int) -> Array:
        return self._driver.download(self._address(argument, batch), argument.shape(batch), argument.dtype)
