"""``ptq quantize``."""

from __future__ import annotations

import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from ptq import console
from ptq.commands.options import DATA_HELP, batch_option, json_option, preprocessing_options
from ptq.recipes import DEFAULT_METHOD, RECIPES, named_recipe

#: Powers of ten, as disks and files are labelled.
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def _byte_count(_: click.Context, parameter: click.Parameter, text: str | None) -> int:
    if text is None:
        from calibration.cache import DEFAULT_MEMORY_LIMIT

        return DEFAULT_MEMORY_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower(), re.ASCII)
    unit = None if match is None else _UNITS.get(match[2])
    if match is None or unit is None:
        raise click.BadParameter(
            f"{text!r} is no number of bytes; expected one such as 500MB, 2GB or 1000000", param=parameter
        )
    return int(Fraction(match[1]) * unit)


@click.command()
@click.argument("model")
@click.option("--data", required=True, help=f"Calibration images, labels unused. {DATA_HELP}")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write; must not exist."
)
@click.option("--method", default=DEFAULT_METHOD, show_default=True, help=f"One of {', '.join(RECIPES)}.")
@click.option("--bits", default="w8a8", show_default=True, help="Weight and activation bits, 2 to 8 each.")
@click.option(
    "--recipe", "recipe_path", type=click.Path(path_type=Path), help="YAML recipe instead of method and bits."
)
@click.option("--num-samples", type=click.IntRange(1), help="Use this many of the images.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of images.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option(
    "--memory-limit",
    callback=_byte_count,
    help="Activations held in memory, such as 500MB or 2GB, 128 MiB by default; the rest goes to files.",
)
@batch_option
@preprocessing_options
@json_option
def quantize(
    model: str,
    data: str,
    output: Path,
    method: str,
    bits: str,
    recipe_path: Path | None,
    num_samples: int | None,
    seed: int,
    resume: bool,
    memory_limit: int,
    batch_size: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL: trace, calibrate, integerize, and write the directory OUT.

    MODEL is timm:NAME, timm:NAME@weights.safetensors, hf:DIRECTORY_OR_ID, an exported program (.pt2),
    package.module:factory, or a directory with config.json and model.safetensors. The batch size changes
    how images are read, never the result.
    """
    from ptq import api
    from ptq.artifact import refuse_existing
    from ptq.data import open_data
    from ptq.recipe import load_recipe
    from ptq.sources import load_model

    refuse_existing(output)
    recipe = named_recipe(method, bits) if recipe_path is None else load_recipe(recipe_path)
    resize = settings.pop("resize")
    loaded = load_model(model, settings)
    console.note(f"preprocessing: {loaded.preprocessing.describe()}")
    images = open_data(data, loaded.preprocessing, limit=num_samples, seed=seed, resize=resize)
    work_dir = output.with_name(f".{output.name}.partial")
    if not resume:
        shutil.rmtree(work_dir, ignore_errors=True)
    with console.progress() as report:
        quantized = api.quantize(
            loaded.module,
            (batch for batch, _ in images.batches(batch_size)),
            recipe=recipe,
            example_inputs=loaded.example_inputs,
            preprocessing=loaded.preprocessing,
            provenance={
                "source": loaded.source,
                "source_weights_sha256": loaded.weights_sha256,
                "data": images.name,
                "seed": str(seed),
            },
            total=len(images),
            progress=report,
            work_dir=work_dir,
            memory_limit=memory_limit,
        )
    quantized.save(output)
    shutil.rmtree(work_dir, ignore_errors=True)
    summary = quantized.describe()
    if as_json:
        console.print_json({"output": str(output), **summary})
        return
    click.echo(
        f"wrote {output}: recipe {recipe.name}, {summary['integer_ops']} integer operators, "
        f"{summary['float_ops']} float, {summary['size_bytes'] / 1e6:.2f} MB "
        f"(float {summary['float_size_bytes'] / 1e6:.2f} MB)"
    )
