"""What a diagnosis measured: layers, sites and the network's result; errors are shares of squared float values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from calibration.calibrated import CalibratedSite, QParams
from calibration.statistics import Histogram
from quantizers.codebook import CodebookQParams
from quantizers.uniform import UniformQParams

#: Errors below this share of the signal are rounding of float32.
NOTHING = 1e-13
#: A range that some search chose has at most about 8 times the least error, one that is 8 times too wide 64 times.
LARGEST_MISFIT = 16.0
#: Values of other images reach this far beyond those of calibration, at most, and a search leaves out this much.
LARGEST_RANGE_RATIO = 4.0


@dataclass(frozen=True, slots=True)
class SiteReading:
    """A site on its own.

    Args:
        entry: the site with its format.
        effect: squared error of the network's result that this site alone brings to first order, as a share of the
            squared result.
        own: squared error of its values in its format, float values given, as a share of their squares.
        histogram: of the float values of an activation; None for weights.
        misfit: how many times the squared error of its values is that of the best uniform range for these images; None
            where the format has no single range of at most 8 bits.
    """

    entry: CalibratedSite
    effect: float
    own: float
    histogram: Histogram | None
    misfit: float | None

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.entry.site.name

    @property
    def fits(self) -> bool:
        """Whether its range suits these images, as far as that can be said of its format.

        It does not where it is several times too wide or too narrow, and the values lose by it.
        """
        used = self.range_used()
        if used is None or self.misfit is None or self.misfit <= LARGEST_MISFIT:
            return True
        return 1 / LARGEST_RANGE_RATIO <= used <= LARGEST_RANGE_RATIO

    def range_used(self) -> float | None:
        """Return the largest value as a share of the largest that the format holds on that side; above 1 it clips.

        None where the format has no range of its own: weights, probabilities, and a scale for each head.
        """
        ends = level_range(self.entry.qparams)
        if self.histogram is None or ends is None:
            return None
        shares = [
            value / end for value, end in zip((self.histogram.low, self.histogram.high), ends, strict=True) if end != 0
        ]
        return max(shares, default=None)


@dataclass(frozen=True, slots=True)
class LayerReading:
    """An operation that reads quantized operands; errors are shares of the squared float result.

    Args:
        operation: name in the graph.
        module: path of its module.
        op: operator.
        sites: names of the sites that it reads first, in their operands' order.
        effect: as :class:`SiteReading` has it, of all formats of its operands together: corrected weights make up for
            the errors of what they read, so that this may be less than what each does alone.
        weight: error of weight and bias alone; None where it has none.
        activation: error of the formats of its operands alone.
        inherited: error of what it reads, before its own formats.
        total: error of what it gives.
        fits: whether the formats of all its operands suit these images.
    """

    operation: str
    module: str
    op: str
    sites: tuple[str, ...]
    effect: float
    weight: float | None
    activation: float
    inherited: float
    total: float
    fits: bool


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """What one pass over the images measured.

    Args:
        images: how many.
        layers: in execution order.
        sites: in execution order.
        output: squared error of the network's result as a share of its square.
        results: float results, and simulated ones, float32 (images, C), all outputs joined.
    """

    images: int
    layers: tuple[LayerReading, ...]
    sites: tuple[SiteReading, ...]
    output: float
    results: tuple[Tensor, Tensor]

    def worst(self) -> tuple[LayerReading, ...]:
        """Return the layers whose formats do not fit, then the others, each by what they do to the result."""
        return tuple(sorted(self.layers, key=lambda layer: (layer.fits, -layer.effect)))


def level_range(qparams: QParams) -> tuple[float, float] | None:
    """Return the lowest and the highest value that a format of one scale holds; None for other formats."""
    if isinstance(qparams, UniformQParams) and len(qparams.scale) == 1:
        codes = (qparams.qmin - qparams.zero_point, qparams.qmax - qparams.zero_point)
        return codes[0] * qparams.scale[0], codes[1] * qparams.scale[0]
    if isinstance(qparams, CodebookQParams):
        levels = qparams.codebook.levels
        return (levels[0] - qparams.zero_point) * qparams.scale, (levels[-1] - qparams.zero_point) * qparams.scale
    return None


def decibel(share: float) -> float:
    """Return a squared error, as a share of the squared signal, as a signal-to-noise ratio in decibel."""
    return -10 * math.log10(max(share, NOTHING))
