"""Diagnosis of a quantized network: which layers lose accuracy, to what, and what a change brings back, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from calibration.cache import DEFAULT_MEMORY_LIMIT
from calibration.calibrated import Calibrated
from calibration.diagnosis.details import AttentionHeads, DetailsMeter, NormChannels
from calibration.diagnosis.gradients import FloatRun
from calibration.diagnosis.measure import measure
from calibration.diagnosis.readings import Readings
from calibration.diagnosis.suggest import Suggestion, combine, output_error, run, suggest
from calibration.engine import Progress
from calibration.integerize import multipliers_of
from ptq.api import Quantized
from quantizers.errors import DataError

#: Sites whose changes are tried where the caller does not say.
DEFAULT_SUGGESTIONS = 6
#: Images of a float run and its gradients, all of whose values are held at once.
_MICRO_BATCH = 4


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found.

    Args:
        quantized: the network.
        readings: errors of layers and sites, and results.
        suggestions: changes that gain, the largest gain first.
        combined: the network with all of them; None without suggestions.
        combined_output: its squared error of the result, as a share of the squared result.
        channels: of the LayerNorms.
        heads: of attention.
        labels: int64 (images,), or None.
        combined_results: simulated results of ``combined``, float32 (images, C).
    """

    quantized: Quantized
    readings: Readings
    suggestions: tuple[Suggestion, ...]
    combined: Calibrated | None
    combined_output: float | None
    channels: tuple[NormChannels, ...]
    heads: tuple[AttentionHeads, ...]
    labels: Tensor | None = None
    combined_results: Tensor | None = field(default=None, repr=False)

    def top1(self, results: Tensor) -> float | None:
        """Return the percentage of images whose label has the largest result; None without labels."""
        if self.labels is None:
            return None
        return 100.0 * float((results.argmax(1) == self.labels).double().mean())

    def agreement(self, results: Tensor) -> float:
        """Return the share of images, 0 to 1, on which the first choice is float's."""
        return float((results.argmax(1) == self.readings.results[0].argmax(1)).double().mean())


def diagnose(
    quantized: Quantized,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    suggestions: int = DEFAULT_SUGGESTIONS,
    progress: Progress | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> Diagnosis:
    """Measure a network on images, and try changes of the sites that cost most.

    Args:
        quantized: the network.
        images: float32 (N, channels, height, width), preprocessed; some tens are enough.
        labels: int64 (N,), for accuracies; None for networks that give features.
        suggestions: how many sites to try changes of; 0 for none.
        progress: called with a stage, what is done and what there is to do.
        memory_limit: bytes of activations held in memory while changes are tried.

    Raises:
        DataError: no image, or images of another shape.
    """
    if not len(images):
        raise DataError("a diagnosis needs at least one image, got none")
    batches: Sequence[tuple[Tensor, ...]] = [
        (images[start : start + _MICRO_BATCH],) for start in range(0, len(images), _MICRO_BATCH)
    ]
    calibrated = quantized.calibrated
    details = DetailsMeter(calibrated)
    done = 0

    def watch(float_run: FloatRun) -> None:
        nonlocal done
        details.add(float_run)
        done += 1
        if progress is not None:
            progress("measure", done, len(batches))

    readings = measure(calibrated, batches, multipliers_of(calibrated), watch)
    found: tuple[Suggestion, ...] = ()
    if suggestions:
        found = suggest(calibrated, readings, batches, suggestions, progress, memory_limit)
    combined, output, results = None, None, None
    if found:
        combined = combine(calibrated, found)
        results = run(combined, batches)
        output = output_error(readings.results[0], results)
    return Diagnosis(quantized, readings, found, combined, output, details.channels(), details.heads(), labels, results)


__all__ = ["DEFAULT_SUGGESTIONS", "Diagnosis", "diagnose"]
