"""calibrate: from a graph, images and a recipe to the parameters of every site.

One pass over the images, float inputs everywhere (parallel calibration). Images are run in micro-batches of
a fixed size, whatever batches they arrive in, because a matrix product's last bits depend on its size: so the
result does not depend on the caller's batch size, and the same images give the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibration.checkpoint import StatisticsStore
from calibration.graph import Graph, Operation, check_shapes, execute
from calibration.heads import head_counts
from calibration.rules import Recipe, assign_specs
from calibration.search import search_activation, search_heads, search_weight
from calibration.sites import OUTPUT, Edge, Site, find_sites
from calibration.statistics import Histogram, empty, update
from quantizers.codebook import CodebookQParams, uniform_codebook
from quantizers.errors import DataError, ModelError
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import HEAD_AXIS, UniformQParams, qparams_from_range, quantize

QParams = UniformQParams | CodebookQParams | RowRelativeQParams | ShiftmaxQParams
Progress = Callable[[str, int, int], None]

#: Images run together; fixed, so that the arithmetic is the same for every caller.
MICRO_BATCH = 8
#: A bias of this many weight-and-input steps still leaves room for the products in int32.
_LARGEST_BIAS = 2**30
#: Largest bias, in steps, of a layer without weights: precise, and no step so small that multipliers vanish.
_BIAS_OF_DEAD_WEIGHTS = 2**20
#: Seconds between two saves of the statistics.
_SAVE_INTERVAL = 5.0


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
        fingerprint: SHA-256 over the SHA-256 of each calibration image as the network saw it, in order.
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
    store: StatisticsStore | None = None,
) -> Calibrated:
    """Choose the parameters of every site.

    Args:
        graph: a traced graph.
        images: one tuple for each sample: float32 tensors of the graph's input shapes, without batch axis.
        recipe: rules; the first that matches a site gives its spec.
        total: number of images if known, for progress only.
        progress: called with a stage, what is done and what there is to do.
        store: where to keep statistics, and to go on from what an interrupted run left there.

    Raises:
        RecipeError: the recipe does not fit the graph.
        DataError: no image, an image of another shape, or other images than the interrupted run saw.
        ModelError: NaN or infinity in a weight or an activation, with its site.
    """
    sites = find_sites(graph)
    specs = assign_specs(sites, recipe)
    heads = head_counts(graph, sites, specs, recipe)
    _require_finite_constants(graph)
    observed = [site for site in sites if _is_observed(graph, site)]
    stats, count, fingerprint = _observe(graph, observed, heads, images, total, progress, store)
    qparams: dict[str, QParams] = {}
    for done, site in enumerate(sites):
        seen = [stats[name] for name in _statistics_of(site, heads) if name in stats]
        qparams[site.name] = _choose(graph, site, specs[site.name], seen, recipe.nonlinear)
        if progress is not None:
            progress("search ranges", done + 1, len(sites))
    _fit_weights_to_biases(graph, sites, qparams)
    entries = tuple(CalibratedSite(site, specs[site.name], qparams[site.name]) for site in sites)
    return Calibrated(graph, recipe, entries, count, fingerprint)


def _is_observed(graph: Graph, site: Site) -> bool:
    return site.value not in graph.constants and site.kind != "probability"


def _require_finite_constants(graph: Graph) -> None:
    for name, tensor in graph.constants.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"weight {name} holds NaN or infinity; the checkpoint is damaged or was trained to overflow"
            )


def _observe(
    graph: Graph,
    sites: Sequence[Site],
    heads: Mapping[str, int],
    images: Iterable[tuple[Tensor, ...]],
    total: int | None,
    progress: Progress | None,
    store: StatisticsStore | None,
) -> tuple[dict[str, Histogram], int, str]:
    first_edges = {site.edges[0]: site for site in sites}
    restored = store.load() if store is not None else None
    stats, known = (
        restored
        if restored is not None
        else ({name: empty() for site in sites for name in _statistics_of(site, heads)}, [])
    )
    digests: list[str] = []

    def require_finite(where: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"NaN or infinity at {where} while calibrating images {len(digests) - len(value)} "
                f"to {len(digests) - 1}; check the preprocessing and run the model in float32"
            )

    def observe(site: Site, value: Tensor) -> None:
        require_finite(f"site {site.name}", value)
        names = _statistics_of(site, heads)
        parts = value.unbind(HEAD_AXIS) if site.name in heads else (value,)
        for name, part in zip(names, parts, strict=True):
            stats[name] = update(stats[name], part)

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        site = first_edges.get((operation.name, position))
        if site is not None:
            observe(site, value)
        return value

    saved = time.monotonic()
    with torch.no_grad():
        for batch in _micro_batches(graph, images):
            digests += [_digest(tuple(column[index] for column in batch)) for index in range(len(batch[0]))]
            if len(digests) <= len(known):
                continue
            if known and digests[: len(known)] != known:
                raise DataError("the images differ from those of the interrupted run; start without resume")
            if store is not None and len(batch[0]) < MICRO_BATCH:
                # What is kept never covers a part of a micro-batch: a longer run fills it with more images.
                store.save(stats, digests[: -len(batch[0])])
            results = execute(graph, batch, on_edge)
            for index, result in enumerate(results):
                # An output that is an accumulator is not observed, but what it holds matters as much.
                require_finite(f"output {graph.outputs[index][0]}", result)
                if (OUTPUT, index) in first_edges:
                    observe(first_edges[OUTPUT, index], result)
            if store is not None and time.monotonic() - saved > _SAVE_INTERVAL:
                store.save(stats, digests)
                saved = time.monotonic()
            if progress is not None:
                progress("observe activations", len(digests), max(total or 0, len(digests)))
    if not digests:
        raise DataError("calibration needs at least one image, got none")
    if digests[: len(known)] != known:
        raise DataError("the images differ from those of the interrupted run; start without resume")
    if store is not None and len(digests) % MICRO_BATCH == 0:
        store.save(stats, digests)
    return stats, len(digests), hashlib.sha256("".join(digests).encode()).hexdigest()


def _statistics_of(site: Site, heads: Mapping[str, int]) -> list[str]:
    """Return the names of a site's statistics: its own, or one for each head."""
    return [f"{site.name}[{head}]" for head in range(heads[site.name])] if site.name in heads else [site.name]


