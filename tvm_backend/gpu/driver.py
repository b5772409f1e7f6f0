"""The few functions of NVIDIA's driver that a program needs: a device, memory on it, copies."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import TargetError

Array = npt.NDArray[np.generic]

LIBRARY = "libcuda.so.1"
#: Numbers of ``CUdevice_attribute``.
_MAJOR, _MINOR = 75, 76


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

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode() if text.value else f"error {code}"
            raise TargetError(f"the NVIDIA driver refuses {function}: {said}")

    def architecture(self) -> str:
        """Return the device's architecture, as ``sm_90``."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_MAJOR), self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_MINOR), self._device)
        return f"sm_{major.value}{minor.value}"

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
        """Copy an array, whose elements are in order, to the device."""
        assert array.flags.c_contiguous
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))

    def download(self, address: int, shape: Sequence[int], dtype: str) -> Array:
        """Return an array of what lies on the device, once all work there is done."""
        array: Array = np.empty(shape, dtype)
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))
        return array
