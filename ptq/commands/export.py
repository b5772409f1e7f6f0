"""``ptq export``."""

from __future__ import annotations

from pathlib import Path

import click

from ptq.commands.options import open_artifact


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "format_name", type=click.Choice(("onnx", "tvm")), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File (onnx) or directory (tvm).")
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="For tvm: cpu is this machine; else a name such as x86-64-avx2 or aarch64-dotprod; an unknown name lists all.",
)
def export(out: Path, format_name: str, output: Path, target: str) -> None:
    """Export OUT as an INT8 ONNX file, or as a compiled bundle that runs without torch."""
    from ptq.artifact import refuse_existing

    quantized = open_artifact(out)
    refuse_existing(output)
    if format_name == "onnx":
        quantized.export_onnx(output)
    else:
        quantized.export_tvm(output, target)
    click.echo(f"wrote {output}")
