"""Collect the nodes and initializers of one ONNX graph, each under a name of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


class NodeBuilder:
    """Append nodes in execution order.

    Args:
        reserved: names that only an explicit ``output`` may take: the graph's inputs and outputs.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._taken = set(reserved)
        self._stored: dict[tuple[str, str, tuple[int, ...], bytes], str] = {}

    def fresh(self, hint: str) -> str:
        """Return and take a name: the hint, numbered where it is taken."""
        name, index = hint, 2
        while name in self._taken:
            name, index = f"{hint}_{index}", index + 1
        self._taken.add(name)
        return name

    def initializer(self, array: Array, hint: str) -> str:
        """Store an array and return its name; the same array under the same hint is stored once."""
        array = np.asarray(array, order="C")
        key = (hint, array.dtype.name, array.shape, array.tobytes())
        if key not in self._stored:
            name = self.fresh(hint)
            self.initializers.append(numpy_helper.from_array(array, name))
            self._stored[key] = name
        return self._stored[key]

    def int4(self, codes: Array, name: str) -> str:
        """Store codes from -8 to 7 in 4 bits each and return their name."""
        taken = self.fresh(name)
        self.initializers.append(helper.make_tensor(taken, TensorProto.INT4, codes.shape, codes.ravel().tolist()))
        return taken

    def integers(self, numbers: Sequence[int]) -> str:
        """Store extents, axes or indices as int64 and return their name; equal ones are stored once."""
        return self.initializer(np.array(numbers, np.int64), "integers_" + "_".join(map(str, numbers)))

    def node(self, kind: str, inputs: Sequence[str], output: str, module: str = "", **attributes: Any) -> str:
        """Append a node with one output, which also names the node, and return that name.

        Args:
            kind: ONNX operator of the default domain.
            inputs: names of inputs, initializers or earlier outputs.
            output: a name from :meth:`fresh`, or a reserved one.
            module: path of the module it came from; kept as the node's documentation.
            **attributes: of the operator.
        """
        node = helper.make_node(kind, list(inputs), [output], name=output, doc_string=module or None, **attributes)
        self.nodes.append(node)
        return output

    def prune(self, outputs: Iterable[str]) -> None:
        """Drop nodes and initializers that no output depends on."""
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = [entry for entry in self.initializers if entry.name in needed]
