"""What fewer bits and non-uniform formats cost: one network, one engine, several formats, interleaved rounds.

    python benchmarks/cpu_formats.py --network deit-s --output out/formats

Formats: w8a8, w6a6, w4a8, w4a4 and w3a3 as ``ptq.quantize`` makes them, and w4a4 with the probabilities and the GELU
outputs in 16 levels of a non-uniform format: powers of two (log2), of the square root of two (log-sqrt2, RepQ-ViT,
arXiv 2212.08254), of 2^(-q/37) (AdaLog, arXiv 2407.12951, q = 20), and a tangent compander. In an integer program such
a format is a table of 8-bit levels, so the variants replace the tables of the w4a4 program; the accuracy of the formats
is not the subject here.

Every answer is compared with the interpreter, bit for bit, before anything is timed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from cpu_comparison.machine import describe_machine
from cpu_comparison.networks import NETWORKS, build_network, make_images

import ptq
from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from quantizers.integer.serialize import program_to_bytes
from tvm_backend.build import build
from tvm_backend.runtime import CompiledProgram

BITS = ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3")
ADALOG_Q = 20
Levels = npt.NDArray[np.float64]
#: Sixteen levels of each format between 0 and 1, the largest 1.
CODEBOOKS: dict[str, Callable[[Levels], Levels]] = {
    "log2": lambda i: 2.0**-i,
    "log-sqrt2": lambda i: 2.0 ** (-i / 2),
    "adalog": lambda i: 2.0 ** (-i * ADALOG_Q / 37),
    "tangent": lambda i: np.tan(1.2 * (1 - i / 15)) / np.tan(1.2),
}


def nearest(values: npt.NDArray[np.int64], levels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each value the nearest level."""
    return levels[np.abs(values[:, None] - levels[None, :]).argmin(1)]


def with_codebook(program: IntegerProgram, name: str) -> IntegerProgram:
    """Return the program with 16 levels of a format in every table of exponentials and of a function."""
    shares = CODEBOOKS[name](np.arange(16.0))
    constants = dict(program.constants)
    nodes = []
    for node in program.nodes:
        if node.op in ("exponentials", "lookup"):
            table = program.constants[node.inputs[1]].astype(np.int64)
            # GELU's lowest value, slightly negative, becomes zero, as the formats for it shift it.
            lowest = int(table.min())
            levels = np.rint((int(table.max()) - lowest) * shares).astype(np.int64)
            replaced = (nearest(table - lowest, levels) + lowest).astype(program.constants[node.inputs[1]].dtype)
            label = f"{node.name}.{name}"
            constants[label] = replaced
            nodes.append(replace(node, inputs=(node.inputs[0], label)))
        else:
            nodes.append(node)
    return replace(program, nodes=tuple(nodes), constants=constants)


def weight_bytes(program: IntegerProgram) -> tuple[int, int]:
    """Return the bytes of the artifact's constants, and those of a program whose weights are bytes."""
    stored = len(program_to_bytes(program)[1])
    return stored, sum(array.nbytes for array in program.constants.values())


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--network", type=click.Choice(sorted(NETWORKS)), default="deit-s", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Worker threads; all processors by default.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/formats"), show_default=True)
def main(network: str, batch: int, threads: int | None, rounds: int, output: Path) -> None:
    """Build, check and time."""
    calibration = torch.from_numpy(make_images(network, 4, seed=1))
    images = make_images(network, batch, seed=2)
    programs: dict[str, IntegerProgram] = {}
    for bits in BITS:
        programs[bits] = ptq.quantize(build_network(network), calibration, method="minmax", bits=bits).program
    programs |= {f"w4a4 {name}": with_codebook(programs["w4a4"], name) for name in CODEBOOKS}
    compiled, constant_bytes = {}, {}
    for name, program in programs.items():
        bundle = build(program)
        compiled[name] = CompiledProgram(bundle, threads)
        constant_bytes[name] = sum(array.nbytes for array in bundle.constants)
        wanted = interpret(program, torch.from_numpy(images))[0].numpy()
        if compiled[name](images)[0].tobytes() != wanted.tobytes():
            raise SystemExit(f"{name}: the compiled program differs from the interpreter")
        click.echo(f"{name}: equal to the interpreter")
    samples = time_rounds({name: lambda run=run: run(images) for name, run in compiled.items()}, rounds)
    rows = []
    for name, program in programs.items():
        ratios = [own / base for own, base in zip(samples[name], samples["w8a8"], strict=True)]
        rows.append(
            {
                "format": name,
                "median_ms": 1000 * statistics.median(samples[name]),
                "ratio_to_w8a8": statistics.median(ratios),
                "artifact_bytes": weight_bytes(program)[0],
                "bundle_constant_bytes": constant_bytes[name],
            }
        )
    output.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": describe_machine(), "network": network, "batch": batch, "threads": compiled["w8a8"].threads,
        "rounds": rounds, "rows": rows, "samples_s": samples,
    }  # fmt: skip
    (output / "formats.json").write_text(json.dumps(document, indent=1) + "\n")
    click.echo(f"\n{NETWORKS[network].title}, batch {batch}, {compiled['w8a8'].threads} threads, {rounds} rounds\n")
    click.echo("| format | ms | time / w8a8 | artifact MB | bundle constants MB |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        click.echo(
            f"| {row['format']} | {row['median_ms']:.2f} | {row['ratio_to_w8a8']:.3f} "
            f"| {row['artifact_bytes'] / 1e6:.1f} | {row['bundle_constant_bytes'] / 1e6:.1f} |"
        )


def time_rounds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run, the median of five calls after two that do not count, for each round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs)
        # Another order each round, so that nobody always follows the same neighbour.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = []
            for _ in range(7):
                started = time.perf_counter()
                runs[name]()
                taken.append(time.perf_counter() - started)
            samples[name].append(statistics.median(taken[2:]))
    return samples


if __name__ == "__main__":
    main()
