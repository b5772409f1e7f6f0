"""The few functions of NVIDIA's driver that a program needs: a device, memory on it, a stream, copies, a graph."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import TargetError

Array = npt.NDArray[np.generic]

LIBRARY = "libcuda.so.1"
#: Numbers of ``CUdevice_attribute``.
_PROCESSORS, _MAJOR, _MINOR = 16, 75, 76
#: More than the name of any device takes.
_NAME_BYTES = 256
#: A stream that does not wait for the default one, and a capture that other threads do not disturb.
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
#: Events that are only waited for.
_NO_TIMING = 2


class Graph:
    """Kernels recorded on a stream, to be launched as one."""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()


class Driver:
    """The driver and its first device.

    Args:
        library: name or path of the shared library.

    Raises:
        TargetError: no driver, or no device.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise TargetError(
                f"this machine has no NVIDIA driver ({error}); run the bundle where there is one, "
                "or build it for a CPU target"
            ) from error
        self._call("cuInit", ctypes.c_uint(0))
        count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise TargetError("the NVIDIA driver finds no device; is one visible to this process?")
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._device = device
        # The primary context is the one that the launching code uses too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self.use()
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        #: Of a stream of its own, for all work that is not given another.
        self.stream: int = stream.value or 0

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode() if text.value else f"error {code}"
            raise TargetError(f"the NVIDIA driver refuses {function}: {said}")

    def _attribute(self, number: int) -> int:
        found = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(found), ctypes.c_int(number), self._device)
        return found.value

    def architecture(self) -> str:
        """Return the device's architecture, as ``sm_90``."""
        return f"sm_{self._attribute(_MAJOR)}{self._attribute(_MINOR)}"

    def processors(self) -> int:
        """Return how many multiprocessors the device has."""
        return self._attribute(_PROCESSORS)

    def name(self) -> str:
        """Return what NVIDIA calls the device."""
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", text, ctypes.c_int(_NAME_BYTES), self._device)
        return text.value.decode()

    def version(self) -> str:
        """Return the newest version of CUDA that the driver knows, as ``12.4``."""
        found = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(found))
        return f"{found.value // 1000}.{found.value % 1000 // 10}"

    def use(self) -> None:
        """Make the device current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Return the address of new device memory, at least one byte."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy an array, whose elements are in order, to the device, before what comes later on the stream."""
        assert array.flags.c_contiguous
        source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        # Pageable memory has been read when this returns, so the array may change afterwards.
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, ctypes.c_void_p(self.stream))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from device to device."""
        addresses = ctypes.c_uint64(target), ctypes.c_uint64(source)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        """Set bytes of the device to a value, 0 to 255."""
        arguments = ctypes.c_uint64(address), ctypes.c_ubyte(value), ctypes.c_size_t(size)
        self._call("cuMemsetD8Async", *arguments, ctypes.c_void_p(stream))

    def host_memory(self, size: int) -> Array:
        """Return bytes of the host that the device writes to while the host goes on; kept until the process ends."""
        address = ctypes.c_void_p()
        self._call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address.value or 0))

    def write_host(self, target: Array, source: int, stream: int) -> None:
        """Fill memory of :meth:`host_memory` from the device."""
        place, size = ctypes.c_void_p(target.ctypes.data), ctypes.c_size_t(target.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", place, ctypes.c_uint64(source), size, ctypes.c_void_p(stream))

    def event(self, *, timed: bool = False) -> int:
        """Return a new event, which notes the time where asked to."""
        made = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(made), ctypes.c_uint(0 if timed else _NO_TIMING))
        return made.value or 0

    def elapsed_ms(self, start: int, end: int) -> float:
        """Return the device's time between two timed events, once the second one has happened."""
        self.wait(end)
        found = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(found), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return found.value

    def record(self, event: int, stream: int) -> None:
        """Let an event happen when all that is on a stream now is done."""
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def let_wait(self, stream: int, event: int) -> None:
        """Let what comes later on a stream wait for an event."""
        self._call("cuStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(event), ctypes.c_uint(0))

    def wait(self, event: int) -> None:
        """Wait for an event."""
        self._call("cuEventSynchronize", ctypes.c_void_p(event))

    def download(self, address: int, shape: Sequence[int], dtype: str) -> Array:
        """Return an array of what lies on the device, once all earlier work on the stream is done."""
        array: Array = np.empty(shape, dtype)
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, ctypes.c_void_p(self.stream))
        self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for the driver's own stream."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is launched on the stream meanwhile, instead of running it."""
        made, recorded = Graph(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream), ctypes.c_int(_THREAD_LOCAL))
        try:
            yield made
        finally:
            # A capture that failed has to be ended too, or the stream would be lost.
            self._call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(recorded))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(made.handle), recorded, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", recorded)

    def launch(self, graph: Graph, stream: int) -> None:
        """Run a recorded graph on a stream."""
        self._call("cuGraphLaunch", graph.handle, ctypes.c_void_p(stream))

    def drop(self, graph: Graph) -> None:
        """Forget a graph."""
        self._call("cuGraphExecDestroy", graph.handle)
