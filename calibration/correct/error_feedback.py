"""Rounding that carries each weight's error on to the weights not yet rounded: GPTQ.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023,
arXiv 2210.17323), algorithm 1, with the inputs in order of falling energy ("act-order" of the official code). After
input ``j`` is rounded with error ``e``, the weights of the inputs after it move by ``-e / U_jj U_j,`` where ``U`` is
the upper Cholesky factor of the inverse second moments: the least-squares optimal answer to the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Added to the diagonal, as a share of its mean (official code: 0.01).
DAMPING = 0.01
#: Inputs whose corrections are applied together; changes nothing but the speed.
_BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """How the error of one input's weights is made up for by the inputs after it.

    Args:
        order: int64 (K,), inputs in the order in which they are rounded.
        upper: float32 (K, K), upper Cholesky factor of the inverse second moments, in that order; None where no input
            ever differs from its mean, so that every rounding gives the same outputs.
    """

    order: Tensor
    upper: Tensor | None


def feedback(moments: Tensor) -> Feedback:
    """Prepare the rounding of a layer's weights.

    Args:
        moments: float64 (K, K), second moments of the inputs that the quantized layer reads.
    """
    energy = moments.diagonal()
    order = torch.argsort(energy, descending=True, stable=True)
    damping = DAMPING * float(energy.mean())
    if damping <= 0:
        return Feedback(order, None)
    system = moments[order][:, order]
    system.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    return Feedback(order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32))


def round_with_feedback(weight: Tensor, prepared: Feedback, scale: Tensor, qmax: int) -> Tensor:
    """Round weights to a grid so that the outputs, not the weights, stay close.

    Args:
        weight: float32 (N, K).
        prepared: of the layer's inputs.
        scale: float32 (N,), step of each output's grid.
        qmax: codes are -qmax to qmax; ties go to the even code.

    Returns:
        Codes, float32 (N, K), integers.
    """
    order, upper = prepared.order, prepared.upper
    if upper is None:
        return (weight / scale[:, None]).round().clamp(-qmax, qmax)
    width = weight.shape[1]
    # Inputs along axis 0, so that a step works on contiguous memory.
    rest = weight[:, order].T.contiguous()
    codes = torch.empty_like(rest)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        block, errors = rest[start:stop], torch.empty_like(rest[start:stop])
        for i in range(stop - start):
            codes[start + i] = (block[i] / scale).round_().clamp_(-qmax, qmax)
            errors[i] = (block[i] - codes[start + i] * scale) / upper[start + i, start + i]
            block[i + 1 :] -= torch.outer(upper[start + i, start + i + 1 : stop], errors[i])
        rest[stop:] -= upper[start:stop, stop:].T @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()
