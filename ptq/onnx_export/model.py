"""Assemble an ONNX model from a calibrated graph."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from calibration.calibrated import Calibrated
from ptq.onnx_export.assemble import assemble_model
from ptq.onnx_export.builder import NodeBuilder
from ptq.onnx_export.operators import WRITERS
from ptq.onnx_export.writer import GraphWriter

_DOCUMENTATION = (
    "Quantized Vision Transformer. Inputs and outputs keep the names of the traced model; the first axis of "
    "each is the batch. Weights are named as in the checkpoint: <name>_quantized holds codes, <name>_scale their "
    "steps, one for each output channel. A node's documentation is the path of its module."
)


def build_model(calibrated: Calibrated, metadata: Mapping[str, str]) -> ModelProto:
    """Return the model; equal arguments give equal bytes.

    Args:
        calibrated: a graph with formats.
        metadata: becomes ``metadata_props``, sorted by key.
    """
    graph, shapes = calibrated.graph, calibrated.graph.shapes()
    public = [name for name, _ in graph.inputs] + [name for name, _ in graph.outputs]
    builder = NodeBuilder(public)
    names = {name: name for name, _ in graph.inputs}
    computed = graph.producers()
    for name, value in graph.outputs:
        if value in computed:
            names.setdefault(value, name)
    writer = GraphWriter(calibrated, builder, names)
    for operation in graph.operations:
        WRITERS[operation.op](writer, operation)
    for name, value in graph.outputs:
        if writer.value(value) != name:
            builder.node("Identity", (writer.value(value),), name)
    return assemble_model(
        builder,
        "quantized",
        [_value_info(name, shape) for name, shape in graph.inputs],
        [_value_info(name, shapes[value]) for name, value in graph.outputs],
        _DOCUMENTATION,
        metadata,
    )


def _value_info(name: str, shape: tuple[int, ...]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", *shape))
