"""Weights of a layer: steps and codes by its spec, and a bias in the steps that the integer program has for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calibration.correct.least_squares import least_squares
from calibration.moments import Moments, MomentSums
from calibration.search.ranges import search_weight
from calibration.search.weights import nearest, scales_of, search_weight_feedback, search_weight_output
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, bounds

#: A bias of this many weight-and-input steps still leaves room for the products in int32.
_LARGEST_BIAS = 2**30
#: Largest bias, in steps, of a layer without weights: precise, and no step so small that multipliers vanish.
_BIAS_OF_DEAD_WEIGHTS = 2**20


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """Quantized weights of a layer.

    Args:
        scale: float32 (N,).
        codes: float32 (N, K), integers of the spec's width.
        bias: float32 (N,).
    """

    scale: Tensor
    codes: Tensor
    bias: Tensor

    def qparams(self, spec: QuantSpec) -> UniformQParams:
        """Return the format of the codes, those of a spec's width."""
        qmax = bounds(spec)[1]
        return UniformQParams(tuple(float(s) for s in self.scale.cpu()), 0, -qmax, qmax)

    def values(self) -> Tensor:
        """Return the weights, float32 (N, K), on their grid."""
        return self.codes * self.scale[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class LayerMoments:
    """Moments of a layer's inputs.

    Args:
        total: over all images.
        halves: sums over either half of the images; None where one of them has no row.
    """

    total: Moments
    halves: tuple[MomentSums, MomentSums] | None


def choose_in_range(rows: Tensor, bias: Tensor, spec: QuantSpec) -> LayerWeights:
    """Choose scales by the weights (N, K) alone, and round to the nearest codes."""
    scale = scales_of(search_weight(rows, spec), rows)
    return LayerWeights(scale, nearest(rows, scale, bounds(spec)[1]), bias)


class LayerFit:
    """Chooses scales and codes of one layer by what they do to its outputs, for as many specs as are asked for.

    Args:
        rows: float weights, float32 (N, K).
        bias: float32 (N,).
        moments: of the layer's inputs.
        correct: whether weights and bias make up for the errors of the inputs.
    """

    def __init__(self, rows: Tensor, bias: Tensor, moments: LayerMoments, *, correct: bool) -> None:
        self._rows, self._bias, self._moments, self._correct = rows, bias, moments.total, correct
        self._target = least_squares(rows, moments.halves, moments.total) if correct else rows

    def choose(self, spec: QuantSpec) -> LayerWeights:
        """Choose by a spec's width and search."""
        rows, bias = self._rows, self._bias
        if spec.search == "feedback":
            made = LayerWeights(*search_weight_feedback(rows, self._target, self._moments, spec), bias)
        elif spec.search == "output":
            scale = search_weight_output(self._target, self._moments, spec)
            made = LayerWeights(scale, nearest(self._target, scale, bounds(spec)[1]), bias)
        else:
            made = choose_in_range(self._target, bias, spec)
        if not self._correct:
            return made
        return replace(made, bias=bias + self._moments.bias_change(rows, made.values()).to(torch.float32))


def fit_to_bias(made: LayerWeights, input_scale: float, spec: QuantSpec) -> LayerWeights:
    """Make steps of input times weight, in which a bias is held as int32, large and small enough for it.

    Too small a step would overflow: it is raised. A channel whose weights are all zero has no step of its own and
    its scale of 1 would round the bias away: it gets the largest step of the other channels.
    """
    steps = made.bias.abs().to(torch.float64) / input_scale
    dead = (made.codes == 0).all(1)
    scale = made.scale.to(torch.float64)
    if not bool(dead.all()):
        scale = torch.where(dead, scale[~dead].max(), scale)
    elif bool((steps > 0).any()):
        scale = torch.full_like(scale, float(steps.max()) / _BIAS_OF_DEAD_WEIGHTS)
    scale = torch.maximum(scale, steps / _LARGEST_BIAS).to(torch.float32)
    # Zero stays zero at any step.
    raised = (scale > made.scale) & ~dead
    codes = torch.where(raised[:, None], nearest(made.values(), scale, bounds(spec)[1]), made.codes)
    return LayerWeights(scale, codes, made.bias)


def round_bias(made: LayerWeights, input_scale: float) -> Tensor:
    """Return the bias, float32 (N,), as the integer program adds it: whole steps of input times weight."""
    step = made.scale.to(torch.float64) * input_scale
    return ((made.bias.to(torch.float64) / step).round() * step).to(torch.float32)
