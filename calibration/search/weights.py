"""Searches of a weight's scales by the error of the layer's output, over every row that the layer reads."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.correct.error_feedback import feedback, round_with_feedback
from calibration.moments import Moments
from calibration.search.progressive import progressive_search_groups
from calibration.search.ranges import search_weight
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, bounds

#: Shares of a row's largest weight that the first step tries.
_SHARES = (0.3, 1.0, 15)


def nearest(rows: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Return codes of the nearest values, float32 (N, K), for rows (N, K) and scales (N,); ties to the even code."""
    return (rows / scale[:, None]).round().clamp(-qmax, qmax)


def search_weight_output(weight: Tensor, moments: Moments, spec: QuantSpec) -> Tensor:
    """Return the scale of each row, float32 (N,), with the least error at the layer's output.

    The scales of ``minmax`` and ``mse`` are candidates, so that neither is better on this measure.

    Args:
        weight: float32 (N, K).
        moments: of the layer's inputs.
        spec: width.
    """
    qmax = bounds(spec)[1]
    # Scores only rank scales: float32 is enough for them, and twice as fast.
    targets, seen = (2 * moments.targets(weight)).to(torch.float32), moments.qq.to(torch.float32)
    peak = weight.abs().amax(1).clamp(min=2.0**-100).to(torch.float64)

    def score(scale: Tensor) -> Tensor:
        step = scale.to(torch.float32)
        values = nearest(weight, step, qmax) * step[:, None]
        return ((values @ seen - targets) * values).sum(1).to(torch.float64)

    grid = torch.linspace(*_SHARES, dtype=torch.float64, device=weight.device)[:, None] * peak / qmax
    plain = [
        scales_of(search_weight(weight, QuantSpec(spec.bits, granularity="channel", search=search)), weight)
        for search in ("minmax", "mse")
    ]
    return progressive_search_groups(grid, score, incumbents=plain).to(torch.float32)


def search_weight_feedback(weight: Tensor, target: Tensor, moments: Moments, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return scales (N,) and codes (N, K) of the rounding with the least error at the layer's output, row by row.

    Candidates: the nearest codes at the scales of ``minmax``, ``mse`` and ``output``, and error feedback from the float
    weights and from the corrected ones. So no row is worse on this measure than under any of those searches.

    Args:
        weight: float weights, float32 (N, K).
        target: corrected weights, float32 (N, K).
        moments: of the layer's inputs.
        spec: width.
    """
    qmax = bounds(spec)[1]
    targets = moments.targets(weight)
    scales = [
        scales_of(search_weight(weight, QuantSpec(spec.bits, granularity="channel", search=search)), weight)
        for search in ("minmax", "mse")
    ]
    scales.append(search_weight_output(weight, moments, spec))
    candidates = [(scale, nearest(weight, scale, qmax)) for scale in scales]
    prepared = feedback(moments.qq)
    for source in (weight,) if target is weight else (weight, target):
        scale = _weighted_scale(source, moments.qq.diagonal(), qmax)
        candidates.append((scale, round_with_feedback(source, prepared, scale, qmax)))
    best_scale, best_codes = candidates[0]
    best = torch.full((len(weight),), float("inf"), dtype=torch.float64, device=weight.device)
    for scale, codes in candidates:
        error = moments.errors_without_reference(targets, (codes * scale[:, None]).to(torch.float64))
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better[:, None], codes, best_codes)
    return best_scale, best_codes


def scales_of(qparams: UniformQParams, like: Tensor) -> Tensor:
    """Return the scales as float32 (N,) on the device of another tensor."""
    return torch.tensor(qparams.scale, dtype=torch.float32, device=like.device)


def _weighted_scale(weight: Tensor, energy: Tensor, qmax: int) -> Tensor:
    """Return the scales with the least squared error of the weights, each weighted by its input's energy."""
    peak = weight.abs().amax(1).clamp(min=2.0**-100).to(torch.float64)
    share = energy.to(torch.float32)

    def score(scale: Tensor) -> Tensor:
        step = scale.to(torch.float32)
        return ((nearest(weight, step, qmax) * step[:, None] - weight).square() * share).sum(1).to(torch.float64)

    grid = torch.linspace(*_SHARES, dtype=torch.float64, device=weight.device)[:, None] * peak / qmax
    return progressive_search_groups(grid, score).to(torch.float32)
