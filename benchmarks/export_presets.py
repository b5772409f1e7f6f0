"""The INT8 ONNX files that this project exports for runtimes, each in ONNX Runtime and in OpenVINO, on this machine.

    python benchmarks/export_presets.py --output out/presets
    make bench-presets

Beside them the float network in either runtime, what NNCF makes of it for OpenVINO, and what onnxruntime's own
``quantize_static`` makes of it with its default settings and with the fastest that were found (uint8 activations,
weights per channel). All of one network's engines take turns in the same rounds, as :mod:`cpu` describes; a ratio is
the median over rounds of an engine's time over that of the runtime's own preset.

Writes ``presets.json`` (all samples) and ``presets.md`` (the table), and prints the table.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from cpu_comparison.comparison import Plan, compare_network
from cpu_comparison.engines import ENGINES
from cpu_comparison.files import STATIC, TARGETS
from cpu_comparison.machine import describe_machine
from cpu_comparison.networks import NETWORKS
from cpu_comparison.presets import RUNTIMES, markdown

CHOSEN = ("fashion", "deit-s", "dinov2-s")


def _list(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--networks", callback=_list, default=",".join(CHOSEN), show_default=True, help=f"Of: {', '.join(NETWORKS)}."
)
@click.option("--batches", callback=_list, default="1,8", show_default=True)
@click.option("--threads", callback=_list, default="1,2", show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/presets"), show_default=True)
def main(
    networks: tuple[str, ...], batches: tuple[str, ...], threads: tuple[str, ...], rounds: int, output: Path
) -> None:
    """Compare, write and print."""
    engines = [name for runtime in RUNTIMES.values() for name in runtime.engines]
    plan = Plan(tuple(engines), tuple(map(int, batches)), tuple(map(int, threads)), rounds)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe_machine(), "targets": TARGETS, "static": STATIC, "networks": {}}
    work = Path(tempfile.mkdtemp(prefix="bench-presets-"))
    try:
        for name in networks:
            results["networks"][name] = compare_network(name, plan, work, lambda line: click.echo(line, err=True))
            (output / "presets.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(work / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = markdown(results)
    (output / "presets.md").write_text(text, encoding="utf-8")
    click.echo(text)
    failed = [
        f"{network['title']}: {ENGINES[engine].title}: {state['reason']}"
        for network in results["networks"].values()
        for cell in network["cells"]
        for engine, state in cell["engines"].items()
        if state["status"] == "failed"
    ]
    for line in failed:
        click.echo(line, err=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
