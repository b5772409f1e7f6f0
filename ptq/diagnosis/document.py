"""A diagnosis as plain numbers, lists and mappings: what ``--json`` prints and what the report draws."""

from __future__ import annotations

import dataclasses
from typing import Any

from calibration.diagnosis.changes import Change
from calibration.diagnosis.readings import LayerReading, SiteReading, decibel
from calibration.qparams_json import format_label
from calibration.serialize import recipe_to_json
from ptq.diagnosis import Diagnosis
from quantizers.row_relative import RowRelativeQParams
from quantizers.spec import QuantSpec


def document(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return all that was measured; ratios of signal to noise are in decibel, accuracies in percent.

    Layers come as :meth:`calibration.diagnosis.readings.Readings.worst` has them, suggestions best first; ``share`` is
    a layer's part of what all of them do to the result.
    """
    readings = diagnosis.readings
    total = sum(layer.effect for layer in readings.layers) or 1.0
    kinds = {site.name: site.entry.site.kind for site in readings.sites}
    depth = {layer.operation: index for index, layer in enumerate(readings.layers)}
    expected, found = readings.results
    summary = diagnosis.quantized.describe()
    return {
        "images": readings.images,
        "output": {
            "snr_db": decibel(readings.output),
            "agreement": diagnosis.agreement(found),
            "float_top1": diagnosis.top1(expected),
            "top1": diagnosis.top1(found),
        },
        "layers": [
            {
                "name": layer_label(layer, kinds),
                "op": layer.op,
                "depth": depth[layer.operation],
                "share": layer.effect / total,
                "effect_db": decibel(layer.effect),
                "snr_db": {
                    "weight": None if layer.weight is None else decibel(layer.weight),
                    "activation": decibel(layer.activation),
                    "inherited": decibel(layer.inherited),
                    "total": decibel(layer.total),
                },
                "sites": list(layer.sites),
                "fits": layer.fits,
            }
            for layer in readings.worst()
        ],
        "sites": [_site(site) for site in readings.sites],
        "suggestions": [
            {
                "site": entry.change.site,
                "change": entry.change.describe(),
                "rule": rule_of(entry.change),
                "gain_db": entry.gain,
                "output_snr_db": decibel(entry.output),
                "top1": diagnosis.top1(entry.results),
            }
            for entry in diagnosis.suggestions
        ],
        "combined": None
        if diagnosis.combined_output is None or diagnosis.combined_results is None
        else {
            "output_snr_db": decibel(diagnosis.combined_output),
            "top1": diagnosis.top1(diagnosis.combined_results),
        },
        "size_bytes": summary["size_bytes"],
        "float_size_bytes": summary["float_size_bytes"],
        "recipe": recipe_to_json(diagnosis.quantized.calibrated.recipe),
        "notes": list(diagnosis.quantized.calibrated.notes),
        "provenance": summary["provenance"],
    }


def layer_label(layer: LayerReading, kinds: dict[str, str]) -> str:
    """Return a name for people: the module, and what it does there where it does several things."""
    place = layer.module or layer.operation
    if layer.op in ("linear", "conv2d"):
        return place
    read = " x ".join(kinds[name] for name in layer.sites) if layer.op == "matmul" else ""
    return f"{place} {layer.op}" + (f" ({read})" if read else "")


def rule_of(change: Change) -> dict[str, Any]:
    """Return the rule of a recipe that makes a change; it has to stand before the rules that match the site now."""
    plain = QuantSpec(change.after.bits)
    keys = [field.name for field in dataclasses.fields(QuantSpec) if field.name != "bits"]
    changed = {key: getattr(change.after, key) for key in keys if getattr(change.after, key) != getattr(plain, key)}
    return {"name": change.site, "bits": change.after.bits, **changed}


def _site(site: SiteReading) -> dict[str, Any]:
    entry = site.entry
    return {
        "name": site.name,
        "kind": entry.site.kind,
        "format": format_label(entry.qparams),
        "bits": entry.spec.bits,
        "granularity": "row" if isinstance(entry.qparams, RowRelativeQParams) else entry.spec.granularity,
        "effect_db": decibel(site.effect),
        "own_snr_db": decibel(site.own),
        "range_used": site.range_used(),
        "misfit": site.misfit,
        "fits": site.fits,
    }
