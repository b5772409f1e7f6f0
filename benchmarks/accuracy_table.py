"""The rows of the accuracy benchmark and the tables made of them, as Markdown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from ptq.recipes import RECIPES

METHODS = tuple(name for name in RECIPES if name != "ivit")
BITS = ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3")
NETWORKS = ("fashion", "dinov2")


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one width, calibrated with one seed; accuracies in percent, of all ``queries`` and of the first."""

    network: str
    method: str
    bits: str
    seed: int
    float_accuracy: float
    simulate: float | None
    integer: float
    integer_same_queries: float | None
    queries: int | None
    float_all: float | None
    integer_all: float | None
    cosine: float | None
    seconds: float
    peak_megabytes: float
    levels: int
    code: str


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown, the mean over seeds and in brackets their spread (largest minus smallest)."""
    lines = []
    for network in NETWORKS:
        mine = [row for row in rows if row.network == network]
        if not mine:
            continue
        lines += ["", f"{network}: float {mine[0].float_accuracy:.1f}", ""]
        extra = network == "dinov2"
        head = ["method", "bits", "levels", "seeds", "simulate", "integer, same images", "integer"]
        head += [f"integer, {mine[0].queries:,} queries", "cosine"] if extra else []
        head += ["seconds", "peak MB"]
        lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
        for bits in BITS:
            for method in METHODS:
                group = [row for row in mine if (row.method, row.bits) == (method, bits)]
                if not group:
                    continue
                cells = [method, bits, str(group[0].levels), str(len(group))]
                names = ["simulate", "integer_same_queries", "integer"]
                names += ["integer_all", "cosine"] if extra else []
                cells += [_cell([getattr(row, name) for row in group], 3 if name == "cosine" else 1) for name in names]
                cells += [_cell([row.seconds for row in group], 0), f"{max(r.peak_megabytes for r in group):.0f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> str:
    """Return methods by widths as Markdown: accuracy in integers, mean over seeds and in brackets the spread."""
    lines = []
    for network in NETWORKS:
        mine = [row for row in rows if row.network == network]
        if not mine:
            continue
        seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in mine}))
        lines += _by_width(mine, f"{network}: float {mine[0].float_accuracy:.1f}; seeds {seeds}", "integer")
        if mine[0].float_all is not None:
            heading = f"{network}, all {mine[0].queries:,} queries: float {mine[0].float_all:.1f}; seeds {seeds}"
            lines += _by_width(mine, heading, "integer_all")
    return "\n".join(lines) + "\n"


def _by_width(rows: list[Row], heading: str, measure: str) -> list[str]:
    widths = [bits for bits in BITS if any(row.bits == bits for row in rows)]
    lines = ["", heading, "", f"| method | {' | '.join(widths)} |", f"| --- |{' --- |' * len(widths)}"]
    for method in METHODS:
        groups = [[row for row in rows if (row.method, row.bits) == (method, bits)] for bits in widths]
        if any(groups):
            cells = (_cell([getattr(row, measure) for row in group], 1) for group in groups)
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ({max(known) - min(known):.{digits}f})" if len(known) > 1 else mean
