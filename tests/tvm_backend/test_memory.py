"""Memory for the runtime: where pieces start, and that they hold what was given and share nothing."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from tvm_backend import memory
from tvm_backend.memory import aligned, allocate, gather
from tvm_backend.schedule import ALIGNMENT

LARGE_PAGE = 2**21
#: Around the sizes at which large pages begin and end.
SIZES = [1, ALIGNMENT, ALIGNMENT + 1, LARGE_PAGE // 4 - 1, LARGE_PAGE // 4, LARGE_PAGE, LARGE_PAGE + 1]


@pytest.mark.parametrize("size", SIZES)
def test_memory_is_zero_writable_and_on_a_cache_line(size):
    piece = allocate(size)
    assert piece.shape == (size,)
    assert piece.dtype == np.uint8
    assert piece.ctypes.data % ALIGNMENT == 0
    assert not piece.any()
    piece[:] = 255
    assert (piece == 255).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
@pytest.mark.parametrize("size", [size for size in SIZES if size >= LARGE_PAGE // 4])
def test_much_memory_starts_on_a_large_page(size):
    assert allocate(size).ctypes.data % LARGE_PAGE == 0


def test_a_system_without_large_pages_gives_memory_as_well(monkeypatch):
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    piece = allocate(LARGE_PAGE)
    assert piece.shape == (LARGE_PAGE,)
    assert piece.ctypes.data % ALIGNMENT == 0


def arrays() -> list[np.ndarray]:
    """Arrays of all element types of a bundle, of sizes beside a cache line, out of order, and without axes."""
    rng = np.random.default_rng(0)
    sizes = {"int8": 63, "uint8": 64, "int16": 65, "int32": 1, "int64": 7, "float32": 100}
    flat = [rng.integers(0, 128, size).astype(dtype) for dtype, size in sizes.items()]
    matrix = rng.integers(0, 128, (5, 7)).astype(np.int16)
    return [*flat, matrix, matrix.T, matrix[:, ::2], np.zeros((0, 3), np.int8), np.array(9, np.int32)]


def test_gathered_arrays_hold_the_same_in_order_on_cache_lines():
    given = arrays()
    copies = gather(given)
    for array, copy in zip(given, copies, strict=True):
        np.testing.assert_array_equal(copy, array, strict=True)
        assert copy.flags.c_contiguous
        # An array without elements starts nowhere.
        assert copy.size == 0 or copy.ctypes.data % ALIGNMENT == 0


def test_gathered_arrays_share_neither_with_the_originals_nor_with_each_other():
    given = arrays()
    copies = gather(given)
    for copy in copies:
        copy.fill(0)
    assert all(array.any() for array in given if array.size)
    for number, copy in enumerate(copies):
        copy.fill(1)
        others = copies[:number] + copies[number + 1 :]
        assert not any(other.any() for other in others)
        copy.fill(0)


def test_no_memory_is_needed_for_nothing():
    assert allocate(0).shape == (0,)
    assert gather([]) == []


def test_an_aligned_copy_is_a_copy_in_order():
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T
    copy = aligned(array)
    np.testing.assert_array_equal(copy, array, strict=True)
    assert copy.flags.c_contiguous
    assert not np.shares_memory(copy, array)
