"""Where the batch axis of a traced tensor stands, and how its other axes map to the axes of a sample.

A traced tensor holds the batch at some axis, alone (``B``) or as the major part of a product (``64 B``
windows). A sample is what remains for one image: the axis goes, or keeps the minor factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from quantizers.errors import ModelError


@dataclass(frozen=True, slots=True)
class Layout:
    """Batch axis of a traced tensor of ``rank`` axes; ``multiplicity`` is what shares the axis with it."""

    axis: int
    multiplicity: int
    rank: int

    def sample_axis(self, traced_axis: int) -> int:
        """Map an axis of the traced tensor to one of a sample.

        Raises:
            ModelError: the axis is the batch itself.
        """
        axis = traced_axis % self.rank
        if self.multiplicity > 1 or axis < self.axis:
            return axis
        if axis == self.axis:
            raise ModelError(f"an operator works along the batch (axis {axis}); samples must not mix")
        return axis - 1

    def is_batch(self, traced_axis: int) -> bool:
        """Whether an axis of the traced tensor is the batch and nothing else."""
        return self.multiplicity == 1 and traced_axis % self.rank == self.axis

    def constant(self, tensor: Tensor) -> Tensor:
        """Turn a constant that broadcasts with the traced tensor into one that does with a sample."""
        full = tensor.reshape((1,) * (self.rank - tensor.ndim) + tuple(tensor.shape))
        if self.multiplicity > 1:
            return full
        if full.shape[self.axis] != 1:
            raise ModelError(f"a constant of shape {tuple(tensor.shape)} differs between the samples of a batch")
        return full.squeeze(self.axis)


def layout_of(shape: Sequence[int | torch.SymInt]) -> tuple[Layout, tuple[int, ...]] | None:
    """Return the layout and the sample shape of a traced shape, or None for one without the batch.

    Raises:
        ModelError: the batch appears in two axes, or not as a plain multiple.
    """
    found = [(axis, extent) for axis, extent in enumerate(shape) if _symbols(extent)]
    if not found:
        return None
    if len(found) > 1:
        raise ModelError(f"the batch appears in several axes of a tensor of shape {tuple(shape)}; samples must not mix")
    axis, extent = found[0]
    expression = _expression(extent)
    coefficient = expression / next(iter(expression.free_symbols))
    if not coefficient.is_Integer:
        raise ModelError(f"axis {axis} of a tensor of shape {tuple(shape)} is not a multiple of the batch")
    multiplicity = int(coefficient)
    sizes = [int(e) if i != axis else multiplicity for i, e in enumerate(shape) if i != axis or multiplicity > 1]
    return Layout(axis, multiplicity, len(shape)), tuple(sizes)


def _expression(extent: int | torch.SymInt) -> sympy.Expr:
    return extent.node.expr if isinstance(extent, torch.SymInt) else sympy.Integer(extent)


def _symbols(extent: int | torch.SymInt) -> bool:
    return bool(_expression(extent).free_symbols)
