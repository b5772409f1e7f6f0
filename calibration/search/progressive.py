"""Progressive search of scales: a beam whose offsets shrink, so that few evaluations reach a fine grid.

FPCS of AdaLog (Wu et al., "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm
Quantizer", ECCV 2024, arXiv 2407.12951, section 3.4): score a coarse grid, keep the best few, look around each of them
at a distance that shrinks from step to step. What has a scale and something else (zero point, codebook) is refined in
its scale only.

The published search can end worse than it began, because survivors are not scored again between steps. Here the best
candidate ever seen is returned, and candidates of other searches take part: the result is never worse than any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Other = TypeVar("Other")

#: Beam width, candidates a step, and steps, as published.
WIDTH, CANDIDATES, STEPS = 16, 128, 6


def progressive_search(
    grid: Sequence[tuple[float, Other]],
    score: Callable[[float, Other], float],
    *,
    gap: float,
    incumbents: Sequence[tuple[float, Other]] = (),
    width: int = WIDTH,
    candidates: int = CANDIDATES,
    steps: int = STEPS,
) -> tuple[float, Other]:
    """Return the (scale, other) with the least score; of equal ones, the first seen.

    Args:
        grid: first step: positive scales and what goes with them.
        score: error of a candidate.
        gap: distance of neighbouring scales in the grid.
        incumbents: results of other searches; scored first.
        width: how many survive a step.
        candidates: how many are scored in each later step.
        steps: steps in all, the grid included.
    """
    best = min(((score(*entry), i) for i, entry in enumerate(incumbents)), default=(float("inf"), 0))
    winner = incumbents[best[1]] if incumbents else grid[0]
    lowest = best[0]
    current = list(grid)
    for step in range(steps):
        scored = sorted(((score(*entry), i) for i, entry in enumerate(current)))
        if scored[0][0] < lowest:
            lowest, winner = scored[0][0], current[scored[0][1]]
        if step == steps - 1:
            break
        survivors = [current[i] for _, i in scored[:width]]
        offsets = torch.linspace(-gap / 2, gap / 2, max(2, candidates // len(survivors))).tolist()
        gap /= len(offsets) - 0.5
        current = [(scale + offset, other) for scale, other in survivors for offset in offsets if scale + offset > 0]
    return winner


def progressive_search_groups(
    scales: Tensor,
    score: Callable[[Tensor], Tensor],
    *,
    incumbents: Sequence[Tensor] = (),
    width: int = 4,
    steps: int = 3,
) -> Tensor:
    """Search a scale for each of several groups at once (output channels, heads).

    Args:
        scales: float64 (n, G), n at least 2: evenly spaced positive scales, ascending, for each group.
        score: errors (G,) of scales (G,).
        incumbents: scales (G,) of other searches.
        width: how many survive a step, in each group.
        steps: steps in all, the grid included.

    Returns:
        float64 (G,), in each group the scale with the least error ever seen; of equal ones, the first.
    """
    lowest = torch.full_like(scales[0], float("inf"))
    winner = scales[-1].clone()

    def look(candidates: Tensor) -> Tensor:
        nonlocal lowest, winner
        errors = []
        for candidate in candidates:
            error = score(candidate)
            better = error < lowest
            lowest, winner = torch.where(better, error, lowest), torch.where(better, candidate, winner)
            errors.append(error)
        return torch.stack(errors)

    if incumbents:
        look(torch.stack([incumbent.to(scales) for incumbent in incumbents]))
    gap = (scales[-1] - scales[0]) / (len(scales) - 1)
    current = scales
    for step in range(steps):
        errors = look(current)
        if step == steps - 1:
            break
        kept = torch.take_along_dim(current, errors.argsort(dim=0, stable=True)[:width], 0)
        offsets = torch.tensor([-0.5, -1 / 6, 1 / 6, 0.5], dtype=scales.dtype, device=scales.device)
        around = (kept[:, None] + offsets[None, :, None] * gap).flatten(0, 1)
        current = around.clamp(min=torch.finfo(torch.float32).tiny)
        gap = gap / 3.5
    return winner
