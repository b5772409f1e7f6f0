"""The process that makes the files of one network: ours, the ONNX files, and what NNCF makes of the float one.

Standard output carries one JSON object: seconds of each step, and the reason where a step could not be done.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .engines import CALIBRATION_IMAGES, CALIBRATION_SEED
from .files import STATIC, TARGETS, Files
from .networks import build_network, make_images
from .protocol import protect_standard_output, send

IMAGE_SEED = 2
METHOD, BITS = "minmax", "w8a8"
OPSET = 20


def prepare(network: str, files: Files, images: int, wanted: Sequence[str]) -> dict[str, Any]:
    """Make the files of a network.

    Args:
        network: a key of :data:`.networks.NETWORKS`.
        files: where to; the folder has to be empty.
        images: number of images to answer, the largest batch.
        wanted: names of steps, see :func:`.engines.steps_of`.

    Returns:
        Seconds of each step, and ``problems``: step to reason.
    """
    import torch  # noqa: PLC0415 - after the thread count is in the environment

    import ptq  # noqa: PLC0415 - as above

    module = build_network(network)
    calibration = torch.from_numpy(make_images(network, CALIBRATION_IMAGES, CALIBRATION_SEED))
    inputs = make_images(network, images, IMAGE_SEED)
    np.save(files.images, inputs)
    with torch.inference_mode():
        np.save(files.float_outputs, module(torch.from_numpy(inputs)).numpy())
    steps = _Steps()
    if any(step == "bundle" or step.startswith("preset:") for step in wanted):
        quantized = steps.attempt("quantize", lambda: ptq.quantize(module, calibration, method=METHOD, bits=BITS))
    if "bundle" in wanted:
        steps.attempt(
            "interpret", lambda: np.save(files.integer_outputs, quantized.integer(torch.from_numpy(inputs)).numpy())
        )
    makers = {
        "bundle": lambda: quantized.export_tvm(files.bundle),
        "float_onnx": lambda: _export_float(torch, module, calibration[:2], files.float_onnx),
        "nncf": lambda: _quantize_with_nncf(calibration.numpy(), files),
    }
    makers |= {f"preset:{target}": partial(_export_preset, files, target, lambda: quantized) for target in TARGETS}
    makers |= {f"static:{name}": partial(_quantize_static, calibration.numpy(), files, name) for name in STATIC}
    for step in wanted:
        steps.attempt(step, makers[step])
    return {"seconds": steps.seconds, "problems": steps.problems}


class _Steps:
    """Seconds and problems of steps that are run one after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    def attempt(self, name: str, step: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            result = step()
        # Whatever stops one tool, the engines that do not need its file are still compared.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0]
            self.problems[name] = f"{type(error).__name__}: {first_line}"
            return None
        self.seconds[name] = time.perf_counter() - started
        return result


def _export_preset(files: Files, target: str, quantized: Callable[[], Any]) -> None:
    quantized().export_onnx(files.preset(target), target)


def _quantize_static(images: Any, files: Files, settings: str) -> None:
    from onnxruntime import quantization  # noqa: PLC0415 - may not be installed
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415 - as above

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self._feeds = iter([{"images": images[i : i + 1]} for i in range(len(images))])

        def get_next(self) -> Any:
            return next(self._feeds, None)

    chosen = dict(STATIC[settings])
    if "activation_type" in chosen:
        chosen["activation_type"] = quantization.QuantType[chosen["activation_type"]]
    prepared = files.folder / "preprocessed.onnx"
    quant_pre_process(str(files.float_onnx), str(prepared))
    quantization.quantize_static(str(prepared), str(files.static(settings)), Reader(), **chosen)


def _export_float(torch: Any, module: Any, images: Any, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.onnx.export(
        module,
        (images,),
        str(path),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["outputs"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )


def _quantize_with_nncf(images: Any, files: Files) -> None:
    import nncf  # noqa: PLC0415 - may not be installed
    import openvino  # noqa: PLC0415 - may not be installed

    model = openvino.Core().read_model(files.float_onnx)
    # For transformers this type chooses the mixed preset: weights and most activations symmetric.
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(images[:, None])),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(quantized, files.nncf)


def main(arguments: dict[str, Any]) -> None:
    """Prepare and print.

    Args:
        arguments: ``network``, ``folder``, ``images``, ``steps``.
    """
    replies = protect_standard_output()
    send(
        replies,
        prepare(arguments["network"], Files(Path(arguments["folder"])), arguments["images"], arguments["steps"]),
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
