"""Searches of an operand's format by the error at the result of the operation that reads it.

Two steps for each family of formats. The histogram scores all that the spec allows, cheaply; the best few of them, and
what the range searches choose, are then scored by the error that their quantization brings to the result, on sampled
rows, and refined by :mod:`calibration.search.progressive`. So neither a range search nor a family alone is better than
the outcome on that error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from calibration.search.progressive import progressive_search
from calibration.search.ranges import histogram_error, percentile_formats, search_activation
from calibration.statistics import Histogram
from quantizers.codebook import TOP, Codebook, CodebookQParams, codebook_qparams, fake_quantize_codebook, thresholds
from quantizers.families import candidates
from quantizers.spec import RANGE_SEARCHES, QuantSpec
from quantizers.uniform import UniformQParams, bounds, fake_quantize

#: Formats that go from the histogram's ranking to the error at the result.
_SHORTLIST = 12
#: Shares of the full range, and numbers of zero points, of the uniform grid.
_SHARES = tuple(i / 32 for i in range(4, 33))
_ZERO_POINTS = 16
#: Shares of the largest value that a codebook's largest level may stand for.
_PEAKS = tuple(i / 16 for i in range(4, 17))
#: Ranges narrower than this count as zero, as in :mod:`quantizers.uniform`.
_SMALLEST_RANGE = 2.0**-60
#: Output directions on which errors are measured, see :func:`output_error`.
_DIRECTIONS = 64

OperandQParams = UniformQParams | CodebookQParams
Error = Callable[[OperandQParams], float]


def output_error(rows: Tensor, weight: Tensor) -> Error:
    """Return the mean squared error at a layer's output as a function of its input's format.

    Where a layer has more outputs than :data:`_DIRECTIONS`, the error is measured along as many random combinations of
    them (signs from a fixed seed): an estimate without bias of the error over all of them, at a fraction of the cost.

    Args:
        rows: sampled inputs, float32 (R, K).
        weight: float32 (N, K), of all layers that read the input.
    """
    projection = weight.T
    if len(weight) > _DIRECTIONS:
        signs = torch.randint(0, 2, (len(weight), _DIRECTIONS), generator=torch.Generator().manual_seed(0))
        projection = projection @ ((2.0 * signs - 1.0) / _DIRECTIONS**0.5).to(weight.device)

    def error(qparams: OperandQParams) -> float:
        return float(((apply_operand(rows, qparams) - rows) @ projection).square().sum(1).mean())

    return error


def apply_operand(x: Tensor, qparams: OperandQParams) -> Tensor:
    """Fake-quantize in a uniform format or a codebook."""
    return fake_quantize(x, qparams) if isinstance(qparams, UniformQParams) else fake_quantize_codebook(x, qparams)


def search_operand(stats: Histogram, spec: QuantSpec, error: Error, formats: Sequence[str]) -> OperandQParams:
    """Choose format and parameters of an operand.

    Args:
        stats: of all its values.
        spec: width and symmetry.
        error: at the result of the operation that reads it.
        formats: families of :mod:`quantizers.families`, ``uniform`` among them or not.

    Returns:
        The format with the least error.
    """
    found: list[OperandQParams] = []
    # Each family for itself: in a common shortlist one would crowd out another that is better once it is refined.
    for family in formats:
        incumbents: list[OperandQParams] = []
        if family == "uniform":
            incumbents = [search_activation(stats, dataclasses.replace(spec, search=s)) for s in RANGE_SEARCHES]
            incumbents += percentile_formats(stats, spec)
            grid: list[OperandQParams] = list(_uniform_grid(stats, spec))
        else:
            grid = list(_codebook_grid(stats, candidates(family, spec.bits)))
        span = max(stats.high, 0.0) - min(stats.low, 0.0)
        gap = span / (2**spec.bits - 1) / len(_SHARES) if family == "uniform" else span / TOP / len(_PEAKS)
        ranked = sorted((local_error(stats, qparams), i) for i, qparams in enumerate(grid))
        scale, chosen = progressive_search(
            [(_scale(grid[i]), grid[i]) for _, i in ranked[:_SHORTLIST]],
            lambda scale, qparams: error(with_scale(qparams, scale)),
            gap=gap,
            incumbents=[(_scale(qparams), qparams) for qparams in incumbents],
            width=3,
            candidates=12,
            steps=4,
        )
        found.append(with_scale(chosen, scale))
    return found[0] if len(found) == 1 else min(found, key=error)


def search_percentiles(stats: Histogram, spec: QuantSpec, error: Error) -> UniformQParams:
    """Choose among RepQ-ViT's three percentile ranges and the full one by the error at the result.

    By their own error, as the paper has it, values behind GELU lose the few massive ones that a network such as DINOv2
    lives on: that costs it 20 points at 6 bits.

    Args:
        stats: of all values of the operand.
        spec: uniform.
        error: at the result of the operation that reads it.
    """
    return min(percentile_formats(stats, spec), key=error)


def with_scale(qparams: OperandQParams, scale: float) -> OperandQParams:
    """Return a format with another scale, as a float32 value."""
    stored = float(np.float32(scale))
    if isinstance(qparams, UniformQParams):
        return dataclasses.replace(qparams, scale=(stored,))
    # A codebook's steps are finer than its codes.
    return dataclasses.replace(qparams, scale=stored)


def local_error(stats: Histogram, qparams: OperandQParams) -> float:
    """Return the mean squared error of the values themselves, over the bins' centres."""
    if isinstance(qparams, UniformQParams):
        return histogram_error(stats, qparams)
    centers, counts = stats.filled()
    levels = np.array(qparams.codebook.levels, np.float64)
    steps = centers / qparams.scale + qparams.zero_point
    passed = np.searchsorted(np.array(thresholds(qparams.codebook)) / 2, steps)
    error = (levels[passed] - steps) * qparams.scale
    return float((error * error * counts).sum() / max(stats.count, 1))


