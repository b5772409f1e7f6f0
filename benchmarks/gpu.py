"""Ours on this machine's NVIDIA GPU: equal to the interpreter in every bit first, then time, and where it goes.

    python benchmarks/gpu.py --output out/gpu
    python benchmarks/gpu.py --networks deit-s --forms "minmax w8a8" --engines torch-fp16
    make bench-gpu

Writes ``gpu.json`` (all samples), ``gpu.md`` (tables) and ``gpu.png`` (bars), and prints the tables. Exits with 1 where
an answer differs from the interpreter's; nothing of that network is timed.

- Each form of each network is built for the GPU at hand and compared at every batch size, called with arrays and with
  tensors of the device; before each run its memory there and its outputs are overwritten.
- Times are the device's own, between two events, and every engine is recorded as a CUDA graph, torch too. Rounds are
  interleaved: in each one every engine takes one turn, in another order each time. Ratios are taken inside a round, and
  their median is reported. Answers of peers are checked by their similarity to torch's float32 on the CPU.
- Each kernel is timed on its own too, beside the time that the larger of its products at the tensor cores' speed and of
  its bytes at the memory's speed would take. Both speeds are measured beside it.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from cpu_comparison.machine import describe_machine
from cpu_comparison.networks import NETWORKS
from gpu_comparison.comparison import Plan, compare_network, engine_title, failures
from gpu_comparison.device import Device, device_here
from gpu_comparison.forms import DEFAULT_FORMS, baseline_of, split_form
from gpu_comparison.peers import PEERS, Peer
from gpu_comparison.report import markdown, write_plot
from gpu_comparison.rounds import first_line

from quantizers.errors import TargetError, UsageError
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.peak import build_peak

DEFAULT_NETWORKS = ("deit-s", "dinov2-s", "fashion", "swin-t")
#: Ninety-seven fills no tile of any kernel.
CHECK_BATCHES, BATCHES = (1, 8, 64, 97), (1, 8, 64)


def compare(
    networks: tuple[str, ...],
    plan: Plan,
    device: Device,
    peers: Mapping[str, Peer],
    output: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compare networks, and write the files after each: an interrupted run leaves what it measured.

    Args:
        networks: keys of :data:`cpu_comparison.networks.NETWORKS`.
        plan: what to compare.
        device: to run on.
        peers: to compare with.
        output: an existing folder.
        say: called with one line when something is done.

    Returns:
        What :file:`gpu.json` holds.

    Raises:
        TargetError: the kernel that measures the peak cannot be built.
    """
    started = time.perf_counter()
    results: dict[str, Any] = {
        "device": device.describe(),
        "machine": describe_machine(),
        "settings": {
            **asdict(plan),
            "engines": list(peers),
            "integer_engines": [name for name, peer in peers.items() if peer.integer],
            "baseline": baseline_of(plan.forms),
        },
        "titles": {name: engine_title(name, peers) for name in (*plan.forms, *peers)},
        "networks": {},
        "problems": {},
    }
    peak: Bundle = build_peak(device.target, device.compile_source, plan.peak_repeats)
    for name in networks:
        try:
            results["networks"][name] = compare_network(name, plan, device, peers, peak, say)
        # The run fails, but the other networks are still worth comparing.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            results["problems"][name] = first_line(error)
            say(f"{NETWORKS[name].title}: {first_line(error)}")
        results["seconds"] = time.perf_counter() - started
        (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(markdown(results), encoding="utf-8")
        write_plot(results, output / "gpu.png")
    return results


def _listed(known: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    def parse(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        unknown = [name for name in names if name not in known]
        if unknown:
            raise click.BadParameter(f"unknown: {', '.join(unknown)}; known are: {', '.join(known)}")
        return names

    return parse


def _forms(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    forms = tuple(" ".join(part.split()) for part in text.split(","))
    try:
        for form in forms:
            split_form(form)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error
    return forms


def _batches(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise click.BadParameter(f"{text!r}, expected positive numbers with commas between them")
    return tuple(int(part) for part in text.split(","))


def _joined(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--networks",
    callback=_listed(tuple(NETWORKS)),
    default=_joined(DEFAULT_NETWORKS),
    show_default=True,
    help=f"Of: {', '.join(NETWORKS)}.",
)
@click.option(
    "--forms", callback=_forms, default=_joined(DEFAULT_FORMS), show_default=True, help="Methods with their widths."
)
@click.option(
    "--batches", callback=_batches, default=_joined(CHECK_BATCHES), show_default=True, help="Images of runs to check."
)
@click.option(
    "--time-batches", callback=_batches, default=_joined(BATCHES), show_default=True, help="Images of runs to time."
)
@click.option(
    "--engines",
    callback=_listed(tuple(PEERS)),
    default=_joined(tuple(PEERS)),
    show_default=True,
    help="Peers; an empty list for none.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Turns of each engine.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/gpu"),
    show_default=True,
    help="Folder for gpu.json, gpu.md and gpu.png; those that exist are replaced.",
)
def main(
    networks: tuple[str, ...],
    forms: tuple[str, ...],
    batches: tuple[int, ...],
    time_batches: tuple[int, ...],
    engines: tuple[str, ...],
    rounds: int,
    output: Path,
) -> None:
    """Compare, write and print."""
    try:
        device = device_here()
    except TargetError as error:
        raise click.ClickException(str(error)) from error
    output.mkdir(parents=True, exist_ok=True)
    plan = Plan(forms, batches, time_batches, rounds)
    peers = {name: peer for name, peer in PEERS.items() if name in engines}
    results = compare(networks, plan, device, peers, output, lambda line: click.echo(line, err=True))
    click.echo("\n" + markdown(results))
    click.echo(f"wrote {output / 'gpu.json'}, {output / 'gpu.md'} and, of times, {output / 'gpu.png'}", err=True)
    found = failures(results["networks"], results["problems"])
    for failure in found:
        click.echo(failure, err=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
