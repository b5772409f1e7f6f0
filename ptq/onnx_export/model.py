"""Assemble an ONNX model from a calibrated graph."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from calibration.calibrated import Calibrated
from ptq.onnx_export.assemble import assemble_model
from ptq.onnx_export.builder import NodeBuilder
from ptq.onnx_export.layout import Layout
from ptq.onnx_export.operators import WRITERS
from ptq.onnx_export.rows import keep_rows
from ptq.onnx_export.writer import GraphWriter

_DOCUMENTATION = (
    "Quantized Vision Transformer. Inputs and outputs keep the names of the traced model; the first axis of "
    "each is the batch. Weights are named as in the checkpoint: <name>_quantized holds codes, <name>_scale their "
    "steps, one for each output channel. A node's documentation is the path of its module."
)


def build_model(
    calibrated: Calibrated, layout: Layout, metadata: Mapping[str, str], int4: bool, batch_size: int | None
) -> ModelProto:
    """Return the model; equal arguments give equal bytes.

    Args:
        calibrated: a graph with formats.
        layout: of the runtime.
        metadata: becomes ``metadata_props``, sorted by key.
        int4: whether weights of at most 4 bits are stored as int4.
        batch_size: the only one, or None for any.
    """
    graph, shapes = calibrated.graph, calibrated.graph.shapes()
    public = [name for name, _ in graph.inputs] + [name for name, _ in graph.outputs]
    builder = NodeBuilder(public)
    names = {name: name for name, _ in graph.inputs}
    computed = graph.producers()
    for name, value in graph.outputs:
        if value in computed:
            names.setdefault(value, name)
    writer = GraphWriter(calibrated, layout, builder, names, int4)
    for operation in graph.operations:
        WRITERS[operation.op](writer, operation)
    for name, value in graph.outputs:
        if writer.value(value) != name:
            builder.node("Identity", (writer.value(value),), name)
    if layout.rows:
        keep_rows(builder, writer.extents())
    builder.prune(name for name, _ in graph.outputs)
    return assemble_model(
        builder,
        "quantized",
        [_value_info(name, shape, batch_size) for name, shape in graph.inputs],
        [_value_info(name, shapes[value], batch_size) for name, value in graph.outputs],
        _DOCUMENTATION,
        metadata,
    )


def _value_info(name: str, shape: tuple[int, ...], batch_size: int | None) -> ValueInfoProto:
    batch: int | str = "batch" if batch_size is None else batch_size
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, (batch, *shape))
