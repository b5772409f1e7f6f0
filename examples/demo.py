"""Quantize the embedded network and print one table: every backend on the 2,000 labelled test images.

Run it with ``python examples/demo.py``.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

import ptq
from ptq.benchmarking import time_backends
from ptq.commands.backends import open_backend
from ptq.commands.options import Target
from ptq.console import note, print_table
from ptq.data import open_data
from ptq.evaluate import evaluate
from ptq.sources import load_model

MODEL = Path(__file__).resolve().parent / "fashion_mnist_vit"
BACKENDS = ("float", "simulate", "integer", "tvm", "onnxruntime")
BATCH_SIZE = 100
ROUNDS = 10


def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    loaded = load_model(str(MODEL))
    calibration = open_data(str(MODEL / "calibration.npz"), loaded.preprocessing)
    test = open_data(str(MODEL / "test.npz"), loaded.preprocessing, num_classes=loaded.num_classes)
    note(f"preprocessing: {loaded.preprocessing.describe()}")
    quantized = ptq.quantize(
        loaded.module,
        calibration,
        example_inputs=loaded.example_inputs,
        preprocessing=loaded.preprocessing,
        provenance={"source": loaded.source, "source_weights_sha256": loaded.weights_sha256},
    )
    note(f"quantized on {len(calibration)} images after {time.perf_counter() - started:.1f} s")
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    target = Target(quantized, None)
    runs = {backend: open_backend(target, backend, threads) for backend in BACKENDS}
    note(f"compiled after {time.perf_counter() - started:.1f} s")
    example = next(iter(test.batches(1)))[0]
    timings = {timing.backend: timing for timing in time_backends(runs, example, threads, ROUNDS)}
    sizes = _sizes(quantized)
    rows = []
    for backend in BACKENDS:
        result = evaluate(backend, runs[backend], runs["float"], test, BATCH_SIZE)
        rows.append(
            (
                backend,
                f"{result.top1:.2f} %",
                f"{100 * result.agreement:.2f} %",
                f"{sizes[backend] / 1e6:.2f} MB",
                f"{timings[backend].median_ms:.2f}",
            )
        )
    print_table(("backend", "top-1", "agreement with float", "model size", f"ms an image, {threads} threads"), rows)
    summary = quantized.describe()
    note(
        f"recipe {quantized.calibrated.recipe.name}; first and last layer at the same widths; {len(test)} images; "
        f"{summary['integer_ops']} integer operators, {summary['float_ops']} float; "
        f"{time.perf_counter() - started:.1f} s in all"
    )


def _sizes(quantized: ptq.Quantized) -> dict[str, int]:
    """Return bytes of what each backend loads."""
    summary = quantized.describe()
    with tempfile.TemporaryDirectory() as folder:
        quantized.export_onnx(Path(folder) / "model.onnx")
        quantized.export_tvm(Path(folder) / "bundle")
        bundle = sum(file.stat().st_size for file in (Path(folder) / "bundle").iterdir())
        onnx = (Path(folder) / "model.onnx").stat().st_size
    return {
        "float": summary["float_size_bytes"],
        "simulate": summary["float_size_bytes"],
        "integer": summary["size_bytes"],
        "tvm": bundle,
        "onnxruntime": onnx,
    }


if __name__ == "__main__":
    main()
