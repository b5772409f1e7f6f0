"""``ptq search``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptq import console
from ptq.commands.options import BANK_HELP, DATA_HELP, batch_option, json_option, preprocessing_options
from ptq.recipes import DEFAULT_METHOD, RECIPES
from quantizers.errors import UsageError

if TYPE_CHECKING:
    from ptq.mixed_precision import SearchResult
    from ptq.sources import LoadedModel

_UNLABELLED = (
    "--max-drop measures accuracy and {name} has no labels: use a folder with a sub-folder for each class or a .npz "
    "with 'labels', or give --size-budget or --latency-budget, which need none"
)
_FEATURES = (
    "{model} gives features, no classes: name labelled images whose features vote with --bank DATA, "
    "or give --size-budget or --latency-budget"
)


def _widths(_: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of widths such as 3,4,6,8", param=parameter) from error


@click.command()
@click.argument("model")
@click.option("--data", required=True, help=f"Images to calibrate and, labelled, to measure with. {DATA_HELP}")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option(
    "--bits", default="3,4,6,8", show_default=True, callback=_widths, help="Widths of weights to choose from."
)
@click.option("--max-drop", type=float, help="Points of top-1 that may be lost, a standard error included.")
@click.option("--size-budget", type=float, help="Share, 0 to 1, of the bytes of the weights at 8 bits.")
@click.option("--latency-budget", type=float, help="Milliseconds of all kernels at batch 1.")
@click.option("--activation-bits", default=8, show_default=True, help="Activation bits, 2 to 8.")
@click.option("--method", default=DEFAULT_METHOD, show_default=True, help=f"One of {', '.join(RECIPES)}.")
@click.option(
    "--store",
    type=click.Choice(("bundle", "artifact")),
    default="bundle",
    show_default=True,
    help="Where bytes count: compiled bundles hold 3, 4 or 8 bits a code, artifacts 2 to 6 or 8.",
)
@click.option("--bank", help=BANK_HELP)
@click.option("--num-samples", type=click.IntRange(1), default=32, show_default=True, help="Images to calibrate with.")
@click.option("--limit", type=click.IntRange(1), help="Measure on this many of the other images.")
@click.option("--seed", default=0, show_default=True, help="Of both choices of images.")
@click.option("--threads", type=click.IntRange(1), help="Worker threads that are timed; all cores by default.")
@batch_option
@preprocessing_options
@json_option
def search(
    model: str,
    data: str,
    output: Path,
    bits: tuple[int, ...],
    max_drop: float | None,
    size_budget: float | None,
    latency_budget: float | None,
    activation_bits: int,
    method: str,
    store: str,
    bank: str | None,
    num_samples: int,
    limit: int | None,
    seed: int,
    threads: int | None,
    batch_size: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Choose the bits of every weight of MODEL, for an accuracy, a size or a time, and write a recipe.

    Give exactly one goal. Some images of DATA calibrate, the others measure: --num-samples and --seed choose the
    first as 'ptq quantize' does, so that it makes the network that was measured. OUT gets recipe.yaml, search.json
    and front.svg.
    """
    from ptq.artifact import refuse_existing, write_directory
    from ptq.data import open_data
    from ptq.mixed_precision import search as run
    from ptq.mixed_precision.document import document
    from ptq.mixed_precision.goal import Goal
    from ptq.mixed_precision.plot import front_svg
    from ptq.recipe import dump_recipe
    from ptq.sources import load_model

    goal = Goal(max_drop, size_budget, latency_budget)
    refuse_existing(output)
    resize = settings.pop("resize")
    loaded = load_model(model, settings)
    console.note(f"preprocessing: {loaded.preprocessing.describe()}")
    known = {"seed": seed, "resize": resize, "label_names": loaded.label_names}
    calibration = open_data(data, loaded.preprocessing, limit=num_samples, **known)
    if goal.max_drop is not None and calibration.labels is None:
        raise UsageError(_UNLABELLED.format(name=calibration.name))
    if goal.max_drop is not None and bank is None and loaded.num_classes is None:
        raise UsageError(_FEATURES.format(model=loaded.source))
    measured = None
    can_measure = calibration.labels is not None and (bank is not None or loaded.num_classes is not None)
    # A budget can do without; of too few images an accuracy says so.
    if can_measure and (goal.max_drop is not None or len(calibration) == num_samples < _count(data, loaded, resize)):
        classes = loaded.num_classes if bank is None else None
        measured = open_data(data, loaded.preprocessing, limit=limit, besides=num_samples, num_classes=classes, **known)
    voters = None if bank is None or measured is None else open_data(bank, loaded.preprocessing, resize=resize)
    console.note(
        f"{data}: {len(calibration)} images calibrate, {0 if measured is None else len(measured)} others measure"
    )
    with console.progress() as report:
        found = run(
            loaded.module,
            calibration.batches(batch_size),
            None if measured is None else measured.batches(batch_size),
            max_drop=max_drop,
            size_budget=size_budget,
            latency_budget=latency_budget,
            bits=bits,
            activation_bits=activation_bits,
            method=method,
            store=store,
            bank=None if voters is None else voters.batches(batch_size),
            threads=threads,
            example_inputs=loaded.example_inputs,
            preprocessing=loaded.preprocessing,
            provenance={
                "source": loaded.source,
                "source_weights_sha256": loaded.weights_sha256,
                "data": calibration.name,
                "seed": str(seed),
            },
            total=None if measured is None else len(measured),
            progress=report,
        )
    described = document(found)
    write_directory(
        output,
        {
            "recipe.yaml": dump_recipe(found.recipe).encode(),
            "search.json": (json.dumps(described, indent=1) + "\n").encode(),
            "front.svg": front_svg(described).encode(),
        },
    )
    if as_json:
        console.print_json({"output": str(output), **described})
        return
    _print(found, described)
    images = ["--num-samples", str(num_samples), "--seed", str(seed)]
    again = shlex.join([model, "--data", data, *images, "--recipe", str(output / "recipe.yaml")])
    click.echo(f"wrote {output}; its network: ptq quantize {again} -o OUT")


