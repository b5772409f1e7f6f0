"""Searches of the scales of queries, keys and values by the error of the attention product, head by head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calibration.search.progressive import progressive_search_groups
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams

#: Shares of the largest value of a head that the first step tries.
_SHARES = (0.2, 1.0, 17)
_SMALLEST_PEAK = 2.0**-60


def search_attention_operand(
    operand: Tensor,
    product_error: Callable[[Tensor], Tensor],
    spec: QuantSpec,
    incumbents: Sequence[UniformQParams],
) -> UniformQParams:
    """Choose the scale of an operand of an attention product, one for each head or one for all.

    Args:
        operand: sampled values, float32 ``(images, ..., heads, M, K)``.
        product_error: from an error of the operand to the squared error of the product, summed over its last two axes:
            ``(images, ..., heads)``.
        spec: granularity ``head`` or ``tensor``.
        incumbents: what range searches choose; at least one. The result has a zero point that one of them has. None of
            them is better than the result, and in no head one of the same zero point.
    """
    zero_points = dict.fromkeys(entry.zero_point for entry in incumbents)
    results = []
    for zero_point in zero_points:
        same = [entry for entry in incumbents if entry.zero_point == zero_point]
        results.append(_search_scales(operand, product_error, spec.granularity == "head", same))
    return min(results, key=lambda entry: entry[0])[1]


def _search_scales(
    operand: Tensor, product_error: Callable[[Tensor], Tensor], per_head: bool, incumbents: Sequence[UniformQParams]
) -> tuple[float, UniformQParams]:
    """Return the least error and its format; the incumbents have one zero point."""
    form = incumbents[0]
    heads = operand.shape[-3] if per_head else 1
    shape = (heads, 1, 1) if per_head else (1, 1, 1)

    def errors(scale: Tensor) -> Tensor:
        step = scale.to(torch.float32).reshape(shape)
        codes = ((operand / step).round() + form.zero_point).clamp(form.qmin, form.qmax)
        squared = product_error((codes - form.zero_point) * step - operand).to(torch.float64)
        return squared.reshape(-1, heads).sum(0) if per_head else squared.sum()[None]

    values = operand.movedim(-3, 0).flatten(1) if per_head else operand.reshape(1, -1)
    low, high = values.amin(1).clamp(max=0.0).to(torch.float64), values.amax(1).clamp(min=0.0).to(torch.float64)
    # Codes on either side of zero; the side that needs the larger step decides.
    below, above = form.zero_point - form.qmin, form.qmax - form.zero_point
    step = torch.maximum(-low / max(below, 1), high / max(above, 1)).clamp(min=_SMALLEST_PEAK)
    grid = torch.linspace(*_SHARES, dtype=torch.float64, device=operand.device)[:, None] * step
    known = [
        torch.tensor(entry.scale, dtype=torch.float64, device=operand.device).expand(heads) for entry in incumbents
    ]
    chosen = progressive_search_groups(grid, errors, incumbents=known).to(torch.float32)
    return float(errors(chosen).sum()), dataclasses.replace(form, scale=tuple(float(s) for s in chosen))
