"""Run a program that was compiled for NVIDIA GPUs; needs the driver and TVM's small runtime library."""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import TargetError
from quantizers.integer.inputs import check_finite, check_inputs
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.driver import Driver, Graph
from tvm_backend.gpu.tensors import DeviceArray
from tvm_backend.library import load_library
from tvm_backend.schedule import CONSTANT, INPUT, Argument

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class _Prepared:
    """The calls for one batch size.

    Args:
        graph: all of them, launched as one: a call of its own costs the processor more than many kernels cost the GPU.
        held: the memory that their arguments describe.
    """

    graph: Graph
    held: list[DeviceArray]


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

    def __call__(self, *inputs: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run the program.

        Args:
            inputs: float32 ``(batch, *shape)``, in the order of ``bundle.inputs``.

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
            for address, array in zip(self._inputs, arrays, strict=True):
                self._driver.upload(address, array)
            self._driver.launch(prepared.graph)
            schedule = self.bundle.schedule
            for index, flags in schedule.checks:
                if np.count_nonzero(self._fetch(flags, batch)):
                    check_finite(self.bundle.inputs[index][0], finite=False)
            return tuple(self._fetch(output, batch) for output in schedule.outputs)

    def _placed(self, array: Array) -> int:
        address = self._driver.allocate(array.nbytes)
        self._driver.upload(address, np.ascontiguousarray(array))
        return address

    def _prepare(self, batch: int) -> _Prepared:
        """Return the calls for a batch size; those of another size stay only while the memory does."""
        if batch not in self._prepared:
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
        sizes = [math.prod(kind.shape) * np.dtype(kind.dtype).itemsize for _, kind in self.bundle.inputs]
        self._inputs = [self._driver.allocate(batch * size) for size in sizes]
        self._arena = self._driver.allocate(batch * self.bundle.schedule.arena_bytes)
        self._room = batch

    def _bind(self, batch: int) -> _Prepared:
        held: list[DeviceArray] = []
        calls: list[tuple[Callable[..., None], list[Any]]] = []
        for call in self.bundle.schedule.calls:
            arrays = [DeviceArray(self._address(a, batch), _shape(a, batch), a.dtype) for a in call.arguments]
            held += arrays
            calls.append((self._library[call.function], [self._tensor(array) for array in arrays]))
        with self._runtime.use_raw_stream(self._runtime.device("cuda", 0), self._driver.stream):
            # Outside of a capture first: modules are loaded when a kernel of theirs is launched for the first time,
            # which a capture does not allow.
            for function, arguments in calls:
                function(*arguments)
            with self._driver.capture() as graph:
                for function, arguments in calls:
                    function(*arguments)
        return _Prepared(graph, held)

    def _address(self, argument: Argument, batch: int) -> int:
        if argument.place == CONSTANT:
            return self._constants[argument.position]
        if argument.place == INPUT:
            return self._inputs[argument.position]
        return self._arena + batch * argument.position

    def _fetch(self, argument: Argument, batch: int) -> Array:
        return self._driver.download(self._address(argument, batch), _shape(argument, batch), argument.dtype)


def _shape(argument: Argument, batch: int) -> tuple[int, ...]:
    rows = argument.rows if argument.place == CONSTANT else batch * argument.rows
    return (rows, *argument.tail)
