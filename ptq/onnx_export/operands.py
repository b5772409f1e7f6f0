"""Operands of products: where they are quantized, and what is done with their codes on the way.

=============  ======================================================================================================
placement      an operand on its way to the product
=============  ======================================================================================================
``product``    value, views, QuantizeLinear, DequantizeLinear: the pair touches the product
``producer``   value, QuantizeLinear, DequantizeLinear, views: the pair touches what makes the value
=============  ======================================================================================================

Behind a linear whose channels are read in several formats (queries, keys and values of a fused projection, with a
scale for each head perhaps) one QuantizeLinear of scale 1 serves all: the linear's weights are stored in steps of its
result's codes, see :func:`fold`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from calibration.graph import VIEWS, Operation
from calibration.heads import before_view, rescaled
from calibration.integerize.shared_requantize import plan_shared_requantize
from ptq.onnx_export.builder import Array
from ptq.onnx_export.heads import find_heads, write_heads
from ptq.onnx_export.writer import Fold, GraphWriter
from quantizers.codebook import CodebookQParams
from quantizers.uniform import UniformQParams

#: Appends a node that moves elements of a tensor, codes or values, and returns the name of its result.
View = Callable[[str], str]
PRODUCTS = frozenset({"linear", "conv2d", "matmul"})
#: Axes of a view, with the batch, through which OpenVINO takes zero points.
_MOST_AXES = 4


@dataclass(frozen=True, slots=True)
class Operand:
    """A quantized and dequantized operand.

    Args:
        name: of the tensor.
        factor: float32, by what the product has yet to be multiplied: (1,), or (heads, 1, 1).
    """

    name: str
    factor: Array


def write_operand(
    writer: GraphWriter, operation: Operation, position: int, *views: View, factor: float = 1.0
) -> Operand:
    """Quantize an operand of a product.

    Args:
        writer: where nodes go.
        operation: the product.
        position: of the operand.
        views: what moves its elements for the product, in this order.
        factor: by which the product will be multiplied.
    """
    qparams, value, module = writer.formats[operation.name, position], operation.inputs[position], operation.module
    one = np.array([factor], np.float32)
    if not isinstance(qparams, UniformQParams):
        assert isinstance(qparams, CodebookQParams), "published forms are refused before, rows of levels written apart"
        return Operand(writer.quantizer.levels(_moved(writer.value(value), views), qparams, module), one)
    root = writer.structure.root(value)
    folded = root is not None and fold(writer, root) is not None
    if writer.layout.placement == "product" or not (folded or _reaches_product(writer, value, qparams)):
        codes = _quantize(writer, operation, _moved(writer.value(value), views), qparams)
        if len(qparams.scale) > 1:
            unit = replace(qparams, scale=(1.0,))
            return Operand(writer.quantizer.dequantize(codes, unit, module), one * qparams.scales().astype(np.float32))
        step = replace(qparams, scale=(float(np.float32(qparams.scale[0] * factor)),))
        return Operand(writer.quantizer.dequantize(codes, step, module), np.ones(1, np.float32))
    # The one DequantizeLinear behind a folded linear stands before queries, keys and values part.
    is_unit = folded or len(qparams.scale) > 1
    step = replace(qparams, scale=(1.0,)) if is_unit else qparams
    result = _moved(_carried(writer, operation, value, None if folded else qparams, step), views)
    return Operand(result, one * qparams.scales().astype(np.float32) if is_unit else one)


def fold(writer: GraphWriter, operation: Operation) -> Fold | None:
    """Return the steps in which a linear's result is quantized at once, or None where it is not.

    It is where products alone read it, in formats of one zero point and disjoint channels, unless a single
    QuantizeLinear of one scale does as well.
    """
    if operation.name not in writer.folds:
        writer.folds[operation.name] = _find_fold(writer, operation)
    return writer.folds[operation.name]


def _find_fold(writer: GraphWriter, operation: Operation) -> Fold | None:
    if operation.op != "linear" or writer.layout.placement == "product":
        return None
    if not _is_read_by_products_alone(writer, operation.name):
        return None
    shared = plan_shared_requantize(writer.structure, writer.formats, operation, fewest=1)
    if shared is None or (len(shared.members) == 1 and shared.scale.min() == shared.scale.max()):
        return None
    return Fold(shared.scale.ravel(), replace(next(iter(shared.members)), scale=(1.0,), axis=0))


def _is_read_by_products_alone(writer: GraphWriter, value: str) -> bool:
    if any(value == output for _, output in writer.graph.outputs):
        return False
    for reader, position in writer.structure.consumers.get(value, []):
        if reader.op in VIEWS or (reader.op == "scale" and reader.real("factor") > 0):
            if not _is_read_by_products_alone(writer, reader.name):
                return False
        elif reader.op not in PRODUCTS or not isinstance(writer.formats[reader.name, position], UniformQParams):
            return False
    return True


def _carried(
    writer: GraphWriter, reader: Operation, value: str, qparams: UniformQParams | None, step: UniformQParams | None
) -> str:
    """Return a quantized and dequantized value, or its codes where no step is given.

    Args:
        writer: where nodes go.
        reader: the product that asks first.
        value: of the graph.
        qparams: its format; None behind a folded linear, which knows it.
        step: of the DequantizeLinear.
    """
    key = (value, qparams, step)
    if key not in writer.carried:
        writer.carried[key] = _carry(writer, reader, value, qparams, step)
    return writer.carried[key]


def _carry(
    writer: GraphWriter, reader: Operation, value: str, qparams: UniformQParams | None, step: UniformQParams | None
) -> str:
    operation = writer.structure.producers.get(value)
    heads = find_heads(writer.structure, value) if qparams is None else None
    if heads is not None:
        source = _carried(writer, reader, heads.layer, None, step)
        return write_heads(writer, heads, source, f"{value}_dequantized", reader.module)
    if operation is not None and operation.op in VIEWS:
        source = operation.inputs[0]
        before = None if qparams is None else before_view(operation, writer.shapes[source], qparams)
        # What a slice drops would be quantized in vain, unless others read it in the same codes.
        passes = before is not None and operation.op != "slice"
        if qparams is None or passes:
            name = writer.builder.fresh(f"{value}_dequantized")
            return writer.views.view(operation, _carried(writer, reader, source, before, step), name)
    if operation is not None and operation.op == "scale" and operation.real("factor") > 0:
        before = None if qparams is None else rescaled(qparams, 1 / operation.real("factor"))
        return _carried(writer, reader, operation.inputs[0], before, step)
    if step is not None:
        return writer.quantizer.dequantize(_carried(writer, reader, value, qparams, None), step, reader.module)
    if qparams is None:
        assert operation is not None
        found = fold(writer, operation)
        assert found is not None, value
        return writer.quantizer.quantize(writer.value(value), found.qparams, operation.module)
    return _quantize(writer, reader, writer.value(value), qparams)


def _reaches_product(writer: GraphWriter, value: str, qparams: UniformQParams) -> bool:
    """Whether OpenVINO gains by a pair behind what makes a value, with views between it and the product.

    It does not take zero points through views of more than four axes. Behind attention it turns values faster than
    codes, and it has no product with a multiplication for each head and a QuantizeLinear.
    """
    operation = writer.structure.producers.get(value)
    while operation is not None and (operation.op in VIEWS or operation.op == "scale"):
        if qparams.zero_point != 0 and len(operation.shape) + 1 > _MOST_AXES:
            return False
        operation = writer.structure.producers.get(operation.inputs[0])
    return operation is None or operation.op != "matmul"


def _quantize(writer: GraphWriter, operation: Operation, tensor: str, qparams: UniformQParams) -> str:
    if len(qparams.scale) > 1:
        divisor = writer.builder.initializer(qparams.scales().astype(np.float32), f"{tensor}_scales")
        tensor = writer.builder.node(
            "Div", (tensor, divisor), writer.builder.fresh(f"{tensor}_steps"), operation.module
        )
        qparams = replace(qparams, scale=(1.0,))
    return writer.quantizer.quantize(tensor, qparams, operation.module)


def _moved(tensor: str, views: tuple[View, ...]) -> str:
    for view in views:
        tensor = view(tensor)
    return tensor
