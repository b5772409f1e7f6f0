"""A file in onnxruntime: its optimized graph, and the times of its nodes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import onnx

from ptq.deployment.placement import Kernel, Placement, add_other, random_input
from ptq.deployment.products import Product
from quantizers.errors import ArtifactError

#: Kernels that multiply integers.
_INTEGER = frozenset(
    {
        *("QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearConv", "MatMulInteger", "ConvInteger"),
        *("DynamicQuantizeMatMul", "MatMulNBits", "QAttention"),
    }
)
_TIME_SUFFIX = "_kernel_time"


def run_onnxruntime(path: Path, products: tuple[Product, ...], threads: int, calls: int) -> Placement:
    """Load and run a file on the CPU.

    Raises:
        ArtifactError: onnxruntime refuses the file.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.optimized_model_filepath = str(optimized)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        # It warns of every file that is written for the machine at hand, which is what is wanted.
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            feeds = {
                entry.name: random_input(tuple(size if isinstance(size, int) else 1 for size in entry.shape))
                for entry in session.get_inputs()
            }
            for _ in range(calls + 1):
                session.run(None, feeds)
        except Exception as error:
            raise ArtifactError(f"onnxruntime refuses {path}: {' '.join(str(error).split())[:300]}") from error
        times = _times(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")), calls)
        nodes = list(onnx.load(optimized).graph.node)
    # A fused kernel gives the product's result, or, where a quantizer has moved, bears the product's name.
    makers = {name: node for node in nodes for name in node.output}
    named = {node.name: node for node in nodes}
    kernels: dict[str, Kernel] = {}
    taken: set[str] = set()
    for product in products:
        node = next((makers[name] for name in product.outputs if name in makers), named.get(product.name))
        if node is None:
            # An addition that is part of the kernel gives it its name.
            fused = (makers[name] for name in product.readers if name in makers)
            node = next((entry for entry in fused if entry.op_type in _INTEGER), None)
        if node is not None:
            kernels[product.name] = Kernel(node.op_type, node.op_type in _INTEGER, times.get(node.name))
            taken.add(node.name)
    others: dict[str, tuple[float, int]] = {}
    for node in nodes:
        if node.name not in taken:
            add_other(others, node.op_type, times.get(node.name, 0.0))
    return Placement(onnxruntime.__version__, kernels, others)


def _times(events: list[dict[str, object]], calls: int) -> dict[str, float]:
    """Return the mean milliseconds of each node over the last calls."""
    spent: dict[str, list[float]] = {}
    for event in events:
        name, duration = str(event.get("name", "")), event.get("dur", 0)
        if event.get("cat") == "Node" and name.endswith(_TIME_SUFFIX) and isinstance(duration, int | float):
            spent.setdefault(name.removesuffix(_TIME_SUFFIX), []).append(duration / 1000)
    return {name: sum(values[-calls:]) / calls for name, values in spent.items()}
