"""What to change, and what that changes: specs for the sites that cost most, each tried in the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.cache import DEFAULT_MEMORY_LIMIT
from calibration.calibrated import Calibrated
from calibration.diagnosis.changes import Change, ChangeMaker, possible_changes, with_format
from calibration.diagnosis.readings import Readings, decibel
from calibration.engine import Progress
from calibration.simulate import simulate

#: Gains below this, in decibel of the network's result, are noise of the images that happen to be there.
SMALLEST_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change, and the network's result with it.

    Args:
        change: what to change.
        output: squared error of the network's result, as a share of its square.
        gain: what that is less than without the change, decibel.
        results: simulated, float32 (images, C), all outputs joined.
        network: the network with the change.
    """

    change: Change
    output: float
    gain: float
    results: Tensor = field(repr=False)
    network: Calibrated = field(repr=False)


def suggest(
    calibrated: Calibrated,
    readings: Readings,
    batches: Sequence[tuple[Tensor, ...]],
    count: int,
    progress: Progress | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> tuple[Suggestion, ...]:
    """Try changes of the sites that do most to the network's result.

    For each site the change at its own width comes first; the next width is tried after it and is suggested where it
    gains more. Both are measured against the network as it stands, not on top of each other.

    Args:
        calibrated: the network.
        readings: of :func:`calibration.diagnosis.measure.measure`, on the same images.
        batches: the images, float32 ``(batch, *shape)`` for each input.
        count: sites to look at.
        progress: called with what is done.
        memory_limit: bytes of activations held in memory.

    Returns:
        Changes that gain, the largest gain first; at most two for a site.
    """
    worst = sorted(readings.sites, key=lambda site: (site.fits, -site.effect))[:count]
    changes = [change for site in worst for change in possible_changes(calibrated, site.name)]
    expected = readings.results[0]
    before = decibel(output_error(expected, run(calibrated, batches)))
    found: list[Suggestion] = []
    for index, (change, network) in enumerate(ChangeMaker(calibrated, memory_limit).make(changes, batches)):
        results = run(network, batches)
        output = output_error(expected, results)
        found.append(Suggestion(change, output, decibel(output) - before, results, network))
        if progress is not None:
            progress("try changes", index + 1, len(changes))
    kept: list[Suggestion] = []
    best: dict[str, float] = {}
    for entry in sorted(found, key=lambda entry: entry.change.after.bits):
        # More bits have to be worth more than none.
        if entry.gain > best.get(entry.change.site, 0.0) + SMALLEST_GAIN:
            best[entry.change.site] = entry.gain
            kept.append(entry)
    return tuple(sorted(kept, key=lambda entry: -entry.gain))


def combine(calibrated: Calibrated, suggestions: Sequence[Suggestion]) -> Calibrated:
    """Return the network with all suggestions, of several for a site the first."""
    operations = calibrated.graph.producers()
    seen: set[str] = set()
    for suggestion in suggestions:
        change, changed = suggestion.change, suggestion.network
        if change.site in seen:
            continue
        seen.add(change.site)
        entry = next(entry for entry in changed.sites if entry.site.name == change.site)
        names = {entry.site.value}
        if change.kind == "weight":
            names.update(operations[entry.site.edges[0][0]].inputs[1:])
        constants = {name: changed.graph.constants[name] for name in names & changed.graph.constants.keys()}
        calibrated = with_format(calibrated, change.site, change.after, entry.qparams, constants)
    return calibrated


def run(calibrated: Calibrated, batches: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return the simulated results of all images, float32 (images, C), all outputs joined.

    Residuals are rounded as exact ratios say: the multipliers of a program that was never made are not known.
    """
    made = (simulate(calibrated, batch) for batch in batches)
    return torch.cat([torch.cat([output.flatten(1) for output in outputs], 1) for outputs in made])


def output_error(expected: Tensor, found: Tensor) -> float:
    """Return the squared error of results as a share of their squares."""
    reference = expected.to(torch.float64)
    return float((found - reference).square().sum() / reference.square().sum().clamp(min=torch.finfo().tiny))
