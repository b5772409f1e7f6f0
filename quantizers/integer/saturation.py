"""The end of every rescaling operator of the interpreter: add half, shift, add the zero point, clip."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.integer.program import Node

DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
}


def saturate(value: Tensor, node: Node) -> Tensor:
    """Add the node's zero point to an int64 tensor, clip, and convert to the node's element type."""
    shifted = value + node.integer("zero_point")
    return shifted.clamp(node.integer("qmin"), node.integer("qmax")).to(DTYPES[node.type.dtype])


def shift_round(value: Tensor, node: Node) -> Tensor:
    """Return ``(value + 2^(shift-1)) >> shift`` of an int64 tensor."""
    shift = node.integer("shift")
    return (value + (1 << (shift - 1))) >> shift
