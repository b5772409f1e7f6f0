"""Chains of views: where an element of the result lies in the array that the chain starts from, also as strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.integer.program import Node

Index = tuple[Any, ...]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements ``offset + sum of index * stride`` of a flat sample.

    Args:
        offset: position of the first element.
        strides: one for each axis.
    """

    offset: int
    strides: tuple[int, ...]


def _reshape(_node: Node, source: tuple[int, ...], shape: tuple[int, ...], index: Index) -> Index:
    flat: Any = 0
    for position, extent in zip(index, shape, strict=True):
        flat = flat * extent + position
    below = math.prod(source)
    result = []
    for extent in source:
        below //= extent
        result.append((flat // below) % extent)
    return tuple(result)


def _permute(node: Node, _source: tuple[int, ...], _shape: tuple[int, ...], index: Index) -> Index:
    axes = node.integers("axes")
    return tuple(index[axes.index(axis)] for axis in range(len(axes)))


def _slice(node: Node, _source: tuple[int, ...], _shape: tuple[int, ...], index: Index) -> Index:
    axis = node.integer("axis")
    moved = index[axis] * node.integer("step") + node.integer("start")
    return (*index[:axis], moved, *index[axis + 1 :])


#: Operators that only move elements: from the node, the shapes of operand and result and an index of the result to
#: the index of the operand, all without the batch axis.
VIEWS: Mapping[str, Callable[[Node, tuple[int, ...], tuple[int, ...], Index], Index]] = MappingProxyType(
    {"reshape": _reshape, "permute": _permute, "slice": _slice}
)


def source_index(chain: Sequence[Node], shape: tuple[int, ...], index: Index) -> Index:
    """Return where an element of a chain of views lies in its source.

    Args:
        chain: nodes of :data:`VIEWS`, first to last, each the operand of the next.
        shape: of the source.
        index: of an element of the last view; numbers, arrays or expressions of a kernel.
    """
    shapes = [shape, *(node.type.shape for node in chain)]
    for node, before in zip(reversed(chain), reversed(shapes[:-1]), strict=True):
        index = VIEWS[node.op](node, before, node.type.shape, index)
    return index


def strided_source(chain: Sequence[Node], shape: tuple[int, ...]) -> Strided | None:
    """Return where the elements of the last view lie in a source of ``shape``, or None if strides cannot say it."""
    return _as_strides(_source_positions(chain, shape))


def strided_target(chain: Sequence[Node], shape: tuple[int, ...]) -> Strided | None:
    """Return where the elements of ``shape`` go in the result of views that keep every element.

    None if strides cannot say it, or if an element is dropped.
    """
    sources = _source_positions(chain, shape)
    if sources.size != math.prod(shape):
        return None
    targets = np.empty(sources.size, np.int64)
    targets[sources.reshape(-1)] = np.arange(sources.size)
    return _as_strides(targets.reshape(shape))


def _source_positions(chain: Sequence[Node], shape: tuple[int, ...]) -> Positions:
    """Return the position in a flat source of each element of the last view."""
    result = chain[-1].type.shape if chain else shape
    source = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    # A source without axes has no index that could give the result its shape.
    return np.broadcast_to(source[source_index(chain, shape, tuple(np.indices(result)))], result)


def _as_strides(positions: Positions) -> Strided | None:
    offset = int(positions.flat[0])
    strides = tuple(
        int(positions.take(1, axis).flat[0]) - offset if extent > 1 else 0
        for axis, extent in enumerate(positions.shape)
    )
    expected = np.full(positions.shape, offset, np.int64)
    for axis, (extent, stride) in enumerate(zip(positions.shape, strides, strict=True)):
        column = [1] * positions.ndim
        column[axis] = extent
        expected += (np.arange(extent) * stride).reshape(column)
    return Strided(offset, strides) if np.array_equal(positions, expected) else None
