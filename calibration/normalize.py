"""Rewrites that leave the float result unchanged: fold what the previous layer can absorb, drop what nobody reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from calibration.graph import Graph, Operation


def normalize(graph: Graph) -> Graph:
    """Apply every pass in order; the order matters only in that unused operations go last."""
    for rewrite in PASSES:
        graph = rewrite(graph)
    return graph


def fold_channel_affine(graph: Graph) -> Graph:
    """Fold a per-channel multiply or add by a constant into the linear or convolution just before it.

    This is what BatchNorm and LayerScale are in inference. Folded only where the layer has no other reader.
    """
    constants = dict(graph.constants)
    readers = graph.consumers()
    producers: dict[str, Operation] = {}
    renamed: dict[str, str] = {}
    operations: list[Operation] = []
    kept = {value for _, value in graph.outputs}
    for original in graph.operations:
        operation = dataclasses.replace(original, inputs=tuple(renamed.get(name, name) for name in original.inputs))
        # A product or sum with a constant may be written either way round.
        value, constant = operation.inputs[0], operation.inputs[-1]
        if value in constants:
            value, constant = constant, value
        layer = producers.get(value)
        foldable = (
            operation.op in ("multiply", "add")
            and layer is not None
            and layer.op in ("linear", "conv2d")
            and constant in constants
            and len(readers[layer.name]) == 1
            and layer.name not in kept
            and operation.shape == layer.shape
        )
        vector = _channel_vector(constants[constant], layer) if foldable and layer is not None else None
        if vector is not None and layer is not None:
            weight, bias = (constants[name] for name in layer.inputs[1:])
            gain = vector if operation.op == "multiply" else torch.ones_like(vector)
            shift = vector if operation.op == "add" else torch.zeros_like(vector)
            names = tuple(_unused(constants, f"{name}.folded") for name in layer.inputs[1:])
            constants[names[0]] = weight * gain.reshape(-1, *(1,) * (weight.ndim - 1))
            constants[names[1]] = bias * gain + shift
            folded = dataclasses.replace(layer, inputs=(layer.inputs[0], *names))
            operations[operations.index(layer)] = folded
            producers[layer.name] = folded
            renamed[operation.name] = layer.name
            # The readers of what was folded away are now the readers of the layer.
            readers[layer.name] = readers.get(original.name, [])
            if original.name in kept:
                kept.add(layer.name)
            continue
        producers[operation.name] = operation
        operations.append(operation)
    outputs = tuple((name, renamed.get(value, value)) for name, value in graph.outputs)
    return Graph(graph.inputs, constants, tuple(operations), outputs)


def _unused(constants: Mapping[str, torch.Tensor], name: str) -> str:
    """Return a name that no constant has; a weight that several layers share is folded apart for each."""
    unique, index = name, 1
    while unique in constants:
        unique, index = f"{name}.{index}", index + 1
    return unique


def _channel_vector(constant: torch.Tensor, layer: Operation) -> torch.Tensor | None:
    """Return a constant as one number per output channel of a layer, or None if it is not that."""
    channels = layer.shape[-1] if layer.op == "linear" else layer.shape[0]
    axis = len(layer.shape) - 1 if layer.op == "linear" else 0
    extents = (1,) * (len(layer.shape) - constant.ndim) + tuple(constant.shape)
    if any(extent != 1 for index, extent in enumerate(extents) if index != axis):
        return None
    return constant.reshape(-1).expand(channels)


def remove_unused(graph: Graph) -> Graph:
    """Drop operations and constants that no output needs."""
    needed = {value for _, value in graph.outputs}
    operations: list[Operation] = []
    for operation in reversed(graph.operations):
        if operation.name in needed:
            operations.append(operation)
            needed.update(operation.inputs)
    constants = {name: tensor for name, tensor in graph.constants.items() if name in needed}
    return Graph(graph.inputs, constants, tuple(reversed(operations)), graph.outputs)


PASSES: tuple[Callable[[Graph], Graph], ...] = (fold_channel_affine, remove_unused)
