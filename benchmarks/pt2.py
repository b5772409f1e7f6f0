"""torch.compile of the exported INT8 program beside torch.compile of the float network, in interleaved rounds.

    python benchmarks/pt2.py --network deit-s

Both run compiled by inductor with frozen weights, in one process, on random images; weights are random. Printed are
the kernels that inductor chose, how far the compiled program is from the exported one as a share of what the exported
one is from float, the median time of each, and the median of the ratios of neighbouring rounds, in which a slow phase
of the machine appears on both sides.
"""

from __future__ import annotations

import collections
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

# Declares the operators that the program is made of.
import torch.ao.quantization.fx._decomposed
from cpu_comparison.networks import NETWORKS, build_network, make_images
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import ptq

CALIBRATION_IMAGES = 4
WARM_UP = 3


def compiled(module: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
    """Compile a module; return it and how often each kernel for products stands in the code."""
    torch.compiler.reset()
    run = torch.compile(module)
    _, code = run_and_get_code(run, images)
    kernels = re.findall(r"(?:onednn|mkl|mkldnn|extern_kernels)\.(\w+)", "".join(code))
    return run, dict(sorted(collections.Counter(kernels).items()))


def interleaved(
    left: Callable[[], object], right: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of each call, one of either after the other."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UP + rounds):
        for run, times in zip((left, right), seconds, strict=True):
            start = time.perf_counter()
            run()
            if index >= WARM_UP:
                times.append(time.perf_counter() - start)
    return seconds


@click.command()
@click.option("--network", type=click.Choice(tuple(NETWORKS)), default="deit-s", show_default=True)
@click.option("--method", default="minmax", show_default=True)
@click.option("--bits", default="w8a8", show_default=True)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results here too.")
@torch.no_grad()
def main(
    network: str, method: str, bits: str, batch_size: int, threads: int, rounds: int, json_path: Path | None
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    config.freezing = True
    module = build_network(network).requires_grad_(False)
    samples = torch.from_numpy(make_images(network, CALIBRATION_IMAGES, seed=1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        ptq.quantize(module, samples, method=method, bits=bits).export_pt2(path)
        program = torch.export.load(path).module()
    images = torch.from_numpy(make_images(network, batch_size, seed=2))
    exported = program(images)
    real, real_kernels = compiled(module, images)
    quantized, quantized_kernels = compiled(program, images)
    # A value on the edge of two codes may move, and moves others: less than rounding did, or a product went wrong.
    difference = float((quantized(images) - exported).norm() / (exported - module(images)).norm())
    assert difference < 1, difference
    left, right = interleaved(lambda: real(images), lambda: quantized(images), rounds)
    result = {
        "network": NETWORKS[network].title,
        "torch": torch.__version__,
        "batch_size": batch_size,
        "threads": threads,
        "rounds": rounds,
        "float_kernels": real_kernels,
        "int8_kernels": quantized_kernels,
        "compiled_to_exported_over_exported_to_float": difference,
        "float_ms": 1e3 * statistics.median(left),
        "int8_ms": 1e3 * statistics.median(right),
        "float_over_int8": statistics.median(a / b for a, b in zip(left, right, strict=True)),
    }
    click.echo("\n".join(f"{key}: {value}" for key, value in result.items()))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
