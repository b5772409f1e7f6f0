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
    help="For onnx: the runtime, onnxruntime (default), openvino, tensorrt or portable. For tvm: cpu (default) is this "
    "machine; else a name such as x86-64-avx2, aarch64-dotprod, cuda or cuda:sm_90; an unknown name lists all.",
)
@click.option("--int4", is_flag=True, help="For onnx: store weights of at most 4 bits as int4, with float activations.")
@click.option("--batch-size", type=click.IntRange(1), help="For onnx: the only one that the file takes.  [any]")
@click.option(
    "--tiles",
    type=click.Path(dir_okay=False, path_type=Path),
    help="For tvm on cuda: what ptq tune wrote.  [the default database, if it exists]",
)
def export(
    out: Path,
    format_name: str,
    output: Path,
    target: str | None,
    int4: bool,
    batch_size: int | None,
    tiles: Path | None,
) -> None:
    """Export OUT: as an INT8 ONNX file, a compiled bundle that runs without torch, a program of torch, or weights.

    onnx has quantize and dequantize nodes where the runtime of --target makes integer kernels of them. onnx-integer is
    the integer program itself in standard integer operators: slower, and equal to the interpreter in every bit. pt2 is
    a torch.export program for torch.compile, compressed-tensors the weights alone, for other tools to read.
    """
    from ptq.artifact import refuse_existing
    from ptq.onnx_export.layout import DEFAULT_TARGET

    if format_name != "onnx" and (int4 or batch_size is not None):
        raise click.UsageError(f"--int4 and --batch-size are for --format onnx, not for {format_name}")
    if format_name not in ("onnx", "tvm") and target is not None:
        raise click.UsageError(f"--format {format_name} is the same for every target; leave out --target")
    if tiles is not None and (format_name != "tvm" or (target or "").partition(":")[0] != "cuda"):
        raise click.UsageError("--tiles is for --format tvm with --target cuda")
    quantized = open_artifact(out)
    refuse_existing(output)
    if format_name == "onnx":
        quantized.export_onnx(output, target or DEFAULT_TARGET, int4=int4, batch_size=batch_size)
    elif format_name == "onnx-integer":
        quantized.export_onnx_integer(output)
    elif format_name == "pt2":
        quantized.export_pt2(output)
    elif format_name == "compressed-tensors":
        quantized.export_compressed_tensors(output)
    else:
        quantized.export_tvm(output, target or "cpu", tiles=tiles)
    click.echo(f"wrote {output}")
