"""``ptq tune``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ptq import console
from ptq.commands.options import json_option, open_artifact


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(("cuda",)), default="cuda", show_default=True)
@click.option("--budget", type=click.FloatRange(min=0), default=300, show_default=True, help="Seconds for all of it.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8, 64), show_default=True)
@click.option("--rpc", metavar="HOST:PORT", help="Measure on the machine where ptq serve runs, instead of this one.")
@click.option("--database", type=click.Path(dir_okay=False, path_type=Path), help="File to add to.  [the default one]")
@json_option
def tune(
    out: Path,
    target: str,
    budget: float,
    batches: tuple[int, ...],
    rpc: str | None,
    database: Path | None,
    as_json: bool,
) -> None:
    """Measure on a GPU how the products of OUT's linear layers are cut best, and keep it for later builds.

    Exports and compilations for cuda read what was found. Results are the same integers with every tile; each is
    compared with the interpreter before it is timed. Needs nvcc here, and a GPU here or, with --rpc, there.
    """
    from ptq.tuning import tune_quantized

    del target
    quantized = open_artifact(out)
    found = tune_quantized(quantized, batches, budget, rpc, database, lambda line: click.echo(line, err=True))
    if as_json:
        console.print_json([dataclasses.asdict(entry) for entry in found.entries])
    else:
        rows = []
        for entry in found.entries:
            shape, tile = entry.shape, entry.tile
            gains = ", ".join(f"{entry.default_ms[batch] / max(entry.ms[batch], 1e-9):.2f}" for batch in batches)
            cut = f"{tile.rows}x{tile.columns}x{tile.depth}"
            rows.append(
                (
                    shape.columns,
                    shape.depth,
                    shape.bits,
                    cut,
                    f"{tile.row_warps}x{tile.column_warps}",
                    tile.stages,
                    gains,
                )
            )
        titles = (
            "columns",
            "depth",
            "bits",
            "tile",
            "warps",
            "stages",
            f"faster at batch {', '.join(map(str, batches))}",
        )
        console.print_table(titles, rows)
    click.echo(f"wrote {found.path}", err=as_json)
