"""A backend by name, as a function of preprocessed images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq.commands.options import Target
from quantizers.errors import UsageError


def open_backend(target: Target, backend: str, threads: int | None = None) -> Callable[[Any], Any]:
    """Return a function of float32 images (batch, C, H, W) that gives the first output.

    Raises:
        UsageError: the backend needs a quantized model and the target is a float one.
    """
    if backend == "float":
        return _first(target.float_run())
    quantized = target.quantized
    if quantized is None:
        raise UsageError(
            f"backend {backend} needs a quantized model; make one with 'ptq quantize', or use --backend float"
        )
    if backend == "simulate":
        return _first(quantized)
    if backend == "integer":
        return _first(quantized.integer)
    if backend == "tvm":
        return _first(quantized.compile("cpu", threads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write = quantized.export_onnx_integer if backend == "onnx-integer" else quantized.export_onnx
        write(path)
        return open_onnx(path, threads)


def open_onnx(path: Path, threads: int | None) -> Callable[[Any], Any]:
    """Load an ONNX file in onnxruntime on the CPU."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _first(run: Callable[..., Any]) -> Callable[[Any], Any]:
    def call(images: Any) -> Any:
        result = run(images)
        return result[0] if isinstance(result, tuple) else result

    return call
