"""Memory for the runtime: aligned to cache lines, and in large pages where the system gives them.

A network reads all of its weights once for every batch. In pages of 4 KB their addresses alone take thousands of
look-ups, which are slow under virtualization; pages of 2 MB need a few.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tvm_backend.schedule import ALIGNMENT

Array = npt.NDArray[np.generic]
_LARGE_PAGE = 2**21


def allocate(size: int) -> npt.NDArray[np.uint8]:
    """Return ``size`` zero bytes that start on a cache line, at the start of a large page if they fill much of one."""
    if size < _LARGE_PAGE // 4 or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size]
    length = -(-size // _LARGE_PAGE) * _LARGE_PAGE + _LARGE_PAGE
    # Python's default, shared memory, has no large pages.
    region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel that has none refuses; the memory is as good as any other.
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(region, np.uint8)
    start = -raw.ctypes.data % _LARGE_PAGE
    return raw[start : start + size]


def gather(arrays: Sequence[Array]) -> list[Array]:
    """Copy arrays into one piece of memory, one after the other, each on a cache line of its own."""
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
    block = allocate(int(starts[-1]))
    copies = []
    for array, start in zip(arrays, starts[:-1], strict=True):
        copy = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        np.copyto(copy, array)
        copies.append(copy)
    return copies


def aligned(array: Array) -> Array:
    """Return a copy whose elements are in order and start on a cache line."""
    return gather([array])[0]
