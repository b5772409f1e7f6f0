"""Quantize an image model of transformers, from a directory that ``save_pretrained`` wrote or from the hub.

    python examples/transformers_model.py --model hf:google/vit-base-patch16-224 --data images/

Classifiers give logits, backbones such as DINOv2 the feature of the class token. ``preprocessor_config.json`` beside
the weights says how images become inputs.
"""

from __future__ import annotations

import click

import ptq
from ptq.data import open_data
from ptq.sources import load_model
from ptq.verification import verify_backends


@click.command()
@click.option("--model", default="hf:google/vit-base-patch16-224", show_default=True)
@click.option("--data", required=True, help="Images to calibrate with, and to compare on.")
@click.option("--method", default="auto", show_default=True, help="See 'ptq recipes'.")
@click.option("--bits", default="w8a8", show_default=True)
@click.option("--images", default=32, show_default=True, help="Images to calibrate with.")
def main(model: str, data: str, method: str, bits: str, images: int) -> None:
    """Run the example."""
    loaded = load_model(model)
    calibration = open_data(data, loaded.preprocessing, limit=images, seed=0)
    quantized = ptq.quantize(loaded.module, calibration, method=method, bits=bits, preprocessing=loaded.preprocessing)
    # Every operator between the doors is an integer operator; this is the program's own count.
    described = quantized.describe()
    print(f"{described['integer_ops']} integer operators, {described['float_ops']} float ones")

    # The simulation is what papers report; the table says how far each backend is from the program's interpreter.
    runs = {"simulate": quantized, "tvm": quantized.compile("cpu")}
    for result in verify_backends(runs, quantized.integer, calibration, batch_size=8):
        print(f"{result.backend}: promises {result.promise}, kept: {result.kept}, equal: {result.equal}")


if __name__ == "__main__":
    main()
