"""Weights that fit the float outputs from quantized inputs: ridge regression, with the ridge chosen on held-out images.

ERQ (Zhong et al., "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers", ICML 2024, section 4.1)
corrects weights in closed form for the error that quantized activations bring:

    dW = (W Cxq - W Cqq) (Cqq + lambda I)^-1

with the moments of :mod:`calibration.moments`. Two things are different here. The rows are those that the quantized
network produces, so that a layer also makes up for the layers before it. And lambda is not a constant: each half of the
images fits weights for a list of them, the other half measures the error, and no correction at all is one of the
candidates, so that on images that it has not seen the correction is not worse than none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.moments import Moments, MomentSums

#: Ridges as shares of the mean variance of an input.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def least_squares(weight: Tensor, halves: tuple[MomentSums, MomentSums] | None, moments: Moments) -> Tensor:
    """Return corrected weights, float32 (N, K); the given ones where no correction helps.

    Args:
        weight: float weights (N, K).
        halves: moments of either half of the images; None where there is only one image, which is not corrected for.
        moments: moments of all images.
    """
    if halves is None:
        return weight
    systems = _System(weight, halves[0].finish()), _System(weight, halves[1].finish())
    scores = [sum(seen.error(fitted.fit(ridge)) for fitted, seen in (systems, systems[::-1])) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=scores.__getitem__)
    double = weight.to(torch.float64)
    if scores[best] >= sum(system.error(double) for system in systems):
        return weight
    return _System(weight, moments).fit(RIDGES[best]).to(torch.float32)


class _System:
    """The normal equations of a layer for one set of rows."""

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self._weight = weight.to(torch.float64)
        self._moments = moments
        self._targets = moments.targets(weight)
        # The difference comes first: exactly nothing is to be fitted where quantized rows are the float ones.
        self._residual = self._weight @ (moments.qx - moments.qq).T
        self._variance = float(moments.qq.diagonal().mean())

    def fit(self, ridge: float) -> Tensor:
        """Return the corrected weights, float64 (N, K)."""
        if self._variance <= 0:
            return self._weight
        damped = self._moments.qq.clone()
        damped.diagonal().add_(ridge * self._variance)
        return self._weight + torch.cholesky_solve(self._residual.T, torch.linalg.cholesky(damped)).T

    def error(self, weight: Tensor) -> float:
        """Return the summed squared error of weights, less what does not depend on them."""
        return float(self._moments.errors_without_reference(self._targets, weight).sum())
