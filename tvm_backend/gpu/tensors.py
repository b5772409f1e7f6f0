"""Device memory as the tensors that compiled functions take, through DLPack."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from quantizers.errors import DataError

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


class DeviceTensor(Protocol):
    """A tensor of another library, such as torch, that lends its memory through DLPack."""

    def __dlpack__(self, *, stream: int) -> Any:
        """Return a capsule."""
        ...

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return device type and number."""
        ...


@dataclass(frozen=True)
class Lent:
    """Memory of a tensor on device 0, row-major without gaps.

    Args:
        address: of its first element.
        shape: extents.
        dtype: element type, as numpy names it.
        held: keeps the memory from being freed.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    held: Any

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def borrow(tensor: DeviceTensor, title: str) -> Lent:
    """Return where a tensor's elements lie.

    Args:
        tensor: of any library.
        title: what it is, for people.

    Raises:
        DataError: it is no such tensor, lies elsewhere, or has gaps.
    """
    if not hasattr(tensor, "__dlpack_device__"):
        raise DataError(f"{title} is a {type(tensor).__name__}; expected a tensor on the GPU, such as torch's")
    kind, number = tensor.__dlpack_device__()
    if (int(kind), int(number)) != (CUDA, 0):
        raise DataError(f"{title} does not lie on GPU 0; move it there, or call the program with numpy arrays")
    # No waiting: the caller's stream orders what wrote the tensor before the program.
    capsule = tensor.__dlpack__(stream=-1)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    lent = _ManagedTensor.from_address(get(capsule, b"dltensor")).tensor
    shape = tuple(lent.shape[: lent.ndim])
    if lent.strides:
        expected = [math.prod(shape[axis + 1 :]) for axis in range(lent.ndim)]
        steps = zip(shape, lent.strides[: lent.ndim], expected, strict=True)
        if any(extent > 1 and stride != wanted for extent, stride, wanted in steps):
            raise DataError(f"{title} has gaps between its elements or another order; make it contiguous")
    kinds = {code: letter for letter, code in _KINDS.items()}
    if lent.dtype.lanes != 1 or lent.dtype.code not in kinds:
        raise DataError(f"{title} has elements that are no plain numbers")
    dtype = np.dtype(f"{kinds[lent.dtype.code]}{lent.dtype.bits // 8}").name
    return Lent(lent.data + lent.byte_offset, shape, dtype, (tensor, capsule))


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
