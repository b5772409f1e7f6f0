"""Sampled rows of a layer's input, evenly spread over images and tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from calibration.graph import Graph, Operation
from calibration.stream import Stream


def layer_rows(operation: Operation, x: Tensor, graph: Graph) -> Tensor:
    """Return the rows (R, K) that a layer multiplies with its weights (N, K): patches where it is a convolution.

    Args:
        operation: a linear, a convolution without groups, or a function of one value.
        x: float32 ``(batch, *shape)``, the layer's input.
        graph: holds the weights.
    """
    if operation.op != "conv2d":
        return x.reshape(-1, x.shape[-1])
    kernel = tuple(graph.constants[operation.inputs[1]].shape[2:])
    patches = functional.unfold(
        x, kernel, operation.integers("dilation"), operation.integers("padding"), operation.integers("stride")
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def sample_rows(stream: Stream, operation: Operation, limit: int) -> Tensor:
    """Return at most about ``limit`` rows of an operation's input, as many from each micro-batch.

    Args:
        stream: the run to sample.
        operation: a layer or a function of one value.
        limit: rows wanted.
    """
    share = max(1, limit // stream.batches)
    stride = max(1, stream.batches // limit)
    parts = []
    for batch in range(0, stream.batches, stride):
        rows = layer_rows(operation, stream.value(operation.inputs[0], batch), stream.graph)
        count = min(share, len(rows))
        # Evenly spaced, and never the same token of every image.
        picked = (torch.arange(count, dtype=torch.float64) * (len(rows) / count)).to(torch.int64)
        parts.append(rows[picked.to(rows.device)])
    return torch.cat(parts)
