"""``ptq check``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptq import console
from ptq.commands.options import json_option

if TYPE_CHECKING:
    from ptq.deployment import Deployment

_RUNTIMES = ("onnxruntime", "openvino")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--runtime", type=click.Choice(_RUNTIMES), default=_RUNTIMES[0], show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--min-integer-share",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Exit with code 1 where fewer of the products, 0 to 1, run in integers.",
)
@json_option
def check(file: Path, runtime: str, threads: int, min_integer_share: float, as_json: bool) -> None:
    """Show what a runtime makes of an ONNX FILE: which products became integer, which stayed float, and why.

    Products are matrix products and convolutions. FILE need not come from this tool. Findings are read from the file:
    what keeps a product from integers, here or in another runtime, and what gives wrong results.
    """
    from ptq.deployment import check_deployment

    found = check_deployment(file, runtime, threads)
    if as_json:
        console.print_json(dataclasses.asdict(found))
    else:
        _print(found)
    if found.integer_share < min_integer_share:
        console.note(f"{100 * found.integer_share:.1f} % of the products run in integers, less than asked for")
        sys.exit(1)


def _print(found: Deployment) -> None:
    console.print_table(
        ("product", "operator", "runs as", "kernel", "ms"),
        [
            (
                report.module or report.name,
                report.op,
                "integer" if report.integer else "FLOAT",
                report.kernel,
                "" if report.milliseconds is None else f"{report.milliseconds:.3f}",
            )
            for report in found.products
        ],
    )
    others = sorted(found.others.items(), key=lambda entry: -entry[1][0])
    console.print_table(
        ("other kernels", "number", "ms"), [(kind, count, f"{time:.3f}") for kind, (time, count) in others]
    )
    for report in found.products:
        for finding in report.findings:
            click.echo(f"{report.module or report.name} ({report.op} {report.name}): {finding}")
    integer = sum(report.integer for report in found.products)
    click.echo(f"{found.runtime} {found.version}: {integer} of {len(found.products)} products run in integers")
