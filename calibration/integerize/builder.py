"""ProgramBuilder: append nodes with inferred types, share equal constants, cancel views that undo each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quantizers.integer.program import Attribute, IntegerProgram, Node, TensorType

Array = npt.NDArray[np.generic]


class ProgramBuilder:
    """Collects a program; :meth:`finish` returns it without the nodes that nothing reads."""

    def __init__(self, inputs: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        self._inputs = tuple((name, TensorType("float32", shape)) for name, shape in inputs)
        self._types = dict(self._inputs)
        self._constants: dict[str, Array] = {}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._nodes: dict[str, Node] = {}

    def type(self, name: str) -> TensorType:
        """Return the type of a value or constant."""
        return self._types[name]

    def array(self, name: str) -> Array | None:
        """Return the elements of a constant, or None for a value."""
        return self._constants.get(name)

    def constant(self, array: Array, label: str) -> str:
        """Add a constant, or return the equal one that is there; its name starts with ``label``."""
        stored = np.ascontiguousarray(array)
        key = (stored.dtype.name, tuple(stored.shape), stored.tobytes())
        if key not in self._shared:
            self._shared[key] = self._unique(label)
            self._constants[self._shared[key]] = stored
            self._types[self._shared[key]] = TensorType(stored.dtype.name, tuple(stored.shape))
        return self._shared[key]

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        kind: TensorType,
        label: str,
        source: str,
        /,
        **attributes: Attribute,
    ) -> str:
        """Append a node of a known result type; its name starts with ``label``."""
        name = self._unique(label)
        self._nodes[name] = Node(name, op, tuple(inputs), attributes, kind, source)
        self._types[name] = kind
        return name

    def reshape(self, x: str, shape: tuple[int, ...], source: str) -> str:
        """Reshape; a reshape of a reshape is one, and a reshape to the same shape is none."""
        producer = self._nodes.get(x)
        if producer is not None and producer.op == "reshape":
            x = producer.inputs[0]
        kind = self._types[x]
        if kind.shape == shape:
            return x
        return self.node("reshape", (x,), TensorType(kind.dtype, shape), f"{x}.reshape", source, shape=shape)

    def permute(self, x: str, axes: tuple[int, ...], source: str) -> str:
        """Permute; two permutes in a row are one, and one that keeps the order is none."""
        producer = self._nodes.get(x)
        if producer is not None and producer.op == "permute":
            inner = producer.integers("axes")
            axes, x = tuple(inner[axis] for axis in axes), producer.inputs[0]
        if axes == tuple(range(len(axes))):
            return x
        kind = self._types[x]
        shape = tuple(kind.shape[axis] for axis in axes)
        # Moving axes of extent 1 moves no element.
        if [axis for axis in axes if kind.shape[axis] > 1] == sorted(axis for axis in axes if kind.shape[axis] > 1):
            return self.reshape(x, shape, source)
        return self.node("permute", (x,), TensorType(kind.dtype, shape), f"{x}.permute", source, axes=axes)

    def slice(self, x: str, axis: int, start: int, stop: int, step: int, source: str) -> str:
        """Take part of an axis."""
        kind = self._types[x]
        extent = math.ceil((stop - start) / step)
        shape = (*kind.shape[:axis], extent, *kind.shape[axis + 1 :])
        return self.node(
            "slice",
            (x,),
            TensorType(kind.dtype, shape),
            f"{x}.slice",
            source,
            axis=axis,
            start=start,
            stop=stop,
            step=step,
        )

    def concat(self, parts: Sequence[str], axis: int, label: str, source: str) -> str:
        """Join values and constants along an axis."""
        kinds = [self._types[part] for part in parts]
        extent = sum(kind.shape[axis] for kind in kinds)
        shape = (*kinds[0].shape[:axis], extent, *kinds[0].shape[axis + 1 :])
        return self.node("concat", parts, TensorType(kinds[0].dtype, shape), label, source, axis=axis)

    def finish(self, outputs: Sequence[tuple[str, str]]) -> IntegerProgram:
        """Return the program with only what the outputs need."""
        needed = {value for _, value in outputs}
        for node in reversed(self._nodes.values()):
            if node.name in needed:
                needed.update(node.inputs)
        nodes = tuple(node for node in self._nodes.values() if node.name in needed)
        constants = {name: array for name, array in sorted(self._constants.items()) if name in needed}
        return IntegerProgram(self._inputs, constants, nodes, tuple(outputs))

    def _unique(self, label: str) -> str:
        name, index = label, 2
        while name in self._types:
            name, index = f"{label}.{index}", index + 1
        return name
