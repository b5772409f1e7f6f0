"""A file in OpenVINO: the model that its CPU plugin runs, and the times of its operators."""

from __future__ import annotations

from pathlib import Path

from ptq.deployment.placement import Kernel, Placement, add_other, random_input
from ptq.deployment.products import Product
from quantizers.errors import ArtifactError, UsageError

_INTEGER = frozenset({"i8", "u8", "i4", "u4"})
#: Fused attention: queries, keys and values go in.
_FUSED, _ATTENTION_INPUTS = "Subgraph", 3
_PRODUCT = "MatMul"
#: What OpenVINO says of an operator that it runs.
_FACTS = ("layerType", "originalLayersNames", "primitiveType")
#: Operators that are only there to be read.
_NOT_RUN = frozenset({"Input", "Output", "Const"})


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
    by_name = {name: product for product in products for name in (product.name, product.outputs[0])}
    kernels: dict[str, Kernel] = {}
    holding: dict[str, Kernel] = {}
    others: dict[str, tuple[float, int]] = {}
    for operator in compiled.get_runtime_model().get_ordered_ops():
        stored = operator.get_rt_info()
        facts = {key: stored[key].astype(str) for key in _FACTS}
        if facts["layerType"] in _NOT_RUN:
            continue
        names = facts["originalLayersNames"].split(",")
        found = dict.fromkeys(by_name[name].name for name in names if name in by_name)
        time = spent.get(operator.get_friendly_name(), 0.0) / calls
        label = f"{facts['layerType']} {facts['primitiveType']}"
        integer = facts["primitiveType"].rpartition("_")[2].lower() in _INTEGER
        types = [entry.get_element_type().to_string() in _INTEGER for entry in operator.inputs()]
        if facts["layerType"] == _FUSED and len(types) == _ATTENTION_INPUTS:
            # It names what stands between its two products and the second of them, and has a precision for all.
            holding |= dict.fromkeys(names, Kernel(label, all(types[:2]), None))
            integer = types[-1]
        elif facts["layerType"] == _PRODUCT and not found:
            # It may bear the names of what is fused behind it alone.
            holding |= dict.fromkeys(names, Kernel(label, integer, time))
        elif not found:
            add_other(others, facts["layerType"], time)
        # Several products in one kernel share its time.
        kernels |= dict.fromkeys(found, Kernel(label, integer, time / max(len(found), 1)))
    for product in products:
        reader = next((name for name in product.readers if name in holding), None)
        if product.name not in kernels and reader is not None:
            kernels[product.name] = holding[reader]
    return Placement(openvino.__version__.partition("-")[0], kernels, others)