def _digest(sample: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for tensor in sample:
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def _micro_batches(graph: Graph, images: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    pending: list[tuple[Tensor, ...]] = []
    for index, sample in enumerate(images):
        try:
            check_shapes(graph, tuple(tensor[None] for tensor in sample))
        except DataError as error:
            raise DataError(f"calibration image {index}: {error}") from error
        pending.append(sample)
        if len(pending) == MICRO_BATCH:
            yield tuple(torch.stack(column) for column in zip(*pending, strict=True))
            pending = []
    if pending:
        yield tuple(torch.stack(column) for column in zip(*pending, strict=True))


def _choose(graph: Graph, site: Site, spec: QuantSpec, stats: Sequence[Histogram], nonlinear: str) -> QParams:
    if site.kind == "probability":
        if nonlinear == "published":
            return ShiftmaxQParams(spec.bits)
        return RowRelativeQParams(uniform_codebook(spec.bits))
    if stats:
        return search_heads(stats, spec) if spec.granularity == "head" else search_activation(stats[0], spec)
    constant = graph.constants[site.value]
    if site.kind == "weight":
        return search_weight(constant, spec)
    if spec.granularity == "head":
        heads = constant.movedim(HEAD_AXIS, 0).flatten(1)
        return qparams_from_range(heads.amin(1).numpy(), heads.amax(1).numpy(), spec)
    return qparams_from_range(float(constant.min()), float(constant.max()), spec)


def _fit_weights_to_biases(graph: Graph, sites: Sequence[Site], qparams: dict[str, QParams]) -> None:
    """Make steps of input times weight, in which a bias is held as int32, large enough and small enough for it.

    Too small a step would overflow: it is raised. A channel whose weights are all zero has no step of its own
    and its scale of 1 would round the bias away: it gets the largest step of the other channels.
    """
    producers = graph.producers()
    by_edge: Mapping[Edge, str] = {edge: site.name for site in sites for edge in site.edges}
    for site in sites:
        if site.kind != "weight":
            continue
        weight = qparams[site.name]
        assert isinstance(weight, UniformQParams)
        # The largest bias of each channel, in steps of the input.
        bias = np.zeros(len(weight.scale))
        for operation, _ in site.edges:
            source = qparams[by_edge[operation, 0]]
            assert isinstance(source, UniformQParams)
            offset = graph.constants[producers[operation].inputs[2]].abs().numpy().astype(np.float64)
            bias = np.maximum(bias, offset / source.scale[0])
        dead = (quantize(graph.constants[site.value], weight) == 0).reshape(len(bias), -1).all(1).numpy()
        scale = weight.scales()
        if not dead.all():
            scale = np.where(dead, scale[~dead].max(), scale)
        elif bias.any():
            scale = np.full_like(scale, bias.max() / _BIAS_OF_DEAD_WEIGHTS)
        scale = np.maximum(scale, bias / _LARGEST_BIAS).astype(np.float32)
        qparams[site.name] = UniformQParams(tuple(float(s) for s in scale), 0, weight.qmin, weight.qmax)
