"""Converters of layers with weights, products, attention and normalization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calibration.aten.value import Value, batched, weights
from quantizers.errors import ModelError

if TYPE_CHECKING:
    from calibration.aten.converter import Converter


def linear(c: Converter, x: Any, weight: Any, bias: Any = None) -> Value:
    """X W^T + b."""
    kernel = weights(weight)
    offset = torch.zeros(kernel.shape[0]) if bias is None else weights(bias)
    return c.value("linear", (batched(x).name, c.constant(kernel), c.constant(offset)))


def addmm(c: Converter, bias: Any, x: Any, weight: Any) -> Value:
    """B + x W."""
    return linear(c, x, weights(weight).T, bias)


def conv2d(
    c: Converter,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> Value:
    """Two-dimensional convolution."""
    kernel = weights(weight)

    def pair(setting: Any) -> tuple[int, int]:
        return (setting[0], setting[-1]) if isinstance(setting, list | tuple) else (setting, setting)

    if isinstance(padding, str):
        if padding == "same":
            raise ModelError("padding 'same'; give numbers")
        padding = (0, 0)
    offset = torch.zeros(kernel.shape[0]) if bias is None else weights(bias)
    return c.value(
        "conv2d",
        (batched(x).name, c.constant(kernel), c.constant(offset)),
        stride=pair(stride),
        padding=pair(padding),
        dilation=pair(dilation),
        groups=groups,
    )


def matmul(c: Converter, a: Any, b: Any) -> Value:
    """Product of two activations, or a linear without bias."""
    left = batched(a)
    if isinstance(b, Tensor):
        if b.ndim != 2:
            raise ModelError(f"a product with a constant of shape {tuple(b.shape)}; only matrices have an integer form")
        return linear(c, left, b.T)
    right = batched(b)
    turned = c.last_operation(right.name)
    if turned is not None and turned.op == "permute":
        axes = turned.integers("axes")
        rank = len(axes)
        if axes == (*range(rank - 2), rank - 1, rank - 2):
            return c.value("matmul", (left.name, turned.inputs[0]), transpose_b=True)
    return c.value("matmul", (left.name, right.name), transpose_b=False)


def attention(
    c: Converter,
    query: Value,
    key: Value,
    value: Value,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Fused attention, decomposed on purpose: its products get number formats."""
    if is_causal or enable_gqa or isinstance(mask, Value):
        raise ModelError("causal, grouped or input-dependent masked attention has no integer form here")
    layout, _ = c.result()
    shape = (*query.shape[:-1], key.shape[-2])
    scores = c.emit("matmul", (query.name, key.name), shape, transpose_b=True)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    scores = c.emit("scale", (scores,), shape, factor=factor)
    if isinstance(mask, Tensor) and not (mask.dtype == torch.bool and bool(mask.all())):
        if mask.dtype == torch.bool:
            raise ModelError("boolean attention masks have no integer form; use an additive mask")
        scores = c.emit("add", (scores, c.operand(mask, layout)), shape)
    weights = c.emit("softmax", (scores,), shape)
    return c.value("matmul", (weights, value.name), transpose_b=False)


def softmax(c: Converter, x: Value, axis: int, *args: Any, **kwargs: Any) -> Value:
    """Softmax over the last axis."""
    if x.layout.sample_axis(axis) != len(x.shape) - 1:
        raise ModelError("softmax over an axis that is not the last")
    return c.value("softmax", (x.name,))


def layer_norm(
    c: Converter, x: Value, shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> Value:
    """LayerNorm over the last axis."""
    if len(shape) != 1:
        raise ModelError(f"LayerNorm over {len(shape)} axes; only the last axis has an integer form")
    scale = torch.ones(shape) if weight is None else weights(weight)
    offset = torch.zeros(shape) if bias is None else weights(bias)
    return c.value("layer_norm", (x.name, c.constant(scale), c.constant(offset)), eps=float(eps))


def batch_norm(c: Converter, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, *args: Any) -> Any:
    """BatchNorm in inference: a multiply and an add per channel."""
    # (x, weight, bias, mean, variance, training, momentum, eps, cudnn) or without training and cudnn
    eps = float(args[2]) if isinstance(args[0], bool) else float(args[1])
    gain = (torch.ones_like(variance) if weight is None else weight) * torch.rsqrt(variance + eps)
    offset = (torch.zeros_like(mean) if bias is None else bias) - mean * gain
    layout, shape = x.layout, x.shape
    # Channels are axis 1 of the traced tensor, axis 0 of a sample.
    extents = (-1, *(1,) * (len(shape) - 1))
    scaled = c.emit("multiply", (x.name, c.constant(gain.reshape(extents))), shape)
    name = c.emit("add", (scaled, c.constant(offset.reshape(extents))), shape)
    result = Value(name, shape, layout)
    return [result] if isinstance(c.node.meta["val"], list | tuple) else result
