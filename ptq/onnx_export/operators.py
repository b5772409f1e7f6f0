"""How each operator of a graph is written in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from calibration.graph import VIEWS, Operation
from ptq.onnx_export.products import write_conv2d, write_linear, write_matmul
from ptq.onnx_export.writer import GraphWriter

Writer = Callable[[GraphWriter, Operation], None]


def _layer_norm(writer: GraphWriter, operation: Operation) -> None:
    x, weight, bias = operation.inputs
    constants = [writer.builder.initializer(writer.array(name), name) for name in (weight, bias)]
    axis = -len(writer.shapes[weight])
    inputs = (writer.value(x), *constants)
    writer.result(operation, "LayerNormalization", inputs, axis=axis, epsilon=operation.real("eps"))


def _softmax(writer: GraphWriter, operation: Operation) -> None:
    writer.result(operation, "Softmax", (writer.value(operation.inputs[0]),), axis=-1)


def _unary(writer: GraphWriter, operation: Operation) -> None:
    UNARY_WRITERS[str(operation.attributes["function"])](writer, operation)


def _one_node(kind: str, **attributes: Any) -> Writer:
    def write(writer: GraphWriter, operation: Operation) -> None:
        writer.result(operation, kind, (writer.value(operation.inputs[0]),), **attributes)

    return write


def _relu6(writer: GraphWriter, operation: Operation) -> None:
    ends = [writer.builder.initializer(np.array(end, np.float32), f"relu6_{end}") for end in (0, 6)]
    writer.result(operation, "Clip", (writer.value(operation.inputs[0]), *ends))


def _gated(factor: float) -> Writer:
    """Return a writer of ``x * sigmoid(factor * x)``."""

    def write(writer: GraphWriter, operation: Operation) -> None:
        x = writer.value(operation.inputs[0])
        argument = x
        if factor != 1:
            number = writer.builder.initializer(np.array(factor, np.float32), f"{operation.name}_factor")
            argument = writer.step(operation, "argument", "Mul", (x, number))
        writer.result(operation, "Mul", (x, writer.step(operation, "gate", "Sigmoid", (argument,))))

    return write


def _elementwise(kind: str) -> Writer:
    def write(writer: GraphWriter, operation: Operation) -> None:
        writer.result(operation, kind, [writer.aligned(name, len(operation.shape)) for name in operation.inputs])

    return write


def _scale(writer: GraphWriter, operation: Operation) -> None:
    if writer.is_written(operation.name):
        return
    factor = np.array(operation.real("factor"), np.float32)
    inputs = (writer.value(operation.inputs[0]), writer.builder.initializer(factor, f"{operation.name}_factor"))
    writer.result(operation, "Mul", inputs)


def _mean(writer: GraphWriter, operation: Operation) -> None:
    axes = writer.builder.integers((operation.integer("axis") + 1,))
    writer.result(operation, "ReduceMean", (writer.value(operation.inputs[0]), axes), keepdims=0)


def _where_it_is_read(writer: GraphWriter, operation: Operation) -> None:
    """Write nothing yet: see :meth:`GraphWriter.value`."""


def _concat(writer: GraphWriter, operation: Operation) -> None:
    parts = [writer.value(name) for name in operation.inputs]
    constant = [name in writer.graph.constants for name in operation.inputs]
    if any(constant) and not all(constant):
        # Concat does not broadcast: a class token is repeated for each sample of the batch.
        batch = writer.step(operation, "batch", "Shape", (parts[constant.index(False)],), start=0, end=1)
        for position in np.flatnonzero(constant):
            extents = (batch, writer.builder.integers(writer.shapes[operation.inputs[position]]))
            shape = writer.step(operation, f"shape_{position}", "Concat", extents, axis=0)
            parts[position] = writer.step(operation, f"part_{position}", "Expand", (parts[position], shape))
    writer.result(operation, "Concat", parts, axis=operation.integer("axis") + 1)


#: By the keys of :data:`calibration.graph.UNARY_FUNCTIONS`.
UNARY_WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "gelu": _one_node("Gelu"),
        "gelu_tanh": _one_node("Gelu", approximate="tanh"),
        "relu": _one_node("Relu"),
        "relu6": _relu6,
        "silu": _gated(1),
        "sigmoid": _one_node("Sigmoid"),
        "tanh": _one_node("Tanh"),
        "hardswish": _one_node("HardSwish"),
        "hardsigmoid": _one_node("HardSigmoid", alpha=1 / 6, beta=0.5),
        "quick_gelu": _gated(1.702),
    }
)

#: By the operators of :mod:`calibration.graph`.
WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "linear": write_linear,
        "conv2d": write_conv2d,
        "matmul": write_matmul,
        "layer_norm": _layer_norm,
        "softmax": _softmax,
        "unary": _unary,
        "add": _elementwise("Add"),
        "multiply": _elementwise("Mul"),
        "scale": _scale,
        "mean": _mean,
        **dict.fromkeys(VIEWS, _where_it_is_read),
        "concat": _concat,
    }
)
