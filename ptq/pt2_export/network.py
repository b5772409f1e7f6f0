"""A calibrated graph as an nn.Module whose export has the standard quantize and dequantize operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.calibrated import Calibrated
from calibration.graph import EXECUTORS, Graph, Operation
from ptq.pt2_export.buffers import Buffer, Buffers
from ptq.pt2_export.products import Source, Step, conv2d, linear, matmul

#: Under this key nodes of an export say which module of the traced model they came from.
MODULE = "module"
#: How many operands of an operator are activations, where the others are its own constants.
_ACTIVATIONS: Mapping[str, int] = MappingProxyType({"linear": 1, "conv2d": 1, "layer_norm": 1})


class QuantizedNetwork(nn.Module):
    """Runs a graph with quantized operands of products.

    Args:
        calibrated: a graph with formats, none of them published.
    """

    def __init__(self, calibrated: Calibrated) -> None:
        super().__init__()
        graph = calibrated.graph
        source = Source(graph, calibrated.by_edge(), Buffers(self, graph.constants))
        self._inputs = [name for name, _ in graph.inputs]
        self._outputs = [value for _, value in graph.outputs]
        # Operands that are constants stand with a batch axis of 1, those of layers without one.
        self._constants: dict[str, Buffer] = {}
        self._steps: list[tuple[Operation, Step]] = []
        for operation in graph.operations:
            self._steps.append((operation, STEPS[operation.op](source, operation)))
            for name in operation.inputs[: _ACTIVATIONS.get(operation.op)]:
                if name in graph.constants:
                    self._constants[name] = source.buffers.add(name, graph.constants[name][None])

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the network.

        Args:
            inputs: float32 ``(batch, *shape)`` for each input of the graph.

        Returns:
            float32 ``(batch, *shape)``; a tuple where the graph has several outputs.
        """
        values = dict(zip(self._inputs, inputs, strict=True))
        for operation, step in self._steps:
            names = operation.inputs[: _ACTIVATIONS.get(operation.op)]
            operands = [values[name] if name in values else self._constants[name]() for name in names]
            with torch.fx.traceback.annotate({MODULE: operation.module}):
                values[operation.name] = step(*operands)
        results = tuple(values[name] for name in self._outputs)
        return results[0] if len(results) == 1 else results


def _layer_norm(source: Source, operation: Operation) -> Step:
    weight, bias = (source.buffers.add(name, source.graph.constants[name]) for name in operation.inputs[1:])
    epsilon = operation.real("eps")

    def run(x: Tensor) -> Tensor:
        gain = weight()
        return functional.layer_norm(x, gain.shape, gain, bias(), epsilon)

    return run


def _concat(source: Source, operation: Operation) -> Step:
    varying = reached_by_inputs(source.graph)
    repeated = [name not in varying for name in operation.inputs]
    axis = operation.integer("axis") + 1

    def run(*parts: Tensor) -> Tensor:
        if any(repeated) and not all(repeated):
            # torch.cat does not broadcast: a class token is repeated for each sample of the batch.
            batch = parts[repeated.index(False)].shape[0]
            parts = tuple(
                part.expand(batch, *part.shape[1:]) if again else part
                for part, again in zip(parts, repeated, strict=True)
            )
        return torch.cat(parts, axis)

    return run


def reached_by_inputs(graph: Graph) -> frozenset[str]:
    """Return the values that depend on an input, whose first axis is the batch."""
    reached = {name for name, _ in graph.inputs}
    for operation in graph.operations:
        if reached.intersection(operation.inputs):
            reached.add(operation.name)
    return frozenset(reached)


def _float(_source: Source, operation: Operation) -> Step:
    executor = EXECUTORS[operation.op]
    return lambda *operands: executor(operation, *operands)


#: By the operators of :mod:`calibration.graph`.
STEPS: Mapping[str, Callable[[Source, Operation], Step]] = MappingProxyType(
    {
        **dict.fromkeys(EXECUTORS, _float),
        "linear": linear,
        "conv2d": conv2d,
        "matmul": matmul,
        "layer_norm": _layer_norm,
        "concat": _concat,
    }
)
