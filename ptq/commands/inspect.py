"""``ptq inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ptq import console
from ptq.commands.options import json_option, open_artifact


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def inspect(out: Path, as_json: bool) -> None:
    """Show what OUT is: operators, sites with formats and bits, sizes, recipe, provenance.

    Also what the integer forms of softmax, GELU and LayerNorm cost with OUT's scales, ours and those published for
    I-ViT, and every node that can enter a regime in which a published form fails.
    """
    artifact = open_artifact(out)
    summary = {**artifact.describe(), **artifact.nonlinearities()}
    if as_json:
        console.print_json(summary)
        return
    console.print_table(
        ("site", "kind", "format", "bits", "granularity"),
        [[site[key] for key in ("name", "kind", "format", "bits", "granularity")] for site in summary["sites"]],
    )
    console.print_table(
        ("operator", "kind", "integer form", "in use", "largest error", "in steps", "mean error", "in steps"),
        [_error_row(entry) for entry in summary["approximations"]],
    )
    for line in _regime_lines(summary["regimes"]):
        click.echo(line)
    for key in ("integer_ops", "float_ops", "size_bytes", "float_size_bytes"):
        click.echo(f"{key}: {summary[key]}")
    for key, value in summary["provenance"].items():
        click.echo(f"{key}: {value}")


def _error_row(entry: Mapping[str, Any]) -> list[str]:
    return [
        entry["module"] or entry["operation"],
        entry["kind"],
        entry["nonlinear"],
        "yes" if entry["in_use"] else "",
        f"{entry['largest']:.3g}",
        f"{entry['largest_steps']:.2f}",
        f"{entry['mean']:.3g}",
        f"{entry['mean_steps']:.3f}",
    ]


def _regime_lines(regimes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one paragraph for each kind: what happens, what to do, and the nodes with their numbers."""
    lines: list[str] = []
    for kind in dict.fromkeys(regime["kind"] for regime in regimes):
        nodes = [regime for regime in regimes if regime["kind"] == kind]
        first = nodes[0]
        effect = "changes results" if first["changes_result"] else "results stay right"
        lines.append(f"{kind} ({effect}; {len(nodes)} nodes): {first['summary']}; {first['advice']}")
        for detail in dict.fromkeys(regime["detail"] for regime in nodes):
            places = [regime["source"] or regime["node"] for regime in nodes if regime["detail"] == detail]
            lines.append(f"  {', '.join(places)}: {detail}")
    return lines
