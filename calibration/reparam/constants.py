"""What a rewrite may replace: constants that one operation alone reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from calibration.graph import Graph, Operation
from calibration.reparam.channels import describe
from quantizers.errors import UsageError


def why_not_owned(graph: Graph, operations: Iterable[Operation], positions: tuple[int, ...]) -> str | None:
    """Return why operands cannot be replaced, or None where each is a constant that nothing else reads."""
    consumers = graph.consumers()
    outputs = {value for _, value in graph.outputs}
    for operation in operations:
        for position in positions:
            name = operation.inputs[position]
            if name not in graph.constants or name in outputs:
                return f"{name}, an operand of {describe(operation)}, is not a constant of the graph alone"
            for reader, place in consumers[name]:
                if (reader.name, place) != (operation.name, position):
                    return f"constant {name} of {describe(operation)} is shared with {describe(reader)}"
    return None


def as_stored(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return float64 constants as float32.

    Raises:
        UsageError: a value is not finite in float32.
    """
    stored = {name: tensor.to(torch.float32) for name, tensor in values.items()}
    for name, tensor in stored.items():
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"the rewrite takes constant {name} out of float32's range; use a milder ratio or shift")
    return stored


def require_vector(name: str, vector: Tensor, channels: int) -> Tensor:
    """Return a vector of finite numbers as float64.

    Raises:
        UsageError: it has another shape, or a number is not finite.
    """
    if tuple(vector.shape) != (channels,):
        raise UsageError(
            f"{name}: expected one number for each of {channels} channels, got shape {tuple(vector.shape)}"
        )
    if not bool(vector.isfinite().all()):
        raise UsageError(f"{name}: a number is not finite")
    return vector.to(torch.float64)
