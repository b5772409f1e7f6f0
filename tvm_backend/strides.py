"""Chains of views as strides: where an element of the result lies in the array that the chain starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from quantizers.integer.program import Node

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements ``offset + sum of index * stride`` of a flat sample.

    Args:
        offset: position of the first element.
        strides: one for each axis.
    """

    offset: int
    strides: tuple[int, ...]


def _slice(node: Node, indices: Indices) -> Indices:
    window = [slice(None)] * indices.ndim
    window[node.integer("axis")] = slice(node.integer("start"), node.integer("stop"), node.integer("step"))
    return indices[tuple(window)]


_VIEWS: Mapping[str, Callable[[Node, Indices], Indices]] = MappingProxyType(
    {
        "reshape": lambda node, indices: indices.reshape(node.integers("shape")),
        "permute": lambda node, indices: indices.transpose(node.integers("axes")),
        "slice": _slice,
    }
)


def strided_source(chain: Sequence[Node], shape: tuple[int, ...]) -> Strided | None:
    """Return where the elements of the last view lie in a source of ``shape``, or None if strides cannot say it."""
    indices = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    for node in chain:
        indices = _VIEWS[node.op](node, indices)
    return _as_strides(indices)


def strided_target(chain: Sequence[Node], shape: tuple[int, ...]) -> Strided | None:
    """Return where the elements of ``shape`` go in the result of views that keep every element.

    None if strides cannot say it, or if an element is dropped.
    """
    indices = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    for node in chain:
        indices = _VIEWS[node.op](node, indices)
    if indices.size != math.prod(shape):
        return None
    positions = np.empty(indices.size, np.int64)
    positions[indices.reshape(-1)] = np.arange(indices.size)
    return _as_strides(positions.reshape(shape))


def _as_strides(indices: Indices) -> Strided | None:
    offset = int(indices.flat[0])
    strides = tuple(
        int(indices.take(1, axis).flat[0]) - offset if extent > 1 else 0 for axis, extent in enumerate(indices.shape)
    )
    expected = np.full(indices.shape, offset, np.int64)
    for axis, (extent, stride) in enumerate(zip(indices.shape, strides, strict=True)):
        column = [1] * indices.ndim
        column[axis] = extent
        expected += (np.arange(extent) * stride).reshape(column)
    return Strided(offset, strides) if np.array_equal(indices, expected) else None
