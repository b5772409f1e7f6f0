"""Candidates: the weights of every layer at several widths, and networks that are put together from them.

Weights are chosen as calibration chooses them, each layer alone, on two runs of the network as it stands
(:class:`calibration.diagnosis.changes.ChangeMaker`). They are held as codes, so that all widths of a network together
take less memory than its float weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.cache import DEFAULT_MEMORY_LIMIT
from calibration.calibrated import Calibrated, CalibratedSite
from calibration.diagnosis.changes import Change, ChangeMaker, with_format
from calibration.engine import MICRO_BATCH
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, dequantize, quantize


@dataclass(frozen=True, eq=False)
class Candidate:
    """The weights of a site at one width.

    Args:
        spec: what they were chosen by.
        qparams: their format.
        codes: int8, shaped as the weight.
        biases: by name, float32 (N,): of the layer that reads them, in steps that the integer program has for it.
    """

    spec: QuantSpec
    qparams: UniformQParams
    codes: Tensor = field(repr=False)
    biases: Mapping[str, Tensor] = field(repr=False)

    def values(self) -> Tensor:
        """Return the weights, float32, on their grid."""
        return dequantize(self.codes.to(torch.float32), self.qparams)


#: By the name of a weight's site, then by width.
Candidates = Mapping[str, Mapping[int, Candidate]]


def weight_sites(calibrated: Calibrated) -> tuple[CalibratedSite, ...]:
    """Return the weights of a network, in execution order."""
    return tuple(entry for entry in calibrated.sites if entry.site.kind == "weight")


def choose_candidates(
    calibrated: Calibrated,
    widths: Sequence[int],
    images: Tensor,
    *,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    progress: Callable[[str, int, int], None] | None = None,
) -> Candidates:
    """Choose the weights of every layer at every width; those that the network has are taken as they are.

    Args:
        calibrated: the network.
        widths: 2 to 8 bits each.
        images: float32 ``(batch, *shape)``, those of calibration.
        memory_limit: bytes of activations held in memory; the rest goes to files.
        progress: called with a stage, what is done and what there is to do.
    """
    sites = weight_sites(calibrated)
    changes = [
        Change(entry.site.name, "weight", entry.spec, dataclasses.replace(entry.spec, bits=width))
        for entry in sites
        for width in widths
        if width != entry.spec.bits
    ]
    found: dict[str, dict[int, Candidate]] = {entry.site.name: {} for entry in sites}
    for entry in sites:
        if entry.spec.bits in widths:
            found[entry.site.name][entry.spec.bits] = _candidate(calibrated, calibrated, entry.site.name)
    batches = [(images[start : start + MICRO_BATCH],) for start in range(0, len(images), MICRO_BATCH)]
    for done, (change, changed) in enumerate(ChangeMaker(calibrated, memory_limit).make(changes, batches), 1):
        found[change.site][change.after.bits] = _candidate(calibrated, changed, change.site)
        if progress is not None:
            progress("choose weights", done, len(changes))
    return found


def assemble(calibrated: Calibrated, candidates: Candidates, widths: Mapping[str, int]) -> Calibrated:
    """Return the network with the candidate of a width at each site; sites that are not named stay as they are."""
    for name, width in widths.items():
        chosen = candidates[name][width]
        entry = next(entry for entry in calibrated.sites if entry.site.name == name)
        constants = {entry.site.value: chosen.values(), **chosen.biases}
        calibrated = with_format(calibrated, name, chosen.spec, chosen.qparams, constants)
    return calibrated


def _candidate(network: Calibrated, changed: Calibrated, site: str) -> Candidate:
    entry = next(entry for entry in changed.sites if entry.site.name == site)
    assert isinstance(entry.qparams, UniformQParams)
    operations = network.graph.producers()
    bias = operations[entry.site.edges[0][0]].inputs[2]
    codes = quantize(changed.graph.constants[entry.site.value], entry.qparams).to(torch.int8)
    return Candidate(entry.spec, entry.qparams, codes, {bias: changed.graph.constants[bias]})
