"""Linear, convolution and matrix product: the operators whose operands have formats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from calibration.calibrated import QParams
from calibration.graph import Graph, Operation, cuts_patches
from calibration.sites import Edge
from ptq.pt2_export.buffers import Buffer, Buffers
from ptq.pt2_export.formats import Pair, bias, pair, row_levels, weight
from quantizers.codebook import CodebookQParams
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams


class Source:
    """What the operators of a network are made of.

    Args:
        graph: the graph.
        formats: of its edges.
        buffers: where tensors go.
    """

    def __init__(self, graph: Graph, formats: Mapping[Edge, QParams], buffers: Buffers) -> None:
        self.graph = graph
        self.formats = formats
        self.buffers = buffers


#: Computes an operation from its operands that are no weights.
Step = Callable[..., Tensor]


def linear(source: Source, operation: Operation) -> Step:
    """Return a linear of dequantized codes: what inductor replaces by an integer kernel of oneDNN."""
    read, kernel, offset = _layer(source, operation)
    return lambda x: functional.linear(read(x), kernel(), offset())


def conv2d(source: Source, operation: Operation) -> Step:
    """Return a convolution of dequantized codes: as a linear on patches where it cuts them, otherwise as it is.

    What inductor makes of a quantized convolution fails for one channel and a free batch size.
    """
    if cuts_patches(operation, source.graph.shapes()):
        return _patches(source, operation)
    read, kernel, offset = _layer(source, operation)
    stride, padding, dilation = (operation.integers(key) for key in ("stride", "padding", "dilation"))
    groups = operation.integer("groups")
    return lambda x: functional.conv2d(read(x), kernel(), offset(), stride, padding, dilation, groups)


def _patches(source: Source, operation: Operation) -> Step:
    read, kernel, offset = _layer(source, operation, rows=True)
    channels, height, width = operation.shape
    depth, *extents = source.graph.constants[operation.inputs[1]].shape[1:]
    grid = (depth, height, extents[0], width, extents[1])

    def run(x: Tensor) -> Tensor:
        patches = x.reshape(-1, *grid).permute(0, 2, 4, 1, 3, 5).reshape(-1, height * width, depth * math.prod(extents))
        result = functional.linear(read(patches), kernel(), offset())
        return result.transpose(1, 2).reshape(-1, channels, height, width)

    return run


def matmul(source: Source, operation: Operation) -> Step:
    """Return a product of two activations, each quantized just before it.

    Probabilities in uneven levels are relative to the largest of their row, so that each row of the product is divided
    by their sum. Scales of heads are divided out before a format of scale 1 and multiplied in after the product.
    """
    rows = source.formats[operation.name, 0]
    if isinstance(rows, RowRelativeQParams) and rows.codebook.family != "uniform":
        left, relative, scales = row_levels(rows, source.buffers), True, np.ones(1)
    else:
        (left, scales), relative = _operand(source, operation, 0), False
    right, right_scales = _operand(source, operation, 1)
    transposed, factor = bool(operation.integer("transpose_b")), None
    scales = (scales.astype(np.float32) * right_scales.astype(np.float32)).astype(np.float32)
    if scales.size > 1:
        factor = source.buffers.add(f"{operation.name}_head_scales", torch.from_numpy(scales))

    def run(a: Tensor, b: Tensor) -> Tensor:
        a, b = left(a), right(b)
        product = a @ (b.transpose(-1, -2) if transposed else b)
        if relative:
            product = product / a.sum(-1, keepdim=True)
        return product if factor is None else product * factor()

    return run


def _operand(source: Source, operation: Operation, position: int) -> tuple[Pair, npt.NDArray[np.float64]]:
    """Return what quantizes an operand, and what the product has yet to be multiplied by, for each head."""
    qparams = source.formats[operation.name, position]
    if not isinstance(qparams, UniformQParams) or len(qparams.scale) == 1:
        return pair(qparams, source.buffers), np.ones(1)
    scales = qparams.scales()
    divisor = source.buffers.add(f"{operation.name}_scales_{position}", torch.from_numpy(scales.astype(np.float32)))
    in_steps = pair(dataclasses.replace(qparams, scale=(1.0,)), source.buffers)
    return (lambda x: in_steps(x / divisor())), scales


def _layer(source: Source, operation: Operation, *, rows: bool = False) -> tuple[Pair, Buffer, Buffer]:
    """Return what quantizes a layer's input, its weight, with ``rows`` as a matrix (N, K), and its bias."""
    read, layer = (source.formats[operation.name, position] for position in (0, 1))
    assert isinstance(read, UniformQParams | CodebookQParams), operation.name
    assert isinstance(layer, UniformQParams), operation.name
    constants, buffers = source.graph.constants, source.buffers
    _, weight_name, bias_name = operation.inputs
    values = constants[weight_name]
    return (
        pair(read, buffers),
        weight(values.flatten(1) if rows else values, layer, weight_name, buffers),
        bias(constants[bias_name], read, layer, bias_name, buffers),
    )
