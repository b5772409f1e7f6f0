"""``ptq export``."""

from __future__ import annotations

from pathlib import Path

import click

from ptq.commands.options import open_artifact

FORMATS = ("onnx", "onnx-integer", "tvm", "pt2", "compressed-tensors")
_OUTPUT_HELP = "File (ONNX, pt2) or directory (tvm, compressed-tensors)."


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "format_name", type=click.Choice(FORMATS), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help=_OUTPUT_HELP)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="For tvm: cpu is this machine; else a name such as x86-64-avx2 or aarch64-dotprod; an unknown name lists all.",
)
def export(out: Path, format_name: str, output: Path, target: str) -> None:
    """Export OUT: as an INT8 ONNX file, a compiled bundle that runs without torch, a program of torch, or weights.

    onnx has quantize and dequantize nodes, which runtimes turn into their own integer kernels. onnx-integer is the
    integer program itself in standard integer operators: slower, and equal to the interpreter in every bit. pt2 is a
    torch.export program for torch.compile, compressed-tensors the weights alone, for other tools to read.
    """
    from ptq.artifact import refuse_existing

    quantized = open_artifact(out)
    refuse_existing(output)
    if format_name == "onnx":
        quantized.export_onnx(output)
    elif format_name == "onnx-integer":
        quantized.export_onnx_integer(output)
    elif format_name == "pt2":
        quantized.export_pt2(output)
    elif format_name == "compressed-tensors":
        quantized.export_compressed_tensors(output)
    else:
        quantized.export_tvm(output, target)
    click.echo(f"wrote {output}")
