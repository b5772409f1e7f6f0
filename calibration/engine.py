"""calibrate: from a graph, images and a recipe to the parameters of every site.

Goes through the graph once, an operation at a time, over all images: chooses the formats of what the operation reads,
corrects its weights where the recipe says so, then runs it and keeps its results in a cache of bounded size. With
``propagation: quantized`` a second run beside the float one has every format chosen so far, and later layers see what
earlier ones did to their inputs.

Images are run in micro-batches of a fixed size, whatever batches they arrive in, because a matrix product's last bits
depend on its size: so the result does not depend on the caller's batch size, and the same images give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibration.cache import DEFAULT_MEMORY_LIMIT, ActivationCache
from calibration.calibrated import Calibrated, CalibratedSite
from calibration.decisions import Decider
from calibration.device import default_device
from calibration.graph import Graph, check_shapes
from calibration.progress import ProgressStore
from calibration.rules import Recipe, assign_specs
from calibration.sites import find_sites
from quantizers.errors import DataError, ModelError

#: Called with a stage, what is done and what there is to do.
Progress = Callable[[str, int, int], None]

#: Images run together; fixed, so that the arithmetic is the same for every caller.
MICRO_BATCH = 8


@dataclass(frozen=True, slots=True)
class Options:
    """How calibration runs; nothing here changes what it decides.

    Args:
        memory_limit: bytes of activations held in memory; the rest goes to files.
        scratch: directory for these files; the system's place for temporary files where None.
        device: where operations run; a CUDA device where torch has one, else the CPU, where None.
    """

    memory_limit: int = DEFAULT_MEMORY_LIMIT
    scratch: Path | None = None
    device: torch.device | None = None


def calibrate(
    graph: Graph,
    images: Iterable[tuple[Tensor, ...]],
    recipe: Recipe,
    *,
    total: int | None = None,
    progress: Progress | None = None,
    store: ProgressStore | None = None,
    options: Options | None = None,
) -> Calibrated:
    """Choose the parameters of every site.

    Args:
        graph: a traced graph.
        images: one tuple for each sample: float32 tensors of the graph's input shapes, without batch axis.
        recipe: rules; the first that matches a site gives its spec.
        total: number of images if known, for progress only.
        progress: called with a stage, what is done and what there is to do.
        store: where to keep decisions, and to go on from what an interrupted run left there.
        options: memory, files and device.

    Raises:
        RecipeError: the recipe does not fit the graph.
        DataError: no image, an image of another shape, or other images than the interrupted run saw.
        ModelError: NaN or infinity in a weight or an activation, with its site.
    """
    settings = options or Options()
    sites = find_sites(graph)
    specs = assign_specs(sites, recipe)
    _require_finite_constants(graph)
    device = settings.device or default_device()
    with ActivationCache(settings.memory_limit, settings.scratch) as cache, torch.no_grad():
        decider = Decider(graph, sites, specs, recipe, cache, device)
        digests: list[str] = []
        for batch in _micro_batches(graph, images):
            digests += [_digest(tuple(column[index] for column in batch)) for index in range(len(batch[0]))]
            decider.add_images(batch)
            if progress is not None:
                progress("read images", len(digests), max(total or 0, len(digests)))
        if not digests:
            raise DataError("calibration needs at least one image, got none")
        if store is not None:
            store.begin(digests)
        for index, operation in enumerate(graph.operations):
            known = store.load(index, operation.name) if store is not None else None
            made = decider.apply(operation, known) if known is not None else decider.decide(operation)
            if store is not None and known is None:
                store.save(index, operation.name, made)
            if progress is not None:
                progress("calibrate", index + 1, len(graph.operations))
        decider.decide_outputs()
    entries = tuple(CalibratedSite(site, specs[site.name], decider.formats[site.name]) for site in sites)
    fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Calibrated(
        decider.network(),
        recipe,
        entries,
        len(digests),
        fingerprint,
        decider.float_constants(),
        decider.rewritten_constants(),
        tuple(decider.notes),
    )


def _require_finite_constants(graph: Graph) -> None:
    for name, tensor in graph.constants.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"weight {name} holds NaN or infinity; the checkpoint is damaged or was trained to overflow"
            )


def _digest(sample: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for tensor in sample:
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
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
