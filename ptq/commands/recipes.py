"""``ptq recipes``."""

from __future__ import annotations

import click

from ptq import console
from ptq.commands.options import json_option
from ptq.recipes import DEFAULT_METHOD, RECIPES


@click.command()
@json_option
def recipes(as_json: bool) -> None:
    """List the methods that 'ptq quantize --method' knows."""
    if as_json:
        entries = [{"name": name, "summary": entry.summary} for name, entry in RECIPES.items()]
        console.print_json({"recipes": entries})
        return
    for name, entry in RECIPES.items():
        click.echo(f"{name}{' (default)' if name == DEFAULT_METHOD else ''}: {entry.summary}")
