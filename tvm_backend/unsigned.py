"""Activations as unsigned codes, for processors whose dot product reads its left operand unsigned.

A value of int8 codes that only linears multiply is computed 128 larger, as uint8, and the bias of each of those
linears makes up for it. Whoever computes the value adds another zero point, which costs nothing, and no linear
has to convert its input. The rewritten program gives the same results.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from quantizers.integer.program import INTEGER_RANGES, Attribute, IntegerProgram, Node, TensorType
from tvm_backend.kernels.kernel import Array
from tvm_backend.strides import VIEWS

_OFFSET = 128
#: Operators that add a zero point of their own as the last thing they do.
_SATURATING = ("requantize", "add", "layer_norm", "normalize_rows")


def unsigned_activations(program: IntegerProgram) -> IntegerProgram:
    """Return an equal program in which linears read uint8 codes wherever that is possible."""
    return _Rewriter(program).run()


class _Rewriter:
    def __init__(self, program: IntegerProgram) -> None:
        self._program = program
        self._readers: dict[str, list[Node]] = defaultdict(list)
        for node in program.nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers[name].append(node)
        self._results = {value for _, value in program.outputs}
        self._constants = dict(program.constants)

    def run(self) -> IntegerProgram:
        nodes = {node.name: node for node in self._program.nodes}
        for node in self._program.nodes:
            follow = self._followers(node)
            if follow is None:
                continue
            nodes[node.name] = self._unsigned(node)
            for reader in follow:
                nodes[reader.name] = self._reading(nodes[reader.name])
        return replace(self._program, nodes=tuple(nodes.values()), constants=self._constants)

    def _followers(self, node: Node) -> list[Node] | None:
        """Return the views and linears that read a value, or None if it has to stay as it is."""
        tables = node.op == "lookup" and node.type.dtype == "int8"
        if node.type.dtype != "int8" or not (tables or node.op in _SATURATING):
            return None
        found: list[Node] = []
        pending = [node]
        while pending:
            current = pending.pop()
            readers = self._readers[current.name]
            if current.name in self._results or not readers:
                return None
            for reader in readers:
                if reader.op in VIEWS:
                    pending.append(reader)
                elif reader.op != "linear" or not self._fits(reader):
                    return None
                found.append(reader)
        return found

    def _new_bias(self, linear: Node) -> Array:
        weight, bias = (self._program.constants[name].astype(np.int64) for name in linear.inputs[1:])
        return bias - _OFFSET * weight.sum(1)

    def _fits(self, linear: Node) -> bool:
        weight = np.abs(self._program.constants[linear.inputs[1]].astype(np.int64)).sum(1)
        reach = weight * INTEGER_RANGES["uint8"][1] + np.abs(self._new_bias(linear))
        return int(reach.max()) <= INTEGER_RANGES["int32"][1]

    def _constant(self, name: str, array: Array) -> str:
        label = f"{name}.unsigned"
        while label in self._constants and not np.array_equal(self._constants[label], array):
            label += "'"
        self._constants[label] = array
        return label

    def _unsigned(self, node: Node) -> Node:
        kind = TensorType("uint8", node.type.shape)
        if node.op == "lookup":
            table = (self._program.constants[node.inputs[1]].astype(np.int16) + _OFFSET).astype(np.uint8)
            return replace(node, type=kind, inputs=(node.inputs[0], self._constant(node.inputs[1], table)))
        moved: dict[str, Attribute] = {key: node.integer(key) + _OFFSET for key in ("zero_point", "qmin", "qmax")}
        return replace(node, type=kind, attributes={**node.attributes, **moved})

    def _reading(self, node: Node) -> Node:
        if node.op in VIEWS:
            return replace(node, type=TensorType("uint8", node.type.shape))
        bias = self._new_bias(node).astype(np.int32)
        return replace(node, inputs=(*node.inputs[:2], self._constant(f"{node.name}.bias", bias)))
