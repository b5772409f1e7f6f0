"""Products of an ONNX file, and what keeps them from integer kernels, read from the file alone.

What runtimes ask for was measured and read in their documentation: pairs of QuantizeLinear and DequantizeLinear that
touch the product, an int32 bias whose step is input step times weight step, zero point 0 on both sides of an attention
product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, numpy_helper

Array = npt.NDArray[Any]

#: Products in float operators, which a runtime may turn into integer ones.
_FLOAT_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
#: Products that are integer in the file itself.
_INTEGER_PRODUCTS = frozenset({"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"})
#: What a runtime may move through, and does not always.
_VIEWS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice"})
#: Largest relative difference of a bias step from the product of the two steps it has to be, float32 rounding.
_STEP_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Product:
    """A product.

    Args:
        name: of its node, or of its result where the node has none.
        module: path of the module it came from: the node's documentation.
        op: its operator.
        outputs: names by which its result may be known to a runtime: as it is, and quantized.
        readers: names of the nodes that read its result.
        findings: what speaks against integers, here or elsewhere, or is wrong.
        obstacles: what explains that it stays float, and means nothing where it does not.
    """

    name: str
    module: str
    op: str
    outputs: tuple[str, ...]
    readers: tuple[str, ...]
    findings: tuple[str, ...]
    obstacles: tuple[str, ...] = ()


def find_products(model: onnx.ModelProto) -> tuple[Product, ...]:
    """Return the products of a model's main graph, in order."""
    reader = _Reader(model.graph)
    return tuple(
        reader.product(node) for node in model.graph.node if node.op_type in _FLOAT_PRODUCTS | _INTEGER_PRODUCTS
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    """What a DequantizeLinear makes: constant codes, or those of a QuantizeLinear."""

    constant: bool
    scale: Array
    zero_point: Array | None
    codes: Array | None

    @property
    def is_int4(self) -> bool:
        return self.codes is not None and self.codes.dtype.name in ("int4", "uint4")


class _Reader:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._constants: Mapping[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def product(self, node: NodeProto) -> Product:
        readers = self._readers.get(node.output[0], [])
        outputs = [node.output[0], *(reader.output[0] for reader in readers if reader.op_type == "QuantizeLinear")]
        names = tuple(reader.name or reader.output[0] for reader in readers)
        findings, obstacles = ([], []) if node.op_type in _INTEGER_PRODUCTS else self._findings(node)
        name = node.name or node.output[0]
        return Product(name, node.doc_string, node.op_type, tuple(outputs), names, tuple(findings), tuple(obstacles))

    def _findings(self, node: NodeProto) -> tuple[list[str], list[str]]:
        found: list[str] = []
        obstacles: list[str] = []
        sides = ("left operand", "right operand") if node.op_type == "MatMul" else ("input", "weight")
        pairs = [self._pair(name) for name in node.input[:2]]
        if pairs[1] is not None and pairs[1].is_int4:
            # Weights of 4 bits have kernels of their own, which read float values.
            return found, obstacles
        for side, name, pair in zip(sides, node.input, pairs, strict=False):
            if pair is None:
                between = self._views_behind_pair(name)
                if between is None:
                    found.append(self._why_float(side, name))
                else:
                    where = f"{between} between the {side} and its DequantizeLinear"
                    obstacles.append(f"{where}: the pair has to touch the product")
        if all(pair is not None and not pair.constant for pair in pairs):
            for side, pair in zip(sides, pairs, strict=True):
                zero = 0 if pair is None or pair.zero_point is None else pair.zero_point
                if np.any(zero):
                    found.append(
                        f"zero point {int(np.ravel(zero)[0])} of the {side} of an attention product: OpenVINO and "
                        "TensorRT keep it float; quantize queries, keys, values and probabilities with zero point 0"
                    )
        return found + self._bias_findings(node, pairs), obstacles

    def _bias_findings(self, node: NodeProto, pairs: list[_Pair | None]) -> list[str]:
        name = node.input[2] if len(node.input) > 2 and node.input[2] else self._added_constant(node)
        if name is None:
            return []
        bias = self._pair(name)
        if bias is None or bias.codes is None or bias.codes.dtype != np.int32:
            found = f"float bias {name}: the product runs in float with weights dequantized at each call; "
            return [found + "store it as int32 codes and DequantizeLinear, step = input step x weight step"]
        source, weight = pairs
        if source is None or weight is None:
            return []
        expected = np.ravel(source.scale).astype(np.float64) * np.ravel(weight.scale)
        if np.any(np.abs(np.ravel(bias.scale) - expected) > _STEP_TOLERANCE * expected):
            found = f"the step of bias {name} is not input step x weight step: "
            return [found + "runtimes add its codes to their sums as they are, which gives wrong results"]
        return []

    def _added_constant(self, node: NodeProto) -> str | None:
        """Return the vector that is added behind a product with a weight."""
        if node.op_type != "MatMul" or not self._is_weight(node.input[1]):
            return None
        for reader in self._readers.get(node.output[0], []):
            for name in reader.input if reader.op_type == "Add" else ():
                if name != node.output[0] and self._is_weight(name):
                    return str(name)
        return None

    def _is_weight(self, name: str) -> bool:
        pair = self._pair(name)
        return name in self._constants or (pair is not None and pair.constant)

    def _pair(self, name: str) -> _Pair | None:
        node = self._producers.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        scale = self._array(node.input[1])
        zero_point = self._array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        codes = self._array(node.input[0])
        return _Pair(codes is not None, np.ones(1) if scale is None else scale, zero_point, codes)

    def _views_behind_pair(self, name: str) -> str | None:
        """Return the views between a value and a DequantizeLinear before it, or None where there is none of either."""
        node = self._producers.get(name)
        views = []
        while node is not None and node.op_type in _VIEWS:
            views.append(node.op_type)
            node = self._producers.get(node.input[0])
        if not views or node is None or node.op_type != "DequantizeLinear":
            return None
        return " and ".join(reversed(views))

    def _why_float(self, side: str, name: str) -> str:
        if name in self._constants:
            return f"float {side} {name}: store it as int8 codes and DequantizeLinear"
        return f"the {side} {name} is not quantized: put QuantizeLinear and DequantizeLinear before the product"

    def _array(self, name: str) -> Array | None:
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None
