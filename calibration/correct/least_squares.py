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
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def least_squares(weight: Tensor, halves: tuple[MomentSums, MomentSums] | None, moments: Moments) -> Tensor:
    """Return corrected weights, float32 (N, K); the given ones where no correction helps.

    Args:
        weight: float weights (N, K).
        halves: moments of either half of the images; None where there is only one image, which is not corrected for.
        moments: moments of all images.
    """
    if halves is None:
        return weight
    folds = (halves[0].finish(), halves[1].finish())
    scores = [_held_out_error(weight, folds, ridge) for ridge in RIDGES]
    best = min(range(len(RIDGES)), key=scores.__getitem__)
    plain = sum(float(fold.output_errors(weight, weight).sum()) for fold in folds)
    if scores[best] >= plain:
        return weight
    return _fit(weight, moments, RIDGES[best]).to(torch.float32)


def _held_out_error(weight: Tensor, folds: tuple[Moments, Moments], ridge: float) -> float:
    return sum(
        float(seen.output_errors(weight, _fit(weight, fitted, ridge)).sum()) for fitted, seen in (folds, folds[::-1])
    )


def _fit(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    double = weight.to(torch.float64)
    variance = float(moments.qq.diagonal().mean())
    if variance == 0:
        return double
    system = moments.qq + ridge * variance * torch.eye(len(moments.qq), dtype=torch.float64, device=weight.device)
    residual = moments.targets(weight) - double @ moments.qq
    return double + torch.linalg.solve(system, residual.T).T
