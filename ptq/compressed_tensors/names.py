"""Names of a checkpoint for the constants of a graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from calibration.graph import Graph
from quantizers.errors import UsageError

#: What tracing computed from parameters, or made up where a layer has no bias.
_COMPUTED = re.compile(r"[^.]+\.constant(\.\d+)?")
#: What a scale behind a layer was folded into.
_FOLDED = re.compile(r"(?P<name>.+)\.folded(\.\d+)?")


class CheckpointNames:
    """Says what each constant of a graph is called in the checkpoint that the graph was traced from.

    Args:
        graph: the graph.
        prefix: what stands before all names of the checkpoint, because its module was traced inside of another one.

    Raises:
        UsageError: a parameter has two values, because layers share it and only some have a scale behind them.

    Attributes:
        folded: paths of layers that have taken in the scale behind them.
        new_biases: paths of layers with a bias that is no parameter of the checkpoint.
    """

    def __init__(self, graph: Graph, prefix: str) -> None:
        self._names: dict[str, str] = {}
        self.folded: list[str] = []
        self.new_biases: list[str] = []
        layers = [operation for operation in graph.operations if operation.op in ("linear", "conv2d")]
        for constant in graph.constants:
            found = _FOLDED.fullmatch(constant)
            name = found["name"] if found else constant
            if not _COMPUTED.fullmatch(name):
                self._names[constant] = name.removeprefix(prefix)
        for layer in layers:
            weight, bias = (self._names.get(name) for name in layer.inputs[1:])
            if weight is None or not weight.endswith(".weight"):
                continue
            module = weight.removesuffix(".weight")
            if _FOLDED.fullmatch(layer.inputs[1]) and module not in self.folded:
                self.folded.append(module)
            # A bias that a rewrite or a correction made, or that the model computes, belongs to the layer all the same.
            if bias is None and bool(graph.constants[layer.inputs[2]].any()):
                self._names[layer.inputs[2]] = f"{module}.bias"
                self.new_biases.append(module)
        twice = sorted(name for name, count in Counter(self._names.values()).items() if count > 1)
        if twice:
            raise UsageError(
                f"{twice[0]} has two values in the quantized network, because layers share it and not all of them have "
                "a scale behind them; compressed-tensors has one tensor for each: export with '--format onnx' or 'pt2'"
            )

    def get(self, constant: str) -> str | None:
        """Return the name in the checkpoint, or None for what the checkpoint does not have."""
        return self._names.get(constant)

    def module(self, weight: str) -> str | None:
        """Return the path of the module whose ``weight`` a constant is, or None if it is no module's."""
        name = self.get(weight)
        return name.removesuffix(".weight") if name is not None and name.endswith(".weight") else None


def with_batch_axis(graph: Graph) -> Mapping[str, Tensor]:
    """Return the constants of a graph in the shapes that checkpoints have.

    Tables that are added to all tokens or stand before them (positions, class tokens) have a batch axis of 1 there.
    """
    constants = dict(graph.constants)
    for operation in graph.operations:
        if operation.op in ("add", "multiply", "concat"):
            for name in operation.inputs:
                if name in graph.constants and graph.constants[name].ndim == len(operation.shape):
                    constants[name] = graph.constants[name][None]
    return constants
