"""The report of a diagnosis: one HTML file with its data, its drawings and its style, that needs no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from calibration.diagnosis.readings import SiteReading, level_range
from calibration.statistics import Histogram
from ptq.artifact import write_file
from ptq.diagnosis import Diagnosis
from ptq.recipe import dump_recipe
from quantizers.codebook import CodebookQParams
from quantizers.uniform import UniformQParams

#: Bins of a drawn histogram, and numbers of levels up to which each is drawn.
_BINS, _DRAWN_LEVELS = 96, 64
#: Significant digits of what is only drawn.
_DIGITS = 4


def write_report(
    diagnosis: Diagnosis, described: Mapping[str, Any], path: Path, timings: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the report beside its place, then rename it there.

    Args:
        diagnosis: what was measured.
        described: of :func:`ptq.diagnosis.document.document`.
        path: the file; its directory is made if absent.
        timings: of backends, fields of :class:`ptq.benchmarking.Timing`.

    Raises:
        UsageError: the path exists.
    """
    write_file(path, report_text(diagnosis, described, timings).encode())


def report_text(diagnosis: Diagnosis, described: Mapping[str, Any], timings: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the report as HTML; equal arguments give equal text."""
    data = {
        **described,
        "timings": list(timings),
        "recipe_yaml": dump_recipe(diagnosis.quantized.calibrated.recipe),
        "histograms": {
            site.name: _drawn_histogram(site.histogram, site)
            for site in diagnosis.readings.sites
            if site.histogram is not None
        },
        "channels": [
            {"module": norm.module, "traced": _rounded(norm.traced), "rewritten": _rounded(norm.rewritten)}
            for norm in diagnosis.channels
        ],
        "heads": [
            {
                "module": attention.module,
                "entropy": _rounded(attention.entropy),
                "snr_db": _rounded([-10 * math.log10(max(share, 1e-13)) for share in attention.error]),
            }
            for attention in diagnosis.heads
        ],
    }
    # A text such as </script> inside the data would end it.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    pieces = {name: _resource(name) for name in ("report.html", "report.css", "report.js")}
    title = html.escape(str(described["recipe"]["name"]))
    return (
        pieces["report.html"]
        .replace("{{title}}", title)
        .replace("{{style}}", pieces["report.css"])
        .replace("{{script}}", pieces["report.js"])
        .replace("{{data}}", embedded)
    )


def _resource(name: str) -> str:
    return (resources.files("ptq.diagnosis") / name).read_text(encoding="utf-8")


def _drawn_histogram(stats: Histogram, site: SiteReading) -> dict[str, Any]:
    """Return counts of equal bins over values and levels, and the levels or their ends."""
    ends = level_range(site.entry.qparams)
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if ends is not None:
        # A format that reaches far beyond its values shows as what it is, but leaves the values visible.
        low, high = (min(low, max(ends[0], 4 * low - high)), max(high, min(ends[1], 4 * high - low)))
    if high <= low:
        high = low + 1.0
    centers, counts = stats.filled()
    binned, _ = np.histogram(np.clip(centers, low, high), _BINS, (low, high), weights=counts)
    return {
        "low": _digits(low),
        "high": _digits(high),
        "counts": [int(count) for count in binned],
        "ends": None if ends is None else _rounded(ends),
        "levels": _levels(site),
    }


def _levels(site: SiteReading) -> list[Any] | None:
    qparams = site.entry.qparams
    if isinstance(qparams, CodebookQParams):
        levels = [(level - qparams.zero_point) * qparams.scale for level in qparams.codebook.levels]
    elif isinstance(qparams, UniformQParams) and len(qparams.scale) == 1:
        codes = range(qparams.qmin, qparams.qmax + 1)
        levels = (
            [(code - qparams.zero_point) * qparams.scale[0] for code in codes] if len(codes) <= _DRAWN_LEVELS else []
        )
    else:
        levels = []
    return _rounded(levels) if 0 < len(levels) <= _DRAWN_LEVELS else None


def _rounded(values: Sequence[Any]) -> list[Any]:
    return [_rounded(value) if isinstance(value, (tuple, list)) else _digits(value) for value in values]


def _digits(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
