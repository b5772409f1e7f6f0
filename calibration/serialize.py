"""A Calibrated as two files: ``model.json`` (graph, recipe, sites), ``model.safetensors`` (weights, float ones too).

The same object gives the same bytes, and reading them gives back an equal one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from calibration.calibrated import Calibrated, CalibratedSite
from calibration.graph import Attribute, Graph, Operation
from calibration.qparams_json import format_name, qparams_from_json, qparams_to_json
from calibration.rules import Recipe, Rule
from calibration.sites import Site
from quantizers.errors import ArtifactError
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, dequantize, quantize

FORMAT_VERSION = 3
_KEYS = {"format_version", "graph", "recipe", "sites", "num_images", "fingerprint", "notes"}
#: Before the names of float values that rewrites and corrections replaced, and of what the rewrites alone made.
_FLOAT, _REWRITTEN = "float/", "rewritten/"
#: Before the names of weights that lie on the grid of their format: int8 codes, a quarter of the values.
_CODES = "codes/"


def calibrated_to_bytes(calibrated: Calibrated) -> tuple[bytes, bytes]:
    """Return the JSON and the safetensors bytes."""
    structure = {
        "format_version": FORMAT_VERSION,
        "graph": _graph_to_json(calibrated.graph),
        "recipe": recipe_to_json(calibrated.recipe),
        "sites": [
            {
                **dataclasses.asdict(entry.site),
                "spec": dataclasses.asdict(entry.spec),
                "format": format_name(entry.qparams),
                "qparams": qparams_to_json(entry.qparams),
            }
            for entry in calibrated.sites
        ],
        "num_images": calibrated.num_images,
        "fingerprint": calibrated.fingerprint,
        "notes": list(calibrated.notes),
    }
    tensors = _coded(calibrated)
    tensors |= {_FLOAT + name: tensor for name, tensor in calibrated.float_constants.items()}
    tensors |= {_REWRITTEN + name: tensor for name, tensor in calibrated.rewritten_constants.items()}
    return _dump(structure), tensors_to_bytes(tensors)


def _coded(calibrated: Calibrated) -> dict[str, Tensor]:
    """Return the constants of the graph, weights as codes where these say all."""
    tensors = dict(calibrated.graph.constants)
    for entry in calibrated.sites:
        name = entry.site.value
        if entry.site.kind == "weight" and isinstance(entry.qparams, UniformQParams) and name in tensors:
            codes = quantize(tensors[name], entry.qparams).to(torch.int8)
            if torch.equal(dequantize(codes, entry.qparams), tensors[name]):
                del tensors[name]
                tensors[_CODES + name] = codes
    return tensors


def calibrated_from_bytes(structure: bytes, tensors: bytes) -> Calibrated:
    """Rebuild a Calibrated.

    Raises:
        ArtifactError: the bytes are not a calibrated model of this format version.
    """
    try:
        document = json.loads(structure)
        constants = safetensors.torch.load(tensors)
    except (ValueError, SafetensorError) as error:
        raise ArtifactError(f"the calibrated model cannot be read: {error}; quantize it again") from error
    if not isinstance(document, dict) or set(document) != _KEYS:
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ArtifactError(f"model.json: expected the keys {sorted(_KEYS)}, found {found}")
    if document["format_version"] != FORMAT_VERSION:
        raise ArtifactError(
            f"model.json has format version {document['format_version']}, this version reads {FORMAT_VERSION}"
        )
    floats, rewritten, codes = (
        {name.removeprefix(prefix): constants.pop(name) for name in list(constants) if name.startswith(prefix)}
        for prefix in (_FLOAT, _REWRITTEN, _CODES)
    )
    try:
        sites = tuple(_site_from_json(entry) for entry in document["sites"])
        constants |= _decoded(codes, sites)
        return Calibrated(
            graph=_graph_from_json(document["graph"], constants),
            recipe=recipe_from_json(document["recipe"]),
            sites=sites,
            num_images=document["num_images"],
            fingerprint=document["fingerprint"],
            float_constants=floats,
            rewritten_constants=rewritten,
            notes=tuple(document["notes"]),
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"model.json: wrong or missing entry {error}; quantize the model again") from error


def _decoded(codes: Mapping[str, Tensor], sites: Sequence[CalibratedSite]) -> dict[str, Tensor]:
    formats = {entry.site.value: entry.qparams for entry in sites if entry.site.kind == "weight"}
    values: dict[str, Tensor] = {}
    for name, tensor in codes.items():
        qparams = formats.get(name)
        if not isinstance(qparams, UniformQParams):
            raise ArtifactError(f"model.safetensors: {name} holds codes, and model.json has no format for them")
        values[name] = dequantize(tensor, qparams)
    return values


def graph_to_bytes(graph: Graph) -> tuple[bytes, bytes]:
    """Return the structure of a graph as JSON and its constants as safetensors."""
    return _dump(_graph_to_json(graph)), tensors_to_bytes(graph.constants)


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as safetensors, sorted by name."""
    return safetensors.torch.save({name: tensors[name].contiguous().clone() for name in sorted(tensors)})


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain lists and mappings."""
    return dataclasses.asdict(recipe)


def recipe_from_json(document: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe that :func:`recipe_to_json` wrote."""
    rules = tuple(Rule(**{**rule, "spec": QuantSpec(**rule["spec"])}) for rule in document["rules"])
    return Recipe(**{**document, "rules": rules})


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _graph_to_json(graph: Graph) -> dict[str, Any]:
    return {
        "inputs": [{"name": name, "shape": list(shape)} for name, shape in graph.inputs],
        "operations": [dataclasses.asdict(operation) for operation in graph.operations],
        "outputs": [{"name": name, "value": value} for name, value in graph.outputs],
    }


def _graph_from_json(document: Mapping[str, Any], constants: Mapping[str, Tensor]) -> Graph:
    def attribute(value: Any) -> Attribute:
        return tuple(value) if isinstance(value, list) else value

    operations = tuple(
        Operation(
            name=entry["name"],
            op=entry["op"],
            inputs=tuple(entry["inputs"]),
            attributes={key: attribute(value) for key, value in entry["attributes"].items()},
            shape=tuple(entry["shape"]),
            module=entry["module"],
        )
        for entry in document["operations"]
    )
    known = {entry["name"] for entry in document["inputs"]} | set(constants)
    for operation in operations:
        for name in operation.inputs:
            if name not in known:
                raise ArtifactError(f"model.json: operation {operation.name} reads {name}, which is not there")
        known.add(operation.name)
    return Graph(
        tuple((entry["name"], tuple(entry["shape"])) for entry in document["inputs"]),
        dict(sorted(constants.items())),
        operations,
        tuple((entry["name"], entry["value"]) for entry in document["outputs"]),
    )


def _site_from_json(entry: Mapping[str, Any]) -> CalibratedSite:
    site = Site(entry["name"], entry["kind"], entry["value"], tuple((name, index) for name, index in entry["edges"]))
    qparams = qparams_from_json(entry["format"], entry["qparams"], site.name)
    return CalibratedSite(site, QuantSpec(**entry["spec"]), qparams)
