"""``ptq inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from ptq import console
from ptq.commands.options import json_option, open_artifact


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def inspect(out: Path, as_json: bool) -> None:
    """Show what OUT is: operators, sites with formats and bits, sizes, recipe, provenance."""
    summary = open_artifact(out).describe()
    if as_json:
        console.print_json(summary)
        return
    console.print_table(
        ("site", "kind", "format", "bits", "granularity"),
        [[site[key] for key in ("name", "kind", "format", "bits", "granularity")] for site in summary["sites"]],
    )
    for key in ("integer_ops", "float_ops", "size_bytes", "float_size_bytes"):
        click.echo(f"{key}: {summary[key]}")
    for key, value in summary["provenance"].items():
        click.echo(f"{key}: {value}")
