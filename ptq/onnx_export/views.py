"""Views as ONNX nodes: what only moves elements, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.graph import Operation
from ptq.onnx_export.builder import NodeBuilder


class ViewWriter:
    """Writes views; a Reshape of a Reshape reads what the first one reads.

    Args:
        builder: where nodes go.
    """

    def __init__(self, builder: NodeBuilder) -> None:
        self._builder = builder
        self._whole: dict[str, str] = {}

    def view(self, operation: Operation, source: str, output: str) -> str:
        """Append a view's node, on values or on codes; return the name of its result."""
        match operation.op:
            case "reshape":
                return self.reshape(source, operation.integers("shape"), output, operation.module)
            case "permute":
                perm = (0, *(axis + 1 for axis in operation.integers("axes")))
                return self._builder.node("Transpose", (source,), output, operation.module, perm=perm)
        start, stop, axis, step = (operation.integer(key) for key in ("start", "stop", "axis", "step"))
        numbers = tuple(self._builder.integers((number,)) for number in (start, stop, axis + 1, step))
        return self._builder.node("Slice", (source, *numbers), output, operation.module)

    def reshape(self, source: str, extents: Sequence[int], output: str, module: str) -> str:
        """Append a Reshape to the given extents behind a first axis of what is left: the batch, or all rows of it."""
        source = self._whole.get(source, source)
        self._whole[output] = source
        return self._builder.node("Reshape", (source, self._builder.integers((-1, *extents))), output, module)
