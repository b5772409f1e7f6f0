"""``ptq verify``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from ptq import console
from ptq.commands.options import DATA_HELP, Target, batch_option, json_option, open_artifact, open_images

_BACKENDS = ("simulate", "tvm", "onnx-integer", "onnxruntime")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", required=True, help=DATA_HELP)
@click.option(
    "--backend", "backends", type=click.Choice(_BACKENDS), multiple=True, help="Repeat for several; all by default."
)
@click.option("--limit", type=click.IntRange(1), help="Use this many of the images.")
@batch_option
@json_option
def verify(out: Path, data: str, backends: tuple[str, ...], limit: int | None, batch_size: int, as_json: bool) -> None:
    """Compare backends with the interpreter; exit code 1 if one breaks its promise.

    tvm and onnx-integer promise every bit, simulate the interpreter's numbers to the rounding of float32. onnxruntime
    runs the file with quantize and dequantize nodes, whose LayerNorm, softmax and GELU are float: it promises
    nothing, and the table says how far it is, in 8-bit steps of the largest result.
    """
    from ptq.commands.backends import open_backend
    from ptq.verification import verify_backends

    target = Target(open_artifact(out), None)
    images = open_images(data, target, limit, False, {})
    chosen = tuple(dict.fromkeys(backends)) or _available(target)
    runs = {backend: open_backend(target, backend) for backend in chosen}
    with console.progress() as report:
        results = verify_backends(runs, open_backend(target, "integer"), images, batch_size, report)
    if as_json:
        console.print_json([dataclasses.asdict(result) for result in results])
    else:
        rows = [
            (
                result.backend,
                result.promise,
                ("yes" if result.kept else "NO") if result.promise != "none" else "-",
                "every bit" if result.equal else f"up to {result.max_steps:.3g} steps",
                f"{100 * result.agreement:.2f} %",
            )
            for result in results
        ]
        console.print_table(("backend", "promises", "kept", "equal to the interpreter", "same first choice"), rows)
        click.echo(f"{results[0].n} images; a step is 1/127 of the interpreter's largest result")
    sys.exit(0 if all(result.kept for result in results) else 1)


def _available(target: Target) -> tuple[str, ...]:
    assert target.quantized is not None
    published = target.quantized.calibrated.recipe.nonlinear == "published"
    return tuple(backend for backend in _BACKENDS if not (published and backend == "onnxruntime"))
