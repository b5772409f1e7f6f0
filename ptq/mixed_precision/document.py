"""A search as plain numbers, lists and mappings: what ``--json`` prints and ``search.json`` holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from calibration.diagnosis.readings import decibel
from calibration.serialize import recipe_to_json
from ptq.mixed_precision import SearchResult
from ptq.mixed_precision.accuracy import Drop
from ptq.mixed_precision.front import Point


def document(result: SearchResult) -> dict[str, Any]:
    """Return all that was measured; accuracies in percent, drops in points, times in milliseconds at batch 1.

    ``error`` is the predicted squared error of the network's result that weights bring, as a share of its square.
    """
    table, costs = result.table, result.table.costs
    return {
        "goal": {key: value for key, value in dataclasses.asdict(result.goal).items() if value is not None},
        "store": table.store,
        "widths": list(table.widths),
        "bytes_at_8_bits": table.bytes_at_8_bits,
        "calibration_images": result.calibration_images,
        "measured_images": result.measured_images,
        "threads": costs.threads,
        "other_milliseconds": costs.other_milliseconds,
        "chosen": _point(result.chosen),
        "baseline": _point(result.baseline),
        "front": [_point(point) for point in result.front],
        "weights": [
            {
                "name": name,
                "choices": [
                    {"bits": width, "error": errors[width], **dataclasses.asdict(costs.weights[name][width])}
                    for width in sorted(errors)
                ],
            }
            for name, errors in table.sensitivities.items()
        ],
        "recipe": recipe_to_json(result.recipe),
        "provenance": dict(result.provenance),
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "ratio": point.ratio,
        "bundle_bytes": point.bundle_bytes,
        "artifact_bytes": point.artifact_bytes,
        "milliseconds": point.milliseconds,
        "error": point.error,
        "snr_db": decibel(point.error),
        "drop": _drop(point.drop),
        "final": _drop(point.final),
        "widths": dict(point.widths),
    }


def _drop(drop: Drop | None) -> dict[str, Any] | None:
    if drop is None:
        return None
    return {
        "points": drop.points,
        "standard_error": drop.standard_error,
        "top1": drop.top1,
        "float_top1": drop.float_top1,
        **dataclasses.asdict(drop),
    }
