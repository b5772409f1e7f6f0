"""The state of writing one graph: names of values, formats, and where nodes go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibration.calibrated import Calibrated
from calibration.graph import Operation
from ptq.onnx_export.builder import Array, NodeBuilder
from ptq.onnx_export.quantization import Quantizer


class GraphWriter:
    """What the writers of the operators share; every tensor has the batch as its first axis.

    Args:
        calibrated: the graph and its formats.
        builder: where nodes go.
        names: ONNX names of the graph's inputs, and of computed values that are outputs.
    """

    def __init__(self, calibrated: Calibrated, builder: NodeBuilder, names: Mapping[str, str]) -> None:
        self.graph = calibrated.graph
        self.formats = calibrated.by_edge()
        self.shapes = calibrated.graph.shapes()
        self.builder = builder
        self.quantizer = Quantizer(builder)
        self._names = dict(names)

    def array(self, name: str) -> Array:
        """Return a constant of the graph, without a batch axis."""
        return self.graph.constants[name].numpy()

    def value(self, name: str) -> str:
        """Return the ONNX name of a value; a constant is stored with a batch axis of 1."""
        if name in self.graph.constants:
            return self.builder.initializer(self.array(name)[None], name)
        return self._names[name]

    def aligned(self, name: str, rank: int) -> str:
        """Return a value whose sample has ``rank`` axes, so that it broadcasts behind the batch axis."""
        shape = self.shapes[name]
        full = (1,) * (rank - len(shape)) + shape
        if name in self.graph.constants:
            return self.builder.initializer(self.array(name).reshape(1, *full), name)
        if full == shape:
            return self.value(name)
        inputs = (self.value(name), self.builder.integers((0, *full)))
        return self.builder.node("Reshape", inputs, self.builder.fresh(f"{name}_aligned"))

    def step(self, operation: Operation, suffix: str, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node that an operation needs on the way; return the name of its result."""
        name = self.builder.fresh(f"{operation.name}_{suffix}")
        return self.builder.node(kind, inputs, name, operation.module, **attributes)

    def result(self, operation: Operation, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Append the node that gives an operation's result."""
        name = self._names.get(operation.name) or self.builder.fresh(operation.name)
        self._names[operation.name] = self.builder.node(kind, inputs, name, operation.module, **attributes)
