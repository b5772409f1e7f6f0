"""Queries, keys and values of a fused projection: channels first, then heads, whatever way the model goes.

Models cut them out in many ways, such as one transposition of five axes before the cut. Runtimes move codes faster if
the channels are cut out first and four axes are turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from calibration.graph import VIEWS
from calibration.integerize.scales import viewed
from calibration.sites import Structure
from ptq.onnx_export.writer import GraphWriter


@dataclass(frozen=True, slots=True)
class Heads:
    """Channels of a linear's result, head by head.

    Args:
        layer: name of the linear, whose result is (..., rows, channels).
        start: first channel.
        shape: (..., rows, heads, depth): of the channels before rows and heads are swapped.
    """

    layer: str
    start: int
    shape: tuple[int, ...]


def find_heads(structure: Structure, value: str) -> Heads | None:
    """Return the heads (..., heads, rows, depth) that a value holds, or None where it is something else."""
    views = []
    operation = structure.producers.get(value)
    while operation is not None and (operation.op in VIEWS or operation.op == "scale"):
        views.append(operation)
        operation = structure.producers.get(operation.inputs[0])
    if operation is None or operation.op != "linear" or not views:
        return None
    places = np.arange(math.prod(operation.shape)).reshape(operation.shape)
    found = places
    for view in reversed(views):
        if view.op in VIEWS:
            found = viewed(view, found)
    if found.ndim != places.ndim + 1:
        return None
    *lead, heads, rows, depth = found.shape
    start = int(found.flat[0])
    if (*lead, rows) != operation.shape[:-1] or start + heads * depth > operation.shape[-1]:
        return None
    channels = places[..., start : start + heads * depth].reshape(*lead, rows, heads, depth)
    if not np.array_equal(found, channels.swapaxes(-2, -3)):
        return None
    return Heads(operation.name, start, channels.shape)


def write_heads(writer: GraphWriter, heads: Heads, source: str, output: str, module: str) -> str:
    """Append the nodes that cut heads out of a layer's result; return the name of theirs."""
    builder, axes = writer.builder, len(heads.shape) + 1
    stop = heads.start + math.prod(heads.shape[-2:])
    # Behind the batch: the channels are the last axis before they are cut into heads.
    numbers = [builder.integers((number,)) for number in (heads.start, stop, axes - 2, 1)]
    name = builder.fresh(output)
    cut = builder.node("Slice", (source, *numbers), builder.fresh(f"{name}_channels"), module)
    cut = writer.views.reshape(cut, heads.shape, builder.fresh(f"{name}_heads"), module)
    perm = (*range(axes - 3), axes - 2, axes - 3, axes - 1)
    return builder.node("Transpose", (cut,), name, module, perm=perm)
