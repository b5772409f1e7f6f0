"""Sensitivities: what each width of each weight does to the network's result, from one pass over the images.

The weights of a width make an error ``d = f(Q(x), w^) - f(x, w)`` at the layer's result, the format of what the layer
reads included: corrected weights make up for it. :mod:`calibration.diagnosis.gradients` prices it, two backward passes
for all layers and widths. Errors of different layers have little to do with one another, so that their prices add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.calibrated import Calibrated
from calibration.diagnosis.gradients import VECTORS, Effects, FloatRun, run_float
from calibration.diagnosis.readings import NOTHING
from calibration.graph import EXECUTORS, Operation
from calibration.mixed_precision.candidates import Candidates, weight_sites
from calibration.sites import Site

_SEED = 0
#: Images of a float run and its gradients, all of whose values are held at once.
_MICRO_BATCH = 4
#: A weight's site and a width.
_Key = tuple[str, int]


def sensitivities(
    calibrated: Calibrated,
    candidates: Candidates,
    images: Tensor,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Mapping[str, Mapping[int, float]]:
    """Price every candidate.

    Args:
        calibrated: the network that the candidates were chosen in.
        candidates: of every weight's site.
        images: float32 ``(batch, *shape)``.
        progress: called with a stage, what is done and what there is to do.

    Returns:
        By site and width, the squared error of the network's result as a share of the squared float result.
    """
    pricing = _Pricing(calibrated, candidates)
    for start in range(0, len(images), _MICRO_BATCH):
        pricing.add(images[start : start + _MICRO_BATCH])
        if progress is not None:
            progress("measure sensitivities", min(start + _MICRO_BATCH, len(images)), len(images))
    return pricing.shares()


class _Pricing:
    def __init__(self, calibrated: Calibrated, candidates: Candidates) -> None:
        self._calibrated, self._candidates = calibrated, candidates
        self._float = calibrated.rewritten_graph()
        self._formats = calibrated.by_edge()
        self._producers = self._float.producers()
        self._sites = [entry.site for entry in weight_sites(calibrated)]
        self._readers = {name for site in self._sites for name, _ in site.edges}
        self._generator = torch.Generator().manual_seed(_SEED)
        self._signal = 0.0
        self._totals: dict[_Key, float] = {}

    def add(self, batch: Tensor) -> None:
        run = run_float(self._float, (batch,), self._readers, VECTORS, self._generator)
        effects: Effects[_Key] = Effects(run)
        with torch.no_grad():
            for site in self._sites:
                for name, _ in site.edges:
                    self._add_layer(effects, run, self._producers[name], site)
        self._signal += float(run.results.to(torch.float64).square().sum())
        for key, amount in effects.squares().items():
            self._totals[key] = self._totals.get(key, 0.0) + amount

    def _add_layer(self, effects: Effects[_Key], run: FloatRun, operation: Operation, site: Site) -> None:
        source, _, bias = operation.inputs
        constants = self._float.constants
        x = constants[source][None] if source in constants else run.values[source]
        read = apply(self._formats[operation.name, 0], x)
        for width, candidate in self._candidates[site.name].items():
            own = candidate.biases.get(bias, self._calibrated.graph.constants[bias])
            made = EXECUTORS[operation.op](operation, read, candidate.values()[None], own[None])
            effects.add((site.name, width), operation.name, made - run.values[operation.name])

    def shares(self) -> dict[str, dict[int, float]]:
        signal = max(self._signal, NOTHING)
        return {
            site.name: {width: self._totals[site.name, width] / signal for width in self._candidates[site.name]}
            for site in self._sites
        }
