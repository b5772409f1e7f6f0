"""Range searches: from statistics or weights to the parameters of a uniform quantizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibration.statistics import Histogram
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, fake_quantize, qparams_from_range

#: Candidate ranges as shares of the full one. The full range is last and ties go to the larger.
_ACTIVATION_SHARES = tuple(i / 100 for i in range(5, 101))
#: Shares of the values beyond either end, for ``percentile_mse``.
_TAILS = (1e-3, 1e-4, 1e-5)
_WEIGHT_SHARES = tuple(i / 100 for i in range(30, 101, 2))


def search_activation(stats: Histogram, spec: QuantSpec) -> UniformQParams:
    """Choose the parameters of an activation by ``spec.search``.

    ``minmax`` takes the extremes, ``percentile`` the range that holds that share of the values, ``mse``
    the share of the full range with the least mean squared error on the histogram, ``percentile_mse`` that of
    :data:`_TAILS` cut off on either side (RepQ-ViT, official code).
    """
    return qparams_from_range(*_range(stats, spec), spec)


def percentile_formats(stats: Histogram, spec: QuantSpec) -> list[UniformQParams]:
    """Return the formats of ``percentile_mse`` and that of the full range."""
    ends = [*_percentile_ranges(stats, spec), (stats.low, stats.high)]
    return [qparams_from_range(low, high, spec) for low, high in ends]


def search_heads(stats: Sequence[Histogram], spec: QuantSpec) -> UniformQParams:
    """Choose one scale per head, and one zero point for all, from the range that ``spec.search`` finds for each.

    Args:
        stats: of each head.
        spec: of granularity ``head``.
    """
    alone = dataclasses.replace(spec, granularity="tensor")
    lows, highs = zip(*(_range(head, alone) for head in stats), strict=True)
    return qparams_from_range(lows, highs, spec)


def _range(stats: Histogram, spec: QuantSpec) -> tuple[float, float]:
    if spec.search == "percentile_mse":
        ranges = _percentile_ranges(stats, spec)
        return min(ranges, key=lambda ends: histogram_error(stats, qparams_from_range(ends[0], ends[1], spec)))
    if spec.search == "percentile":
        return _percentile_range(stats, spec)
    if spec.search == "mse":
        shrunk = (qparams_from_range(stats.low * share, stats.high * share, spec) for share in _ACTIVATION_SHARES)
        share = _ACTIVATION_SHARES[_last_best(np.asarray([histogram_error(stats, qparams) for qparams in shrunk]))]
        return stats.low * share, stats.high * share
    return stats.low, stats.high


def histogram_error(stats: Histogram, qparams: UniformQParams) -> float:
    """Return the mean squared quantization error over the bins' centres."""
    centers, counts = stats.filled()
    scale = qparams.scale[0]
    codes = np.clip(np.rint(centers / scale) + qparams.zero_point, qparams.qmin, qparams.qmax)
    error = (codes - qparams.zero_point) * scale - centers
    return float((error * error * counts).sum() / max(stats.count, 1))


def search_weight(weight: Tensor, spec: QuantSpec) -> UniformQParams:
    """Choose one scale per output channel of a weight (N, ...), by extremes or by mean squared error.

    ``percentile`` means the extremes here: a row has too few entries for percentiles to differ. What looks at more than
    the weights (``output``, ``feedback``) begins with the least squared error.
    """
    rows = weight.reshape(weight.shape[0], -1)
    peak = rows.abs().amax(1)
    if spec.search in ("minmax", "percentile"):
        return qparams_from_range(-peak.cpu().numpy(), peak.cpu().numpy(), spec)
    best_error, best_peak = torch.full_like(peak, float("inf")), peak
    for share in _WEIGHT_SHARES:
        limit = peak * share
        candidate = qparams_from_range(-limit.cpu().numpy(), limit.cpu().numpy(), spec)
        error = (fake_quantize(rows, candidate) - rows).square().sum(1)
        better = error <= best_error
        best_error, best_peak = torch.where(better, error, best_error), torch.where(better, limit, best_peak)
    return qparams_from_range(-best_peak.cpu().numpy(), best_peak.cpu().numpy(), spec)


def _last_best(errors: npt.NDArray[np.float64]) -> int:
    return int(len(errors) - 1 - np.argmin(errors[::-1]))


def _percentile_ranges(stats: Histogram, spec: QuantSpec) -> list[tuple[float, float]]:
    shares = [dataclasses.replace(spec, percentile=100 * (1 - 2 * tail)) for tail in _TAILS]
    return [_percentile_range(stats, entry) for entry in shares]


def _percentile_range(stats: Histogram, spec: QuantSpec) -> tuple[float, float]:
    centers, counts = stats.centers(), stats.counts.numpy().astype(np.float64)
    half_bin = (centers[1] - centers[0]) / 2
    share = spec.percentile / 100
    if spec.symmetric:
        order = np.argsort(np.abs(centers), kind="stable")
        position = _bin_at(np.cumsum(counts[order]), share * stats.count)
        limit = float(np.abs(centers[order][position]) + half_bin)
        return max(stats.low, -limit), min(stats.high, limit)
    cumulative, tail = np.cumsum(counts), (1 - share) / 2 * stats.count
    low = centers[_bin_at(cumulative, tail)] - half_bin
    high = centers[_bin_at(cumulative, stats.count - tail)] + half_bin
    return max(stats.low, float(low)), min(stats.high, float(high))


def _bin_at(cumulative: npt.NDArray[np.float64], count: float) -> int:
    """Return the first bin at which the cumulative count reaches ``count``."""
    return min(int(np.searchsorted(cumulative, count)), len(cumulative) - 1)
