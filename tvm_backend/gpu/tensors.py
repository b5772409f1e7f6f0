"""Device memory as the tensors that compiled functions take, through DLPack."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Numbers of DLPack: its device type, and element types by kind.
CUDA = 2
_KINDS = {"i": 0, "u": 1, "f": 2}


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class DeviceArray:
    """A row-major array on device 0; it owns nothing, and has to outlive the tensors made of it.

    Args:
        address: of its first element.
        shape: extents.
        dtype: element type, as numpy names it.
    """

    def __init__(self, address: int, shape: Sequence[int], dtype: str) -> None:
        kind = np.dtype(dtype)
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        element = _DataType(_KINDS[kind.kind], 8 * kind.itemsize, 1)
        tensor = _Tensor(address, CUDA, 0, len(shape), element, self._shape, None, 0)
        self._managed = _ManagedTensor(tensor, None, None)

    def __dlpack__(self, **_: object) -> Any:
        """Return a capsule."""
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return device type and number."""
        return CUDA, 0
