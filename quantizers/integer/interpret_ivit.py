"""The published operators of I-ViT (arXiv 2207.01405) on int64 tensors: the definition, and what simulations use.

Formulas stand in :mod:`quantizers.integer.ops` and :mod:`quantizers.integer.ivit`, reasons in ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quantizers.integer.ivit import PAPER_START, RECIPROCAL
from quantizers.integer.program import Node
from quantizers.integer.saturation import DTYPES, saturate, shift_round


def shift_exponential(distance: Tensor, inverse: int, window: int) -> Tensor:
    """Return the exponentials of int64 distances; :func:`quantizers.integer.ivit.shift_exponential` for a tensor."""
    power = (distance + (distance >> 1) - (distance >> 4)).clamp(min=-window * inverse)
    whole = torch.div(-power, inverse, rounding_mode="floor")
    rest = power + whole * inverse
    return ((rest + 2 * inverse) << (window - whole).clamp(max=31)) >> 1


def shiftmax(codes: Tensor, inverse: int, window: int, bits: int) -> Tensor:
    """Softmax over the last axis (section 3.3, Algorithm 1).

    Args:
        codes: int64 (..., keys); their zero point cancels.
        inverse: ``I0`` of the scale of the codes.
        window: bits below one that the exponentials keep.
        bits: width of the result, 8 or 16.

    Returns:
        int64 (..., keys), codes of ``2^-(bits-1)``, not negative.
    """
    exponentials = shift_exponential(codes - codes.amax(-1, keepdim=True), inverse, window)
    total = exponentials.sum(-1, keepdim=True).clamp(max=RECIPROCAL)
    factor = torch.div(RECIPROCAL, total, rounding_mode="floor")
    return (exponentials * factor) >> (32 - bits)


def shift_gelu(codes: Tensor, inverse: int, window: int, bits: int) -> Tensor:
    """GELU as ``x sigmoid(1.702 x)``, the sigmoid relative to the largest of each row (section 3.4).

    Args:
        codes: int64 (..., row), zero point taken off.
        inverse: ``I0`` of 1.702 times the scale of the codes.
        window: bits below one that the exponentials keep.
        bits: width of the sigmoid, 8 in the paper.

    Returns:
        int64 (..., row), codes of the input's scale times ``2^-(bits-1)``.
    """
    largest = codes.amax(-1, keepdim=True)
    above = shift_exponential(codes - largest, inverse, window)
    one = shift_exponential(-largest, inverse, window).clamp(max=RECIPROCAL)
    factor = torch.div(RECIPROCAL, (above + one).clamp(max=RECIPROCAL), rounding_mode="floor")
    return codes * ((above * factor) >> (32 - bits))


def newton_root(value: Tensor, start: int, iterations: int) -> Tensor:
    """Return the published square roots of int64 values; :func:`quantizers.integer.ivit.newton_root` for a tensor."""
    root = torch.full_like(value, 1 << max(start, 0))
    if start == PAPER_START:
        # The number of bits, by counting the powers of two that are not above the value.
        bits = sum(((value >> bit) > 0).to(torch.int64) for bit in range(62))
        root = torch.ones_like(value) << torch.div(bits, 2, rounding_mode="floor")
    for _ in range(iterations):
        root = ((root + torch.div(value, root, rounding_mode="floor")) >> 1).clamp(min=1)
    return root


def normalize(codes: Tensor, start: int, iterations: int) -> Tensor:
    """Subtract the rounded mean and divide by the root of the sum of squares (section 3.5).

    Args:
        codes: int64 (..., channels).
        start: exponent of Newton's first root, or -1 for the paper's.
        iterations: Newton's steps.

    Returns:
        int64 (..., channels), in steps of ``sqrt(channels) / 2^30`` standard deviations.
    """
    width = codes.shape[-1]
    doubled = 2 * codes.sum(-1, keepdim=True) + width
    mean = torch.div(doubled, 2 * width, rounding_mode="floor")
    # That is half up; of an exact tie the even neighbour is wanted, as torch.round has it.
    mean = mean - ((doubled == mean * 2 * width) & (mean % 2 != 0)).to(torch.int64)
    centred = codes - mean
    root = newton_root((centred * centred).sum(-1, keepdim=True), start, iterations)
    return (centred * torch.div(RECIPROCAL, root, rounding_mode="floor")) >> 1


def _shiftmax(node: Node, x: Tensor) -> Tensor:
    settings = (node.integer(key) for key in ("inverse_scale", "window", "bits"))
    return shiftmax(x.to(torch.int64), *settings).to(DTYPES[node.type.dtype])


def _shift_gelu(node: Node, x: Tensor) -> Tensor:
    settings = (node.integer(key) for key in ("inverse_scale", "window", "bits"))
    return shift_gelu(x.to(torch.int64) - node.integer("input_zero_point"), *settings).to(torch.int32)


def _i_layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normalized = normalize(x.to(torch.int64), node.integer("start"), node.integer("iterations"))
    return saturate(shift_round((normalized + bias[0]) * weight[0].to(torch.int64), node), node)


IVIT_INTERPRETERS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"shiftmax": _shiftmax, "shift_gelu": _shift_gelu, "i_layer_norm": _i_layer_norm}
)
