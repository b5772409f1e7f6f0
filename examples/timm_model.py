"""Quantize a model of timm, compare it with float, and write what a deployment needs.

    python examples/timm_model.py --model timm:deit_small_patch16_224 --data images/ --output deit-s

The weights come from the hub; ``timm:NAME@weights.safetensors`` takes them from a file instead. DATA is a folder of
images, or a ``.npz`` with ``images`` and perhaps ``labels``. In commands: ``ptq quantize``, ``verify``, ``export``.
"""

from __future__ import annotations

from pathlib import Path

import click

import ptq
from ptq.data import open_data
from ptq.evaluate import evaluate
from ptq.sources import load_model


@click.command()
@click.option("--model", default="timm:deit_small_patch16_224", show_default=True)
@click.option("--data", required=True, help="Images to calibrate with, and to compare on.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--bits", default="w8a8", show_default=True)
@click.option("--images", default=32, show_default=True, help="Images to calibrate with.")
def main(model: str, data: str, output: Path, bits: str, images: int) -> None:
    """Run the example."""
    loaded = load_model(model)
    # What the model was trained with: size, mean, deviation and interpolation travel with it.
    print(loaded.preprocessing.describe())
    calibration = open_data(data, loaded.preprocessing, limit=images, seed=0)
    quantized = ptq.quantize(loaded.module, calibration, bits=bits, preprocessing=loaded.preprocessing)
    quantized.save(output)

    # The compiled program gives the interpreter's bits; float is there to compare with.
    compiled = quantized.compile("cpu")
    result = evaluate("tvm", compiled, quantized.float, open_data(data, loaded.preprocessing), batch_size=16)
    print(f"same first choice as float on {100 * result.agreement:.1f} % of {result.n} images")

    quantized.export_onnx(output / "model.onnx")  # quantize and dequantize nodes, for other runtimes
    quantized.export_tvm(output / "bundle")  # runs without torch: tvm_backend.load_bundle
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
