"""Error of every integer form of softmax, GELU and LayerNorm against float, over the ranges of their inputs.

    python benchmarks/nonlinearity_errors.py

Prints the tables of docs/integer-nonlinearities.md: both forms, through the nodes that integerize writes. Everything is
seeded; the same code prints the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch

from calibration.approximation import LayerNorm, float_probabilities, probabilities_of, unary_error
from calibration.search.ranges import search_activation
from calibration.statistics import empty, update
from quantizers.codebook import uniform_codebook
from quantizers.integer.ivit import CODE_START, PAPER_START
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams

KEYS, CHANNELS, ROWS = 197, 384, 256
Row = dict[str, object]


def softmax_table() -> Iterator[Row]:
    """Rows of normal scores, quantized to 8 bits by their extremes."""
    forms = {
        "corrected": RowRelativeQParams(uniform_codebook(8)),
        "published, 16 bits": ShiftmaxQParams(16),
        "published, 8 bits": ShiftmaxQParams(8),
    }
    for deviation in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        scores = np.random.default_rng(0).normal(0, deviation, (ROWS, KEYS))
        # Equal scores have no range of their own; any scale gives equal codes.
        source = _minmax(scores if deviation else np.array([-4.0, 4.0]), 8)
        codes = np.rint(scores / source.scale[0]).clip(source.qmin, source.qmax).astype(np.int64)
        wanted = float_probabilities(codes, source)
        for name, qparams in forms.items():
            found = probabilities_of(codes, source, qparams)
            error = np.abs(found - wanted)
            yield {
                "deviation of the scores": deviation,
                "scale": source.scale[0],
                "form": name,
                "largest error": float(error.max()),
                "mean error": float(error.mean()),
                "distance of the rows": float(error.sum(-1).mean() / 2),
                "sum of a row": float(found.sum(-1).mean()),
            }


def gelu_table() -> Iterator[Row]:
    """Every code of an 8-bit input, in rows of every maximum from zero on."""
    for largest in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 40.0):
        source = _minmax(np.array([-largest, largest]), 8)
        target = source
        row: Row = {"largest input": largest, "scale": source.scale[0]}
        for nonlinear in ("corrected", "published"):
            error = unary_error("gelu", source, target, nonlinear)
            row[f"{nonlinear}: largest error"] = float(error.max())
            row[f"{nonlinear}: in steps"] = float(error.max() / target.scale[0])
            row[f"{nonlinear}: mean in steps"] = float(error.mean() / target.scale[0])
        yield row


def layer_norm_table() -> Iterator[Row]:
    """Rows of normal 16-bit codes around a mean, gamma 1, beta 0, result in 8 bits up to 5 deviations."""
    source, target = UniformQParams((2.0**-10,), 0, -32768, 32767), _minmax(np.array([-5.0, 5.0]), 8)
    layer = LayerNorm(torch.ones(CHANNELS), torch.zeros(CHANNELS), 1e-12, source, target)
    forms = {
        "corrected": ("corrected", PAPER_START),
        "published": ("published", PAPER_START),
        "published, start 2^16": ("published", CODE_START),
    }
    for deviation in (0.5, 1, 2, 4, 8, 32, 128, 1024, 8192):
        rng = np.random.default_rng(0)
        codes = rng.normal(rng.normal(0, deviation, (ROWS, 1)), deviation, (ROWS, CHANNELS))
        codes = np.rint(codes).clip(source.qmin, source.qmax).astype(np.int64)
        row: Row = {"deviation, codes": deviation}
        for name, (nonlinear, start) in forms.items():
            error = layer.error(codes, nonlinear, start)
            row[f"{name}: largest error"] = float(error.max())
            row[f"{name}: in steps"] = float(error.max() / target.scale[0])
            row[f"{name}: mean in steps"] = float(error.mean() / target.scale[0])
        yield row


def _minmax(values: np.ndarray, bits: int) -> UniformQParams:
    return search_activation(update(empty(), torch.from_numpy(values.astype(np.float32))), QuantSpec(bits))


def print_markdown(rows: Sequence[Row]) -> None:
    """Print rows of equal keys as a table."""
    click.echo("| " + " | ".join(rows[0]) + " |")
    click.echo("| " + " | ".join("---" for _ in rows[0]) + " |")
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        click.echo("| " + " | ".join(cells) + " |")


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here too.")
def main(json_path: Path | None) -> None:
    """Measure and print."""
    tables = {"softmax": softmax_table, "gelu": gelu_table, "layer_norm": layer_norm_table}
    results = {name: list(table()) for name, table in tables.items()}
    for name, rows in results.items():
        click.echo(f"\n{name}\n")
        print_markdown(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