def _scale(qparams: OperandQParams) -> float:
    return qparams.scale[0] if isinstance(qparams, UniformQParams) else qparams.scale


def _uniform_grid(stats: Histogram, spec: QuantSpec) -> Sequence[UniformQParams]:
    """Return scales and zero points, those of one-sided values among them at every width."""
    qmin, qmax = bounds(spec)
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if high - low < _SMALLEST_RANGE:
        return [search_activation(stats, dataclasses.replace(spec, search="minmax"))]
    if spec.symmetric:
        return [
            UniformQParams((float(np.float32(share * max(-low, high) / qmax)),), 0, qmin, qmax) for share in _SHARES
        ]
    count = qmax - qmin
    zero_points = sorted({qmin + round(count * i / (_ZERO_POINTS - 1)) for i in range(_ZERO_POINTS)})
    scales = [float(np.float32(share * (high - low) / count)) for share in _SHARES]
    return [UniformQParams((scale,), zero, qmin, qmax) for scale in scales for zero in zero_points]


def _codebook_grid(stats: Histogram, codebooks: Sequence[Codebook]) -> Sequence[CodebookQParams]:
    """Return codebooks that begin at the lowest value, and codebooks that begin at zero.

    Beginning at the lowest value is AdaLog's shift after GELU (arXiv 2407.12951, section 3.3), which is -0.17 at least.
    """
    low, high = min(stats.low, 0.0), max(stats.high, 0.0)
    if high - low < _SMALLEST_RANGE:
        return [codebook_qparams(low, high, codebooks[0])]
    formats: list[CodebookQParams] = []
    for codebook in codebooks:
        top = codebook.levels[-1]
        for peak in _PEAKS:
            for shift in {0.0, -low}:
                scale = np.float32((high * peak + shift) / top)
                if scale > 0 and round(shift / scale) <= top:
                    formats.append(CodebookQParams(codebook, float(scale), round(float(shift / scale))))
    return formats
