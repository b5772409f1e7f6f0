"""Find the sites of a graph: the tensor edges that get a number format, by structure and never by name.

A *transparent* operator (view, concat, scaling by a number) commutes with quantization, so a site belongs to
what lies behind it. An *accumulator* (the int32 result of a product or sum) is read by residual adds and by
outputs as it is, without a format of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from calibration.graph import VIEWS, Graph, Operation

#: Edge of a graph output: (OUTPUT, index).
OUTPUT = "@output"
Edge = tuple[str, int]

#: Every kind of site, and what stands there.
SITE_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "image": "the network's input",
        "weight": "weight of a linear or convolution",
        "linear_input": "input of a linear or convolution",
        "activation_output": "input of a linear or convolution that GELU or another elementwise function makes",
        "query": "queries of an attention product",
        "key": "keys of an attention product",
        "scores": "input of a softmax",
        "probability": "output of a softmax, as the left side of the product with the values",
        "value": "values of an attention product",
        "matmul_left": "left side of another product of two activations",
        "matmul_right": "right side of another product of two activations",
        "activation_input": "input of GELU or another elementwise function",
        "multiply_input": "factor of an elementwise product",
        "residual": "the residual stream: input of LayerNorm, of a residual add, of a mean",
        "constant": "a table that is added, such as positions",
        "output": "a result of the network that is not an accumulator",
    }
)

_ACCUMULATORS = frozenset({"linear", "conv2d", "matmul", "multiply", "mean"})


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor and the edges on which it is read in one format.

    Args:
        name: unique; module path and role, for example ``blocks.0.attn.qkv.input``.
        kind: a key of :data:`SITE_KINDS`.
        value: graph value that is quantized.
        edges: (operation, operand position) of every reader in this format.
    """

    name: str
    kind: str
    value: str
    edges: tuple[Edge, ...]


class Structure:
    """Answers questions on a graph's structure; built once for each graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.inputs = {name for name, _ in graph.inputs}

    def root(self, value: str) -> Operation | None:
        """Return the operation behind views and scalings, or None for inputs and constants."""
        operation = self.producers.get(value)
        while operation is not None and (operation.op in VIEWS or operation.op == "scale"):
            operation = self.producers.get(operation.inputs[0])
        return operation

    def source(self, value: str) -> str:
        """Return the value behind views."""
        operation = self.producers.get(value)
        while operation is not None and operation.op in VIEWS:
            value = operation.inputs[0]
            operation = self.producers.get(value)
        return value

    def whole(self, value: str) -> str:
        """Return the value behind reshapes and permutes, which keep all elements."""
        operation = self.producers.get(value)
        while operation is not None and operation.op in ("reshape", "permute"):
            value = operation.inputs[0]
            operation = self.producers.get(value)
        return value

    def is_row_relative(self, matmul: Operation) -> bool:
        """Whether a product reads a softmax directly on its left and divides after the sum."""
        left = self.producers.get(matmul.inputs[0])
        return matmul.op == "matmul" and left is not None and left.op == "softmax"

    def is_accumulator(self, value: str) -> bool:
        """Whether a value is an int32 sum, possibly viewed or scaled, that needs no format to be added."""
        root = self.root(value)
        return root is not None and root.op in _ACCUMULATORS and not self.is_row_relative(root)

    def feeds_softmax(self, value: str) -> bool:
        """Whether a product's result reaches a softmax through views, scaling and added constants."""
        for reader, _ in self.consumers.get(value, []):
            if reader.op == "softmax":
                return True
            if reader.op in VIEWS or reader.op in ("scale", "add"):
                if reader.op == "add" and not any(name in self.graph.constants for name in reader.inputs):
                    continue
                if self.feeds_softmax(reader.name):
                    return True
        return False


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Return all sites in execution order; the weight of a layer follows its input."""
    structure = Structure(graph)
    groups: dict[tuple[str, str], tuple[str, str, list[Edge]]] = {}
    for operation in graph.operations:
        for position, value in enumerate(operation.inputs):
            found = _classify(structure, operation, position)
            if found is not None:
                kind, role = found
                _join(groups, structure, kind, _qualified(operation, role), value, (operation.name, position))
    for index, (name, value) in enumerate(graph.outputs):
        if not structure.is_accumulator(value):
            _join(groups, structure, "output", name, value, (OUTPUT, index))
    taken: set[str] = set()
    sites = []
    for (_, kind), (name, value, edges) in groups.items():
        unique, index = name, 2
        while unique in taken:
            unique, index = f"{name}.{index}", index + 1
        taken.add(unique)
        sites.append(Site(unique, kind, value, tuple(edges)))
    return tuple(sites)


def _join(
    groups: dict[tuple[str, str], tuple[str, str, list[Edge]]],
    structure: Structure,
    kind: str,
    name: str,
    value: str,
    edge: Edge,
) -> None:
    key = (value if value in structure.graph.constants else structure.whole(value), kind)
    # A table that is added in several places is one tensor; its own name says more than the reader's.
    label = value if value in structure.graph.constants else name
    groups.setdefault(key, (label, value, []))[2].append(edge)


def _qualified(operation: Operation, role: str) -> str:
    return f"{operation.module}.{role}" if operation.module else role


def _classify(structure: Structure, operation: Operation, position: int) -> tuple[str, str] | None:
    """Return the kind and the role of an operand, or None where it needs no format."""
    value = operation.inputs[position]
    match operation.op:
        case "linear" | "conv2d":
            if position == 0:
                # An image may be scaled inside the model; nothing else has no operation behind it.
                return _layer_input(structure, value), "input"
            return ("weight", "weight") if position == 1 else None
        case "matmul":
            return _matmul_operand(structure, operation, position)
        case "softmax":
            return "scores", "scores"
        case "unary":
            return "activation_input", "input"
        case "layer_norm":
            return ("residual", "input") if position == 0 else None
        case "mean":
            return "residual", "input"
        case "multiply":
            return (
                ("constant", "factor")
                if value in structure.graph.constants
                else ("multiply_input", f"factor_{position}")
            )
        case "add":
            if value in structure.graph.constants:
                return "constant", "constant"
            return None if structure.is_accumulator(value) else ("residual", "residual")
    return None


def _layer_input(structure: Structure, value: str) -> str:
    root = structure.root(value)
    if root is None:
        return "image"
    return "activation_output" if root.op == "unary" else "linear_input"


def _matmul_operand(structure: Structure, operation: Operation, position: int) -> tuple[str, str]:
    if structure.is_row_relative(operation):
        return ("probability", "probability") if position == 0 else ("value", "value")
    if structure.feeds_softmax(operation.name):
        return ("query", "query") if position == 0 else ("key", "key")
    return ("matmul_left", "left") if position == 0 else ("matmul_right", "right")
