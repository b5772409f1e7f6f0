"""``ptq evaluate``."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from ptq import console
from ptq.commands.options import (
    BACKENDS,
    BANK_HELP,
    DATA_HELP,
    batch_option,
    json_option,
    open_images,
    open_target,
    preprocessing_options,
)


@click.command()
@click.argument("target")
@click.option("--data", required=True, help=DATA_HELP)
@click.option("--backend", type=click.Choice(BACKENDS), default="integer", show_default=True)
@click.option("--bank", help=BANK_HELP)
@click.option("--limit", type=click.IntRange(1), help="Use this many of the images.")
@batch_option
@preprocessing_options
@json_option
def evaluate(
    target: str,
    data: str,
    backend: str,
    bank: str | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure top-1 of TARGET (a model, or what 'ptq quantize' wrote) and its agreement with float.

    Of a model that gives features, the answer is the class of its nearest neighbours among the images of --bank.
    """
    from ptq.commands.backends import open_backend
    from ptq.evaluate import evaluate as run_evaluation
    from ptq.nearest_neighbours import make_bank

    resize = settings.pop("resize")
    opened = open_target(target, settings)
    images = open_images(data, opened, limit, resize, settings, features=bank is not None)
    console.note(f"preprocessing: {images.preprocessing.describe()}")
    float_run = open_backend(opened, "float")
    run = float_run if backend == "float" else open_backend(opened, backend)
    voters = None
    if bank is not None:
        voters = make_bank(
            float_run, open_images(bank, opened, None, resize, settings, features=True).batches(batch_size)
        )
    with console.progress() as report:
        result = run_evaluation(backend, run, float_run, images, batch_size, report, voters)
    if as_json:
        console.print_json(dataclasses.asdict(result))
        return
    top1, float_top1 = ("unlabelled" if v is None else f"{v:.2f} %" for v in (result.top1, result.float_top1))
    console.print_table(
        ("backend", "images", "top-1", "float top-1", "agreement"),
        [(result.backend, result.n, top1, float_top1, f"{100 * result.agreement:.2f} %")],
    )
