"""Accuracy and bit-exactness of the embedded network on all 10,000 Fashion-MNIST test images.

    python benchmarks/fashion_mnist.py --data /usr/share/datasets/fashion-mnist

Prints top-1 of float, simulation, integers and of the INT8 ONNX files of every layout in the runtimes that are
installed, with the share of images on which their first choice is the simulation's; and whether TVM's logits, at batch
sizes 1, 7 and 64 with one and two threads, and those of the integer ONNX file in onnxruntime equal the interpreter's in
every bit. Exits with 1 if these do not.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch
from fashion_mnist_data import MODEL, preprocessed, read_split
from torch import Tensor

import ptq
from ptq.compiled import compile_program
from ptq.data import open_data
from ptq.onnx_export.layout import LAYOUTS
from ptq.recipes import DEFAULT_METHOD
from ptq.sources import load_model

BATCH_SIZES = (1, 7, 64)
THREADS = (1, 2)


def in_batches(run: object, images: Tensor, batch_size: int) -> Tensor:
    """Apply a function of (batch, 1, 28, 28) to all images and join the logits."""
    assert callable(run)
    return torch.cat([run(batch) for batch in images.split(batch_size)])


def run_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a file in onnxruntime as a function of images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


def run_openvino(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a file in OpenVINO, with its default precision, as a function of images."""
    import openvino  # noqa: PLC0415 - may not be installed

    compiled = openvino.Core().compile_model(str(path), "CPU")
    return lambda batch: torch.from_numpy(np.array(compiled({0: batch.numpy()})[0]))


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of *-ubyte.gz files.")
@click.option("--method", default=DEFAULT_METHOD, show_default=True)
@click.option("--bits", default="w8a8", show_default=True)
@click.option("--limit", default=10_000, show_default=True, help="Use the first images only.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results here too.")
def main(data: Path, method: str, bits: str, limit: int, json_path: Path | None) -> None:
    """Measure and print."""
    loaded = load_model(str(MODEL))
    pixels, labels = read_split(data, "t10k")
    images, target = preprocessed(pixels[:limit], loaded.preprocessing), torch.from_numpy(labels[:limit])
    with tempfile.TemporaryDirectory() as folder:
        calibration = open_data(str(MODEL / "calibration.npz"), loaded.preprocessing)
        quantized = ptq.quantize(
            loaded.module, (batch for batch, _ in calibration.batches(64)), method=method, bits=bits
        )
        runtimes = {"onnxruntime": run_onnxruntime}
        if importlib.util.find_spec("openvino") is not None:
            runtimes["openvino"] = run_openvino
        files = {}
        for runtime, load in runtimes.items():
            for layout in dict.fromkeys((runtime, *LAYOUTS)):
                path = Path(folder) / f"{layout}.onnx"
                if not path.exists():
                    quantized.export_onnx(path, layout)
                files[f"{runtime}, {layout} file"] = load(path)
        quantized.export_onnx_integer(Path(folder) / "integer.onnx")
        integer_onnx = run_onnxruntime(Path(folder) / "integer.onnx")
    runs = {"float": quantized.float, "simulate": quantized, "integer": quantized.integer, **files}
    results: dict[str, object] = {"method": method, "bits": bits, "images": len(images)}
    logits = {backend: in_batches(run, images, 250) for backend, run in runs.items()}
    chosen = logits["simulate"].argmax(1)
    for backend, values in logits.items():
        top1 = 100.0 * float((values.argmax(1) == target).double().mean())
        agreement = 100.0 * float((values.argmax(1) == chosen).double().mean())
        results[backend] = {"top1": top1, "agreement_with_simulate": agreement}
        click.echo(f"{backend:30s} top-1 {top1:.2f} %, first choice of the simulation {agreement:.2f} %")
    results["integer_onnx_equal"] = torch.equal(in_batches(integer_onnx, images, 250), logits["integer"])
    click.echo(f"integer ONNX in onnxruntime: {'equal in every bit' if results['integer_onnx_equal'] else 'DIFFERENT'}")
    equal = True
    for threads in THREADS:
        compiled = compile_program(quantized.program, "cpu", threads)
        for batch_size in BATCH_SIZES:
            same = torch.equal(in_batches(compiled, images, batch_size), logits["integer"])
            equal &= same
            click.echo(
                f"tvm, batch {batch_size:2d}, {threads} threads: {'equal in every bit' if same else 'DIFFERENT'}"
            )
    results["tvm_equal"] = equal
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if equal and results["integer_onnx_equal"] else 1)


if __name__ == "__main__":
    main()