def _count(data: str, loaded: LoadedModel, resize: bool) -> int:
    from ptq.data import open_data

    return len(open_data(data, loaded.preprocessing, resize=resize))


def _print(found: SearchResult, described: dict[str, Any]) -> None:
    chosen = described["chosen"]
    rows = [("8 bits", described["baseline"]), *(("", point) for point in described["front"])]
    if not any(point["widths"] == chosen["widths"] for point in described["front"]):
        rows.append(("", chosen))
    console.print_table(
        ("", "smaller", "bundle, MB", "artifact, MB", "kernels, ms", "predicted", "drop", "recipe, run anew"),
        [
            (
                "chosen" if point["widths"] == chosen["widths"] else name,
                f"{point['ratio']:.2f} x",
                f"{point['bundle_bytes'] / 1e6:.3f}",
                f"{point['artifact_bytes'] / 1e6:.3f}",
                f"{point['milliseconds']:.3f}",
                f"{point['snr_db']:.1f} dB",
                _points(point["drop"]),
                _points(point["final"]),
            )
            for name, point in rows
        ],
    )
    counts: dict[int, int] = {}
    for width in chosen["widths"].values():
        counts[width] = counts.get(width, 0) + 1
    widths = ", ".join(f"{count} of {width} bits" for width, count in sorted(counts.items()))
    line = f"{found.goal.describe()}: {chosen['ratio']:.2f} times smaller than weights of 8 bits; weights: {widths}"
    final = chosen["final"]
    if final is not None:
        line += (
            f"; top-1 {final['top1']:.2f} % (float {final['float_top1']:.2f} %), drop {_points(final)} points, "
            f"{final['images']} images"
        )
    click.echo(line)


def _points(drop: dict[str, Any] | None) -> str:
    return "" if drop is None else f"{drop['points']:.2f} +- {drop['standard_error']:.2f}"
