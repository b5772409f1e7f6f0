"""Arrays of scales that follow a value through its views."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from calibration.graph import Operation

Scales = npt.NDArray[np.float64]
Element = TypeVar("Element", bound=np.generic)


def viewed(operation: Operation, array: npt.NDArray[Element]) -> npt.NDArray[Element]:
    """Apply a view to an array of the sample's shape."""
    match operation.op:
        case "reshape":
            return array.reshape(operation.integers("shape"))
        case "permute":
            return array.transpose(operation.integers("axes"))
    index = [slice(None)] * array.ndim
    start, stop, step = (operation.integer(key) for key in ("start", "stop", "step"))
    index[operation.integer("axis")] = slice(start, stop, step)
    return array[tuple(index)]


def compress(array: Scales) -> Scales:
    """Reduce every axis along which an array is constant to extent 1, and drop leading ones."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and bool((array == first).all()):
            array = first
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    return np.atleast_1d(array)
