"""What the tests of rewrites share: a graph with new constants, and how far its outputs moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from calibration.graph import Graph, execute


def replaced(graph: Graph, changed: Mapping[str, Tensor]) -> Graph:
    """Return a graph with new values of constants that it has; their shapes and types must stay."""
    for name, tensor in changed.items():
        assert tensor.shape == graph.constants[name].shape, name
        assert tensor.dtype == torch.float32, name
    return dataclasses.replace(graph, constants={**graph.constants, **changed})


def moved(before: Graph, after: Graph, x: Tensor) -> float:
    """Return the largest difference of any output, relative to that output's largest value."""
    pairs = zip(execute(before, (x,)), execute(after, (x,)), strict=True)
    return max(float((new - old).abs().max() / old.abs().max()) for old, new in pairs)


def value_of(graph: Graph, name: str, x: Tensor) -> Tensor:
    """Return a computed value (batch, *shape) that some operation reads."""
    seen: dict[str, Tensor] = {}

    def keep(operation: object, position: int, operand: Tensor) -> Tensor:
        seen.setdefault(operation.inputs[position], operand)  # type: ignore[attr-defined]
        return operand

    execute(graph, (x,), keep)
    return seen[name]
