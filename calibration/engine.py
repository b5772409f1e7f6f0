"""calibrate: from a graph, images and a recipe to the parameters of every site.

One pass over the images, float inputs everywhere (parallel calibration). Images are run in micro-batches of
a fixed size, whatever batches they arrive in, because a matrix product's last bits depend on its size: so the
result does not depend on the caller's batch size, and the same images give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibration.graph import Graph, Operation, execute
from calibration.rules import Recipe, assign_specs
from calibration.search import search_activation, search_weight
from calibration.sites import OUTPUT, Edge, Site, find_sites
from calibration.statistics import Histogram, empty, update
from quantizers.errors import DataError, ModelError
from quantizers.row_relative import RowRelativeQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, qparams_from_range

QParams = UniformQParams | RowRelativeQParams
Progress = Callable[[str, int, int], None]

#: Images run together; fixed, so that the arithmetic is the same for every caller.
MICRO_BATCH = 8
#: A bias of this many weight-and-input steps still leaves room for the products in int32.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True, slots=True)
class CalibratedSite:
    """A site with its spec and the parameters that calibration chose."""

    site: Site
    spec: QuantSpec
    qparams: QParams


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A graph whose sites have number formats.

    Args:
        graph: the float graph.
        recipe: the recipe as resolved.
        sites: in execution order.
        num_images: how many calibration images were seen.
        fingerprint: SHA-256 of the calibration images as the network saw them, in order.
    """

    graph: Graph
    recipe: Recipe
    sites: tuple[CalibratedSite, ...]
    num_images: int
    fingerprint: str

    def by_edge(self) -> dict[Edge, QParams]:
        """Return the parameters by edge."""
        return {edge: entry.qparams for entry in self.sites for edge in entry.site.edges}


def calibrate(
    graph: Graph,
    images: Iterable[tuple[Tensor, ...]],
    recipe: Recipe,
    *,
    total: int | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Choose the parameters of every site.

    Args:
        graph: a traced graph.
        images: one tuple for each sample: float32 tensors of the graph's input shapes, without batch axis.
        recipe: rules; the first that matches a site gives its spec.
        total: number of images if known, for progress only.
        progress: called with a stage, what is done and what there is to do.

    Raises:
        RecipeError: the recipe does not fit the graph.
        DataError: no image, or an image of another shape.
        ModelError: NaN or infinity in a weight or an activation, with its site.
    """
    sites = find_sites(graph)
    specs = assign_specs(sites, recipe)
    _require_finite_constants(graph)
    observed = [site for site in sites if _is_observed(graph, site)]
    stats, count, fingerprint = _observe(graph, observed, images, total, progress)
    qparams: dict[str, QParams] = {}
    for done, site in enumerate(sites):
        qparams[site.name] = _choose(graph, site, specs[site.name], stats.get(site.name))
        if progress is not None:
            progress("search ranges", done + 1, len(sites))
    _make_room_for_biases(graph, sites, qparams)
    entries = tuple(CalibratedSite(site, specs[site.name], qparams[site.name]) for site in sites)
    return Calibrated(graph, recipe, entries, count, fingerprint)


def _is_observed(graph: Graph, site: Site) -> bool:
    return site.value not in graph.constants and site.kind != "probability"


def _require_finite_constants(graph: Graph) -> None:
    for name, tensor in graph.constants.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"weight {name} holds NaN or infinity; the checkpoint is damaged or was trained to overflow")


def _observe(
    graph: Graph,
    sites: Sequence[Site],
    images: Iterable[tuple[Tensor, ...]],
    total: int | None,
    progress: Progress | None,
) -> tuple[dict[str, Histogram], int, str]:
    first_edges = {site.edges[0]: site for site in sites}
    stats = {site.name: empty() for site in sites}
    digest, count = hashlib.sha256(), 0

    def observe(site: Site, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"NaN or infinity at site {site.name} while calibrating images {count} to {count + len(value) - 1}; "
                "check the preprocessing and run the model in float32"
            )
        stats[site.name] = update(stats[site.name], value)

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        site = first_edges.get((operation.name, position))
        if site is not None:
            observe(site, value)
        return value

    with torch.no_grad():
        for batch in _micro_batches(images):
            for tensor in batch:
                digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
            results = execute(graph, batch, on_edge)
            for index, result in enumerate(results):
                if (OUTPUT, index) in first_edges:
                    observe(first_edges[OUTPUT, index], result)
            count += len(batch[0])
            if progress is not None:
                progress("observe activations", count, max(total or 0, count))
    if count == 0:
        raise DataError("calibration needs at least one image, got none")
    return stats, count, digest.hexdigest()


def _micro_batches(images: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    pending: list[tuple[Tensor, ...]] = []
    for sample in images:
        pending.append(sample)
        if len(pending) == MICRO_BATCH:
            yield tuple(torch.stack(column) for column in zip(*pending, strict=True))
            pending = []
    if pending:
        yield tuple(torch.stack(column) for column in zip(*pending, strict=True))


def _choose(graph: Graph, site: Site, spec: QuantSpec, stats: Histogram | None) -> QParams:
    if site.kind == "probability":
        return RowRelativeQParams(2**spec.bits - 1)
    if stats is not None:
        return search_activation(stats, spec)
    constant = graph.constants[site.value]
    if site.kind == "weight":
        return search_weight(constant, spec)
    return qparams_from_range(float(constant.min()), float(constant.max()), spec)


def _make_room_for_biases(graph: Graph, sites: Sequence[Site], qparams: dict[str, QParams]) -> None:
    """Raise the weight scales of channels whose bias would not fit int32 in steps of input times weight."""
    producers = graph.producers()
    by_edge: Mapping[Edge, str] = {edge: site.name for site in sites for edge in site.edges}
    for site in sites:
        if site.kind != "weight":
            continue
        weight = qparams[site.name]
        assert isinstance(weight, UniformQParams)
        needed = np.zeros(len(weight.scale))
        for operation, _ in site.edges:
            source = qparams[by_edge[operation, 0]]
            assert isinstance(source, UniformQParams)
            bias = graph.constants[producers[operation].inputs[2]].abs().numpy().astype(np.float64)
            needed = np.maximum(needed, bias / (source.scale[0] * _LARGEST_BIAS))
        scale = np.maximum(weight.scales(), needed).astype(np.float32)
        qparams[site.name] = UniformQParams(tuple(float(s) for s in scale), 0, weight.qmin, weight.qmax)
