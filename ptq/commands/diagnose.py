"""``ptq diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptq import console
from ptq.commands.options import DATA_HELP, Target, json_option, open_artifact, open_images

#: Layers that the table for people shows.
_SHOWN = 15


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, help=DATA_HELP)
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True, help="Use this many of the images.")
@click.option("--suggestions", type=click.IntRange(0), default=6, show_default=True, help="Sites to try changes of.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write a report, one file.")
@click.option("--speed/--no-speed", default=True, show_default=True, help="Time float and compiled for the report.")
@json_option
def diagnose(out: Path, data: str, limit: int, suggestions: int, html: Path | None, speed: bool, as_json: bool) -> None:
    """Show which layers of OUT lose accuracy, to what, and what to change.

    For each layer the ratio of signal to noise, in decibel, of its weights alone, of the formats of what it reads
    alone, of what it inherits from layers before it, and of all together. Layers are sorted by what their own errors
    do to the network's result, after those whose formats do not fit the images. Suggested changes were made and
    measured on the same images; each comes with the rule to put at the top of a recipe.
    """
    import torch

    from ptq.artifact import refuse_existing
    from ptq.diagnosis import diagnose as run
    from ptq.diagnosis.document import document

    quantized = open_artifact(out)
    if html is not None:
        refuse_existing(html)
    target = Target(quantized, None)
    opened = open_images(data, target, limit, False, {})
    batches = list(opened.batches(limit))
    images = torch.cat([batch for batch, _ in batches])
    labels = torch.cat([found for _, found in batches if found is not None]) if opened.labels is not None else None
    if labels is not None:
        opened.check_labels(quantized.calibrated.graph.shapes()[quantized.calibrated.graph.outputs[0][1]][-1])
    with console.progress() as report:
        found = run(quantized, images, labels, suggestions=suggestions, progress=report)
    described = document(found)
    if html is not None:
        from ptq.diagnosis.report import write_report

        write_report(found, described, html, _timings(target, images) if speed else [])
        console.note(f"wrote {html}")
    if as_json:
        console.print_json(described)
        return
    _print(described)


def _print(described: dict[str, Any]) -> None:
    layers = described["layers"]
    console.print_table(
        ("layer", "operator", "share of the error", "weight", "activation", "inherited", "total"),
        [
            (
                layer["name"] + ("" if layer["fits"] else " (!)"),
                layer["op"],
                f"{100 * layer['share']:.1f} %",
                *(_db(layer["snr_db"][key]) for key in ("weight", "activation", "inherited", "total")),
            )
            for layer in layers[:_SHOWN]
        ],
    )
    if len(layers) > _SHOWN:
        click.echo(f"and {len(layers) - _SHOWN} layers with a share of at most {100 * layers[_SHOWN]['share']:.1f} %")
    if not all(layer["fits"] for layer in layers):
        click.echo(
            "(!): a format whose range does not suit these images; calibrate again, or compare the preprocessing"
        )
    if described["suggestions"]:
        console.print_table(
            ("site", "change", "gain", "result", "top-1"),
            [
                (
                    entry["site"],
                    entry["change"],
                    f"{entry['gain_db']:.2f} dB",
                    _db(entry["output_snr_db"]),
                    _percent(entry["top1"]),
                )
                for entry in described["suggestions"]
            ],
        )
    else:
        click.echo("no change that was tried makes the result better")
    for line in _closing(described):
        click.echo(line)


def _closing(described: dict[str, Any]) -> list[str]:
    output = described["output"]
    accuracy = "" if output["top1"] is None else f", top-1 {output['top1']:.2f} % (float {output['float_top1']:.2f} %)"
    agreement = f"same first choice as float {100 * output['agreement']:.2f} %"
    lines = [f"result: {_db(output['snr_db'])}, {agreement}{accuracy}, {described['images']} images"]
    if described["combined"] is not None:
        combined = described["combined"]
        accuracy = "" if combined["top1"] is None else f", top-1 {combined['top1']:.2f} %"
        lines.append(f"with all suggestions: {_db(combined['output_snr_db'])}{accuracy}")
        lines.append("the rules for a recipe are in --json and --html")
    return lines


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _timings(target: Target, images: Any) -> list[dict[str, Any]]:
    import dataclasses
    import os

    import torch

    from ptq.benchmarking import time_backends
    from ptq.commands.backends import open_backend

    workers = len(os.sched_getaffinity(0))
    torch.set_num_threads(workers)
    runs = {backend: open_backend(target, backend, workers) for backend in ("float", "tvm")}
    return [dataclasses.asdict(timing) for timing in time_backends(runs, images[:1], workers, 10)]
