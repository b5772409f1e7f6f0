"""Whether a backend gives the interpreter's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.console import Reporter
from ptq.data import ImageData


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of a comparison.

    Args:
        backend: what was compared with the interpreter.
        n: number of images.
        equal: whether every bit of every result is the same.
        max_abs_diff: largest difference.
    """

    backend: str
    n: int
    equal: bool
    max_abs_diff: float


def verify_backend(
    backend: str,
    run: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor],
    data: ImageData,
    batch_size: int,
    progress: Reporter | None = None,
) -> Verification:
    """Run both on all images and compare bit for bit."""
    seen, equal, difference = 0, True, 0.0
    for images, _ in data.batches(batch_size):
        expected, found = reference(images), run(images)
        equal = equal and torch.equal(expected, found)
        difference = max(difference, float((expected - found).abs().max()))
        seen += len(images)
        if progress is not None:
            progress(f"verify {backend}", seen, len(data))
    return Verification(backend, seen, equal, difference)
