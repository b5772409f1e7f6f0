"""Rounding that carries each weight's error on to the weights not yet rounded: GPTQ.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023,
arXiv 2210.17323), algorithm 1, with the inputs in order of falling energy ("act-order" of the official code). After
input ``j`` is rounded with error ``e``, the weights of the inputs after it move by ``-e / U_jj U_j,`` where ``U`` is
the upper Cholesky factor of the inverse second moments: the least-squares optimal answer to the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Added to the diagonal, as a share of its mean (official code: 0.01).
DAMPING = 0.01
#: Inputs whose corrections are applied together; changes nothing but the speed.
_BLOCK = 128


def round_with_feedback(weight: Tensor, moments: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Round weights to a grid so that the outputs, not the weights, stay close.

    Args:
        weight: float32 (N, K).
        moments: float64 (K, K), second moments of the inputs that the quantized layer reads.
        scale: float32 (N,), step of each output's grid.
        qmax: codes are -qmax to qmax; ties go to the even code.

    Returns:
        Codes, float32 (N, K), integers.
    """
    width = weight.shape[1]
    energy = moments.diagonal()
    order = torch.argsort(energy, descending=True, stable=True)
    damping = DAMPING * float(energy.mean())
    if damping == 0:
        # No input ever differs from its mean: every rounding gives the same outputs.
        return (weight / scale[:, None]).round().clamp(-qmax, qmax)
    system = moments[order][:, order] + damping * torch.eye(width, dtype=torch.float64, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    upper = torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
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
