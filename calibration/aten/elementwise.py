"""Converters of elementwise operators and means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calibration.aten.value import Value
from quantizers.errors import ModelError

if TYPE_CHECKING:
    from calibration.aten.converter import Converter


def unary(function: str) -> Callable[..., Value]:
    """Return the converter of an elementwise function."""

    def convert(c: Converter, x: Value, *args: Any, **kwargs: Any) -> Value:
        return c.value("unary", (x.name,), function=function)

    return convert


def gelu(c: Converter, x: Value, approximate: str = "none") -> Value:
    """GELU, exact or by tanh."""
    return c.value("unary", (x.name,), function="gelu_tanh" if approximate == "tanh" else "gelu")


def _scaled(c: Converter, x: Value, factor: float) -> Value:
    return c.value("scale", (x.name,), factor=factor)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.numel() == 1)


def add(c: Converter, a: Any, b: Any, alpha: float = 1) -> Value:
    """A + alpha b."""
    if isinstance(b, Value) and alpha != 1:
        b = Value(c.emit("scale", (b.name,), b.shape, factor=float(alpha)), b.shape, b.layout)
    elif alpha != 1:
        b = b * alpha
    layout, _ = c.result()
    return c.value("add", (c.operand(a, layout), c.operand(b, layout)))


def subtract(c: Converter, a: Any, b: Any, alpha: float = 1) -> Value:
    """A - alpha b."""
    return add(c, a, b, -alpha)


def multiply(c: Converter, a: Any, b: Any) -> Value:
    """Product, or scaling by a number."""
    if isinstance(a, Value) and _is_scalar(b):
        return _scaled(c, a, float(b))
    if isinstance(b, Value) and _is_scalar(a):
        return _scaled(c, b, float(a))
    layout, _ = c.result()
    return c.value("multiply", (c.operand(a, layout), c.operand(b, layout)))


def divide(c: Converter, a: Any, b: Any) -> Value:
    """Division by a number or a constant."""
    if isinstance(b, Value):
        raise ModelError("division by a value that depends on the input has no integer form")
    return multiply(c, a, 1.0 / b)


def mean(c: Converter, x: Value, axes: list[int] | None, keepdim: bool = False, **kwargs: Any) -> Value:
    """Mean over neighbouring axes."""
    if not axes:
        raise ModelError("a mean over all axes mixes the samples of a batch")
    sample_axes = sorted(x.layout.sample_axis(axis) for axis in axes)
    if sample_axes != list(range(sample_axes[0], sample_axes[-1] + 1)):
        raise ModelError(f"a mean over the axes {sample_axes}, which are not neighbours")
    first, last = sample_axes[0], sample_axes[-1]
    name, shape = x.name, x.shape
    if first != last:
        shape = (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])
        name = c.emit("reshape", (name,), shape, shape=shape)
    shape = shape[:first] + shape[first + 1 :]
    name = c.emit("mean", (name,), shape, axis=first)
    layout, result = c.result()
    if keepdim:
        name = c.emit("reshape", (name,), result, shape=result)
    return Value(name, result, layout)


def pool_to_one(c: Converter, x: Value, size: Any) -> Value:
    """Adaptive average pooling to one value."""
    if any(extent not in (1, None) for extent in (size if isinstance(size, list | tuple) else [size])):
        raise ModelError(f"adaptive pooling to {size}; only pooling to one value has an integer form")
    return mean(c, x, [-2, -1], keepdim=True)
