"""A file in OpenVINO: the model that its CPU plugin runs, and the times of its operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.deployment.placement import Kernel, Placement, add_other, random_input
from ptq.deployment.products import Product
from quantizers.errors import ArtifactError, UsageError

_INTEGER = frozenset({"i8", "u8", "i4", "u4"})
#: Fused elementwise operators; with queries, keys and values among its inputs, fused attention.
_FUSED, _ATTENTION_INPUTS, _MATRIX_AXES = "Subgraph", 3, 2
_MATMUL, _LINEAR = "MatMul", "FullyConnected"
#: What OpenVINO says of an operator that it runs.
_FACTS = ("layerType", "originalLayersNames", "primitiveType")
#: Operators that are only there to be read.
_NOT_RUN = frozenset({"Input", "Output", "Const"})
#: Kernels of products; others may bear a product's name for moving its weights or scaling its result.
_MULTIPLY = frozenset({_MATMUL, _LINEAR, "Convolution"})


def run_openvino(path: Path, products: tuple[Product, ...], threads: int, calls: int) -> Placement:
    """Load and run a file on the CPU.

    Raises:
        UsageError: OpenVINO is not installed.
        ArtifactError: OpenVINO refuses the file.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError("runtime openvino needs the package openvino: pip install openvino") from error
    try:
        core = openvino.Core()
        model = core.read_model(str(path))
        shapes = {
            entry.any_name: tuple(1 if size.is_dynamic else size.get_length() for size in entry.partial_shape)
            for entry in model.inputs
        }
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        compiled = core.compile_model(model, "CPU", {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": threads})
        request = compiled.create_infer_request()
        feeds = {name: random_input(shape) for name, shape in shapes.items()}
        spent: dict[str, float] = {}
        for call in range(calls + 1):
            request.infer(feeds)
            for entry in request.get_profiling_info() if call else ():
                spent[entry.node_name] = spent.get(entry.node_name, 0.0) + entry.real_time.total_seconds() * 1000
    except Exception as error:
        raise ArtifactError(f"OpenVINO refuses {path}: {' '.join(str(error).split())[:300]}") from error
    placer = _Placer(products)
    for operator in compiled.get_runtime_model().get_ordered_ops():
        found = _read(operator, spent.get(operator.get_friendly_name(), 0.0) / calls)
        if found.layer not in _NOT_RUN:
            placer.add(found)
    return placer.finish(openvino.__version__.partition("-")[0])


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator of the model that the plugin runs.

    Args:
        layer: its kind.
        kernel: kind and primitive, for people.
        integer: whether its primitive is one of integers.
        matrices: for each input with rows and columns, whether it holds integers; factors of heads have none.
        names: of what it was made of.
        milliseconds: of one call.
    """

    layer: str
    kernel: str
    integer: bool
    matrices: tuple[bool, ...]
    names: tuple[str, ...]
    milliseconds: float


def _read(operator: Any, milliseconds: float) -> _Operator:
    stored = operator.get_rt_info()
    layer, names, primitive = (stored[key].astype(str) for key in _FACTS)
    return _Operator(
        layer,
        f"{layer} {primitive}",
        primitive.rpartition("_")[2].lower() in _INTEGER,
        tuple(entry.get_element_type().to_string() in _INTEGER for entry in operator.inputs() if _is_matrix(entry)),
        tuple(names.split(",")),
        milliseconds,
    )


def _is_matrix(entry: Any) -> bool:
    shape = list(entry.get_partial_shape())
    return len(shape) < _MATRIX_AXES or any(size.is_dynamic or size.get_length() > 1 for size in shape[-_MATRIX_AXES:])


class _Placer:
    """Finds the kernels of products by the names that operators were made of."""

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = products
        self._by_name = {name: product for product in products for name in (product.name, product.outputs[0])}
        self._kernels: dict[str, Kernel] = {}
        self._holding: dict[str, Kernel] = {}
        self._nameless: list[_Operator] = []
        self._others: dict[str, tuple[float, int]] = {}

    def add(self, operator: _Operator) -> None:
        """Take an operator, in execution order."""
        names = {_without_suffixes(name, self._by_name) for name in operator.names}
        known = {self._by_name[name].name for name in names & self._by_name.keys()}
        found = [product.name for product in self._products if product.name in known]
        kernel = Kernel(operator.kernel, operator.integer, operator.milliseconds)
        if operator.layer == _FUSED:
            self._add_fused(operator, names)
        elif found and operator.layer in _MULTIPLY:
            # Several products in one kernel share its time.
            share = operator.milliseconds / len(found)
            self._kernels |= dict.fromkeys(found, Kernel(operator.kernel, operator.integer, share))
        elif operator.layer == _MATMUL:
            # It may bear the names of what is fused behind it alone.
            self._holding |= dict.fromkeys(names, kernel)
        elif operator.layer == _LINEAR:
            self._nameless.append(operator)
        else:
            add_other(self._others, operator.layer, operator.milliseconds)

    def _add_fused(self, operator: _Operator, names: set[str]) -> None:
        """Take fused elementwise operators, or fused attention.

        That names what stands between its two products and behind them, and perhaps the products; queries and keys come
        first, values last; and it has one precision for all.
        """
        inside = [
            product.name
            for product in self._products
            if product.name not in self._kernels and names & {product.name, *product.outputs, *product.readers}
        ]
        if not inside or len(operator.matrices) < _ATTENTION_INPUTS:
            add_other(self._others, operator.layer, operator.milliseconds)
            return
        scores = Kernel(operator.kernel, all(operator.matrices[:2]), None)
        self._kernels |= dict.fromkeys(inside[:-1], scores)
        self._kernels[inside[-1]] = Kernel(operator.kernel, operator.matrices[-1], operator.milliseconds)

    def finish(self, version: str) -> Placement:
        """Return where the products went."""
        for product in self._products:
            reader = next((name for name in product.readers if name in self._holding), None)
            if product.name not in self._kernels and reader is not None:
                self._kernels[product.name] = self._holding[reader]
        # Rewriting a product's neighbours may cost it its name, not its place.
        missing = [product.name for product in self._products if product.name not in self._kernels]
        if len(missing) == len(self._nameless):
            for name, operator in zip(missing, self._nameless, strict=True):
                self._kernels[name] = Kernel(operator.kernel, operator.integer, operator.milliseconds)
        else:
            for operator in self._nameless:
                add_other(self._others, operator.layer, operator.milliseconds)
        return Placement(version, self._kernels, self._others)


def _without_suffixes(name: str, known: Mapping[str, Product]) -> str:
    """Return the known name that OpenVINO has made a name of, such as ``NAME/WithoutBiases/DequantizationMultiply``."""
    shorter = name
    while shorter:
        if shorter in known:
            return shorter
        shorter = shorter.rpartition("/")[0]
    return name
