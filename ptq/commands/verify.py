"""``ptq verify``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from ptq import console
from ptq.commands.options import DATA_HELP, Target, batch_option, json_option, open_artifact, open_images


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, help=DATA_HELP)
@click.option("--backend", type=click.Choice(("tvm", "onnx-integer")), default="tvm", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Use this many of the images.")
@batch_option
@json_option
def verify(out: Path, data: str, backend: str, limit: int | None, batch_size: int, as_json: bool) -> None:
    """Compare a backend with the interpreter, bit for bit; exit code 1 if they differ."""
    from ptq.commands.backends import open_backend
    from ptq.verification import verify_backend

    target = Target(open_artifact(out), None)
    images = open_images(data, target, limit, False, {})
    run, reference = open_backend(target, backend), open_backend(target, "integer")
    with console.progress() as report:
        result = verify_backend(backend, run, reference, images, batch_size, report)
    if as_json:
        console.print_json(dataclasses.asdict(result))
    else:
        verdict = "equal in every bit" if result.equal else f"DIFFERENT, by up to {result.max_abs_diff:g}"
        click.echo(f"{backend} and the interpreter on {result.n} images: {verdict}")
    sys.exit(0 if result.equal else 1)
