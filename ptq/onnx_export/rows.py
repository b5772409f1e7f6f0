"""Keep what lies between two linears on rows: (batch x tokens, channels) from one Gemm to the next.

A Gemm reads and gives rows, and everything else of a graph has its batch axis. What works on each value or each row
gives the same on rows, so that the Reshapes around it go: ONNX Runtime runs each of them as a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto, TensorProto, numpy_helper

from ptq.onnx_export.builder import NodeBuilder

#: Operators that look at each value, or at each row, of their first input.
_UNARY = frozenset(
    {
        *("Gelu", "Relu", "Clip", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid"),
        *("LayerNormalization", "QuantizeLinear", "DequantizeLinear"),
    }
)
_BINARY = frozenset({"Add", "Mul"})


def keep_rows(builder: NodeBuilder, extents: Mapping[str, tuple[int, ...]]) -> None:
    """Rewrite the nodes of a builder.

    Args:
        builder: its nodes; what nothing reads any more is left to :meth:`NodeBuilder.prune`.
        extents: sample shape of graph values by their ONNX names, and (N,) of the rows that Gemms give.
    """
    nodes, builder.nodes = builder.nodes, []
    rewriting = _Rewriting(builder, dict(extents))
    for node in nodes:
        rewriting.add(node)


class _Rewriting:
    def __init__(self, builder: NodeBuilder, extents: dict[str, tuple[int, ...]]) -> None:
        self._builder, self._extents = builder, extents
        self._numbers = {
            entry.name: tuple(numpy_helper.to_array(entry).tolist())
            for entry in builder.initializers
            if entry.data_type == TensorProto.INT64
        }
        #: Of a tensor with a batch axis, the same values as rows; of rows that were made again, the first ones.
        self._rows: dict[str, str] = {}
        self._same: dict[str, str] = {}

    def add(self, node: NodeProto) -> None:
        for index, name in enumerate(node.input):
            node.input[index] = self._same.get(name, name)
        if node.op_type == "Reshape" and node.input[1] in self._numbers:
            self._add_reshape(node)
        elif node.op_type in _UNARY and node.input[0] in self._rows and self._is_whole(node):
            self._on_rows(node, 1)
        elif node.op_type in _BINARY and self._meet(*node.input):
            self._on_rows(node, 2)
        else:
            self._builder.nodes.append(node)

    def _is_whole(self, node: NodeProto) -> bool:
        # A LayerNorm of several axes does not work on rows.
        axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        return node.op_type != "LayerNormalization" or axes == [-1]

    def _add_reshape(self, node: NodeProto) -> None:
        (first, *shape), source, result = self._numbers[node.input[1]], node.input[0], node.output[0]
        known = self._extents.get(source)
        if first == -1 and known is not None and shape and shape[-1] == known[-1]:
            if len(shape) == 1 and source in self._rows:
                self._same[result] = self._rows[source]
                return
            if len(shape) == 1:
                self._rows[source] = result
            elif len(known) == 1:
                self._rows[result] = source
            self._extents[result] = tuple(shape)
        self._builder.nodes.append(node)

    def _meet(self, left: str, right: str) -> bool:
        """Whether both operands have one shape, one of them as rows; the other one is given rows."""
        shapes = self._extents.get(left), self._extents.get(right)
        if shapes[0] is None or shapes[0] != shapes[1] or not {left, right} & self._rows.keys():
            return False
        for name in (left, right):
            if name not in self._rows:
                rows = self._builder.fresh(f"{name}_rows")
                self._builder.node("Reshape", (name, self._builder.integers((-1, shapes[0][-1]))), rows)
                self._rows[name], self._extents[rows] = rows, (shapes[0][-1],)
        return True

    def _on_rows(self, node: NodeProto, operands: int) -> None:
        """Append a node that reads rows, and what gives its result the batch axis back."""
        shape, result = self._extents[node.input[0]], node.output[0]
        for index in range(operands):
            node.input[index] = self._rows[node.input[index]]
        rows = self._builder.fresh(f"{result}_rows")
        node.output[0] = node.name = rows
        self._builder.nodes.append(node)
        self._builder.node("Reshape", (rows, self._builder.integers((-1, *shape))), result, node.doc_string)
        self._rows[result], self._extents[rows], self._extents[result] = rows, (shape[-1],), shape
