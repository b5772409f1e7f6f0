"""The state of writing one graph: names of values, formats, and where nodes go."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calibration.calibrated import Calibrated
from calibration.graph import VIEWS, Operation
from calibration.sites import Structure
from ptq.onnx_export.builder import Array, NodeBuilder
from ptq.onnx_export.layout import Layout, formats_of
from ptq.onnx_export.quantization import Quantizer
from ptq.onnx_export.views import ViewWriter
from quantizers.uniform import UniformQParams


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A linear whose result is stored in steps of its codes.

    Args:
        scale: float64 (N,): the step of each channel, by which the scales of its weights are divided.
        qparams: of the codes, with scale 1.
    """

    scale: Array
    qparams: UniformQParams


class GraphWriter:
    """What the writers of the operators share; every tensor has the batch as its first axis.

    Views are written where something reads them: most move the codes of their values only.

    Args:
        calibrated: the graph and its formats.
        layout: of the runtime.
        builder: where nodes go.
        names: ONNX names of the graph's inputs, and of computed values that are outputs.
        int4: whether weights of at most 4 bits are stored as int4.
    """

    def __init__(
        self, calibrated: Calibrated, layout: Layout, builder: NodeBuilder, names: Mapping[str, str], int4: bool
    ) -> None:
        self.graph, self.layout, self.int4 = calibrated.graph, layout, int4
        self.formats = formats_of(calibrated, layout)
        self.structure = Structure(calibrated.graph)
        self.shapes = calibrated.graph.shapes()
        self.builder = builder
        self.quantizer = Quantizer(builder, unsigned=layout.unsigned)
        self.views = ViewWriter(builder)
        #: What :mod:`ptq.onnx_export.operands` has found and written.
        self.folds: dict[str, Fold | None] = {}
        self.carried: dict[Hashable, str] = {}
        self._row_widths: dict[str, tuple[int, ...]] = {}
        self._wanted = dict(names)
        self._written = {name: name for name, _ in calibrated.graph.inputs}

    def array(self, name: str) -> Array:
        """Return a constant of the graph, without a batch axis."""
        return self.graph.constants[name].numpy()

    def value(self, name: str) -> str:
        """Return the ONNX name of a value; a constant is stored with a batch axis of 1."""
        if name in self.graph.constants:
            return self.builder.initializer(self.array(name)[None], name)
        if name not in self._written:
            operation = self.structure.producers[name]
            assert operation.op in VIEWS, operation
            source = self.value(operation.inputs[0])
            self._written[name] = self.views.view(operation, source, self._name(operation))
        return self._written[name]

    def aligned(self, name: str, rank: int) -> str:
        """Return a value whose sample has ``rank`` axes, so that it broadcasts behind the batch axis."""
        shape = self.shapes[name]
        full = (1,) * (rank - len(shape)) + shape
        if name in self.graph.constants:
            return self.builder.initializer(self.array(name).reshape(1, *full), name)
        if full == shape:
            return self.value(name)
        return self.views.reshape(self.value(name), full, self.builder.fresh(f"{name}_aligned"), "")

    def step(self, operation: Operation, suffix: str, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node that an operation needs on the way; return the name of its result."""
        name = self.builder.fresh(f"{operation.name}_{suffix}")
        return self.builder.node(kind, inputs, name, operation.module, **attributes)

    def reshaped(self, operation: Operation, suffix: str, source: str, extents: Sequence[int]) -> str:
        """Append a Reshape as :meth:`step` does; the first axis is what the extents leave."""
        name = self.builder.fresh(f"{operation.name}_{suffix}")
        return self.views.reshape(source, extents, name, operation.module)

    def result(self, operation: Operation, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Append the node that gives an operation's result."""
        name = self._name(operation)
        self._written[operation.name] = self.builder.node(kind, inputs, name, operation.module, **attributes)

    def reshaped_result(self, operation: Operation, source: str) -> None:
        """Give an operation's result the shape it has in the graph."""
        self._written[operation.name] = self.views.reshape(
            source, operation.shape, self._name(operation), operation.module
        )

    def rows_result(self, operation: Operation, operands: Sequence[str]) -> str:
        """Append a Gemm with a weight (N, K), which gives rows (batch x tokens, N); return their name."""
        name = self.step(operation, "product", "Gemm", operands, transB=1)
        self._row_widths[name] = (operation.shape[-1] if operation.op == "linear" else operation.shape[0],)
        return name

    def extents(self) -> dict[str, tuple[int, ...]]:
        """Return the sample shapes of computed values by their ONNX names, and (N,) of rows."""
        written = {name: self.shapes[value] for value, name in self._written.items()}
        return {**written, **self._row_widths}

    def only_scaled(self, operation: Operation) -> Operation | None:
        """Return the scaling that alone reads an operation's result, or None."""
        readers = self.structure.consumers.get(operation.name, [])
        if len(readers) != 1 or readers[0][0].op != "scale" or operation.name in self._wanted:
            return None
        return readers[0][0]

    def is_written(self, name: str) -> bool:
        """Whether a value has its node."""
        return name in self._written

    def _name(self, operation: Operation) -> str:
        return self._wanted.get(operation.name) or self.builder.fresh(operation.name)
