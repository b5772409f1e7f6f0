"""The integer program itself as ONNX: the interpreter's bits in any runtime that keeps to the standard.

Every operator between ``quantize`` and ``dequantize`` becomes integer operators of the default domain at opset 20:
MatMulInteger on uint8 operands, Gather for tables, int64 additions, products, divisions and shifts where the program
rescales. No operator is fused and none approximated: this file proves the arithmetic in a runtime that we did not
write. For speed take the QDQ file (:mod:`ptq.onnx_export`) or a compiled bundle.

Images with infinite values or NaN, which the interpreter refuses, have undefined results: ONNX cannot refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto, ValueInfoProto, helper

from ptq.onnx_export.assemble import assemble_model
from ptq.onnx_export.builder import NodeBuilder
from ptq.onnx_export.files import write_model
from ptq.onnx_integer.operators import WRITERS
from ptq.onnx_integer.writer import ELEMENT_TYPES, ProgramWriter
from quantizers.integer.program import IntegerProgram, TensorType

_DOCUMENTATION = (
    "Integer program of a quantized Vision Transformer in standard operators, equal to its reference interpreter in "
    "every bit. The first axis of each input and output is the batch. A node is named after the program's node that "
    "it computes a part of; its documentation is the path of the module."
)


def build_integer_model(program: IntegerProgram, metadata: Mapping[str, str]) -> ModelProto:
    """Return the model; equal arguments give equal bytes.

    Args:
        program: a verified program.
        metadata: becomes ``metadata_props``, sorted by key.
    """
    types, computed = program.types(), {node.name for node in program.nodes}
    builder = NodeBuilder([name for name, _ in program.inputs] + [name for name, _ in program.outputs])
    names = {name: name for name, _ in program.inputs}
    for name, value in program.outputs:
        if value in computed:
            names.setdefault(value, name)
    writer = ProgramWriter(program, builder, names)
    for node in program.nodes:
        writer.begin(node)
        writer.finish(WRITERS[node.op](writer, node))
    for name, value in program.outputs:
        if writer.value(value) != name:
            builder.node("Identity", (writer.value(value),), name)
    return assemble_model(
        builder,
        "integer_program",
        [_value_info(name, kind) for name, kind in program.inputs],
        [_value_info(name, types[value]) for name, value in program.outputs],
        _DOCUMENTATION,
        metadata,
    )


def export_onnx_integer(program: IntegerProgram, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the program as an ONNX file; the same arguments write the same bytes.

    Args:
        program: any program that the verifier accepts.
        path: the file; its directory is made if absent.
        metadata: texts that the file carries as ``metadata_props``.

    Raises:
        UsageError: the path exists.
    """
    write_model(lambda: build_integer_model(program, metadata), path)


def _value_info(name: str, kind: TensorType) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[kind.dtype], ("batch", *kind.shape))


__all__ = ["build_integer_model", "export_onnx_integer"]
