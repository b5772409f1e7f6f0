"""A ModelProto from what a builder collected: the frame that all exported files share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from ptq.onnx_export.builder import NodeBuilder
from ptq.version import tool_version

#: Gelu is one node from here on; from 23 on, attention may be, and leaves no place for its formats.
OPSET = 20
#: The oldest file format that has this opset, for the sake of older runtimes.
IR_VERSION = 9
#: The same for int4, and for scales of blocks.
INT4_OPSET, INT4_IR_VERSION = 21, 10


def assemble_model(
    builder: NodeBuilder,
    name: str,
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    documentation: str,
    metadata: Mapping[str, str],
) -> ModelProto:
    """Return the model; equal arguments give equal bytes.

    Args:
        builder: its nodes and initializers.
        name: of the graph.
        inputs: with a free batch axis.
        outputs: likewise.
        documentation: for people who open the file.
        metadata: becomes ``metadata_props``, sorted by key.
    """
    int4 = any(entry.data_type == TensorProto.INT4 for entry in builder.initializers)
    model = helper.make_model(
        helper.make_graph(builder.nodes, name, inputs, outputs, builder.initializers),
        opset_imports=[helper.make_opsetid("", INT4_OPSET if int4 else OPSET)],
        ir_version=INT4_IR_VERSION if int4 else IR_VERSION,
        producer_name="vit-ptq",
        producer_version=tool_version(),
        doc_string=documentation,
    )
    helper.set_model_props(model, {key: metadata[key] for key in sorted(metadata)})
    return model
