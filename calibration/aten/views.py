"""Converters of operators that move elements and compute nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibration.aten.value import Value, batched
from calibration.layout import Layout, layout_of
from quantizers.errors import ModelError

if TYPE_CHECKING:
    from calibration.aten.converter import Converter


def identity(c: Converter, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Inference leaves the value as it is (dropout, copies, float casts)."""
    return x


def reshape(c: Converter, x: Any, *args: Any, **kwargs: Any) -> Value:
    """Views that keep the order of elements."""
    value = batched(x)
    layout, shape = c.result()
    if shape == value.shape:
        return Value(value.name, shape, layout)
    return c.value("reshape", (value.name,), shape=shape)


def permute(c: Converter, x: Value, axes: list[int]) -> Value:
    """Reorder axes."""
    axes = [axis % x.layout.rank for axis in axes]
    sample_axes = tuple(x.layout.sample_axis(axis) for axis in axes if not x.layout.is_batch(axis))
    if sample_axes == tuple(range(len(sample_axes))):
        layout, shape = c.result()
        return Value(x.name, shape, layout)
    return c.value("permute", (x.name,), axes=sample_axes)


def transpose(c: Converter, x: Value, first: int, second: int) -> Value:
    """Swap two axes."""
    axes = list(range(x.layout.rank))
    axes[first], axes[second] = axes[second], axes[first]
    return permute(c, x, axes)


def transpose_matrix(c: Converter, x: Value) -> Value:
    """Swap the axes of a matrix."""
    return transpose(c, x, 0, 1)


def expand(c: Converter, x: Value | Tensor, sizes: list[Any], **kwargs: Any) -> Value | Tensor:
    """Broadcast; the batch axis of a constant stays at extent 1, for it is the same for each sample."""
    if isinstance(x, Tensor):
        # The batch axis stays at extent 1: it is the same for each sample.
        padded = (1,) * (len(sizes) - x.ndim) + tuple(x.shape)
        extents = [e if isinstance(s, torch.SymInt) or s == -1 else s for s, e in zip(sizes, padded, strict=True)]
        # A class token that is repeated for each sample is the parameter itself, and keeps its name.
        return x if extents == list(x.shape) else x.expand(extents)
    layout, shape = c.result()
    if shape != x.shape:
        raise ModelError(f"a value of shape {x.shape} is expanded to {shape}")
    return Value(x.name, shape, layout)


def _sliced(c: Converter, x: Value, axis: int, start: int, stop: int, step: int = 1) -> tuple[str, tuple[int, ...]]:
    extent = x.shape[axis]
    start, stop, step = slice(start, stop, step).indices(extent)
    if (start, stop, step) == (0, extent, 1):
        return x.name, x.shape
    shape = (*x.shape[:axis], max(0, -(-(stop - start) // step)), *x.shape[axis + 1 :])
    return c.emit("slice", (x.name,), shape, axis=axis, start=start, stop=stop, step=step), shape


def slice_axis(c: Converter, x: Value, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Value:
    """Take a range of an axis."""
    if x.layout.is_batch(axis):
        if (start or 0) != 0 or step != 1:
            raise ModelError("the batch is sliced; samples must not mix")
        return x
    layout, _ = c.result()
    name, shape = _sliced(c, x, x.layout.sample_axis(axis), start, stop, step)
    return Value(name, shape, layout)


def _taken(c: Converter, x: Value, axis: int, index: int, layout: Layout) -> Value:
    start = index % x.shape[axis]
    name, shape = _sliced(c, x, axis, start, start + 1)
    shape = shape[:axis] + shape[axis + 1 :]
    return Value(c.emit("reshape", (name,), shape, shape=shape), shape, layout)


def select(c: Converter, x: Value, axis: int, index: int) -> Value:
    """Take one index of an axis."""
    return _taken(c, x, x.layout.sample_axis(axis), index, c.result()[0])


def unbind(c: Converter, x: Value, axis: int = 0) -> list[Value]:
    """All indices of an axis, one value each."""
    sample_axis, found = x.layout.sample_axis(axis), layout_of(c.node.meta["val"][0].shape)
    assert found is not None
    return [_taken(c, x, sample_axis, index, found[0]) for index in range(x.shape[sample_axis])]


def _pieces(c: Converter, x: Value, axis: int) -> list[Value]:
    """Cut along an axis into the extents that the traced results have."""
    sample_axis, start, pieces = x.layout.sample_axis(axis), 0, []
    for meta in c.node.meta["val"]:
        found = layout_of(meta.shape)
        assert found is not None
        extent = found[1][sample_axis]
        name, shape = _sliced(c, x, sample_axis, start, start + extent)
        pieces.append(Value(name, shape, found[0]))
        start += extent
    return pieces


def split(c: Converter, x: Value, size: Any, axis: int = 0) -> list[Value]:
    """Cut along an axis."""
    return _pieces(c, x, axis)


def cat(c: Converter, parts: list[Any], axis: int = 0) -> Value:
    """Join along an axis."""
    layout, _ = c.result()
    return c.value("concat", tuple(c.operand(part, layout) for part in parts), axis=layout.sample_axis(axis))


def roll(c: Converter, x: Value, shifts: list[int], axes: list[int]) -> Value:
    """Rotate axes: two slices, joined the other way round."""
    for shift, axis in zip(shifts, axes, strict=True):
        sample_axis = x.layout.sample_axis(axis)
        extent = x.shape[sample_axis]
        cut = -shift % extent
        if cut:
            tail, _ = _sliced(c, x, sample_axis, cut, extent)
            head, _ = _sliced(c, x, sample_axis, 0, cut)
            x = Value(c.emit("concat", (tail, head), x.shape, axis=sample_axis), x.shape, x.layout)
    return x


def pad(c: Converter, x: Value, padding: list[int], mode: str = "constant", value: float | None = None) -> Value:
    """Constant padding: join with constants."""
    if mode != "constant":
        raise ModelError(f"padding mode {mode}; only constant padding has an integer form")
    for index in range(len(padding) // 2):
        before, after = padding[2 * index : 2 * index + 2]
        if min(before, after) < 0:
            raise ModelError("negative padding")
        axis = x.layout.sample_axis(x.layout.rank - 1 - index)
        parts, shape = [x.name], list(x.shape)
        for extent, position in ((before, 0), (after, len(parts))):
            if extent:
                filler = torch.full((*x.shape[:axis], extent, *x.shape[axis + 1 :]), float(value or 0.0))
                parts.insert(position if position == 0 else len(parts), c.constant(filler))
                shape[axis] += extent
        if len(parts) > 1:
            x = Value(c.emit("concat", tuple(parts), tuple(shape), axis=axis), tuple(shape), x.layout)
    return x


def getitem(c: Converter, values: list[Value], index: int) -> Value:
    """One result of an operator that has several."""
    return values[index]


def size(c: Converter, *args: Any, **kwargs: Any) -> Any:
    """A shape, which the trace knows."""
    return c.node.meta["val"]
