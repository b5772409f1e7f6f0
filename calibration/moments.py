"""Second moments of a layer's input rows, as the float and as the quantized network see them.

With ``x`` a float row and ``x^`` the row that the quantized layer reads, the squared error of a layer with weights ``W^``
against the float layer ``W`` summed over all rows, the best bias taken for granted, is

    sum |W x - W^ x^|^2 = tr(W Cxx W') - 2 tr(W^ Cqx W') + tr(W^ Cqq W^')

with centred moments ``C``: exact over every row of every image, in memory that does not grow with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Centred second moments of K inputs over ``count`` rows.

    Args:
        count: number of rows.
        mean: float64 (K,), of the float rows.
        mean_quantized: float64 (K,), of the quantized rows.
        xx: float64 (K, K), sum of ``(x - mean)(x - mean)'``.
        qx: float64 (K, K), sum of ``(x^ - mean_quantized)(x - mean)'``.
        qq: float64 (K, K), sum of ``(x^ - mean_quantized)(x^ - mean_quantized)'``.
    """

    count: int
    mean: Tensor
    mean_quantized: Tensor
    xx: Tensor
    qx: Tensor
    qq: Tensor

    def output_errors(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """Return the summed squared error of each output, float64 (N,), for weights (N, K) and quantized ones (N, K)."""
        reference, changed = weight.to(torch.float64), quantized.to(torch.float64)
        own = ((reference @ self.xx) * reference).sum(1)
        return own + self.errors_without_reference(self.targets(weight), changed)

    def targets(self, weight: Tensor) -> Tensor:
        """Return ``W Cxq``, float64 (N, K): what the quantized rows say about the float outputs."""
        return weight.to(torch.float64) @ self.qx.T

    def errors_without_reference(self, targets: Tensor, quantized: Tensor) -> Tensor:
        """Return the errors of :meth:`output_errors` less what does not depend on the quantized weights."""
        return ((quantized @ self.qq - 2 * targets) * quantized).sum(1)

    def bias_change(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """Return what the bias has to grow by so that every output keeps its mean, float64 (N,)."""
        return weight.to(torch.float64) @ self.mean - quantized.to(torch.float64) @ self.mean_quantized


class MomentSums:
    """Adds up moments; rows arrive in batches, about a fixed origin so that float32 products lose nothing."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._count = 0
        self._origin: Tensor | None = None
        self._sums = [torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2)]
        self._products = [torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3)]

    def add(self, rows: Tensor, quantized: Tensor) -> None:
        """Add float32 rows (R, K) and what the quantized layer reads in their place."""
        if self._origin is None:
            self._origin = rows.mean(0)
        x, q = rows - self._origin, quantized - self._origin
        self._count += len(rows)
        for total, values in zip(self._sums, (x, q), strict=True):
            total += values.sum(0, dtype=torch.float64)
        for product, (a, b) in zip(self._products, ((x, x), (q, x), (q, q)), strict=True):
            product += (a.T @ b).to(torch.float64)

    def __add__(self, other: MomentSums) -> MomentSums:
        """Return the sums over the rows of both; both have seen rows."""
        assert self._origin is not None and other._origin is not None
        total = MomentSums(len(self._origin), self._origin.device)
        # About this origin a row is (row - other's origin) + d.
        d = (other._origin - self._origin).to(torch.float64)
        x, q = other._sums
        total._origin, total._count = self._origin, self._count + other._count
        moved = [s + other._count * d for s in (x, q)]
        total._sums = [a + b for a, b in zip(self._sums, moved, strict=True)]
        pairs = ((x, x), (q, x), (q, q))
        total._products = [
            a + b + torch.outer(left, d) + torch.outer(d, right) + other._count * torch.outer(d, d)
            for a, b, (left, right) in zip(self._products, other._products, pairs, strict=True)
        ]
        return total

    def finish(self) -> Moments:
        """Return the centred moments of what was added; at least one row."""
        assert self._origin is not None
        means = [total / self._count for total in self._sums]
        origin = self._origin.to(torch.float64)
        pairs = ((0, 0), (1, 0), (1, 1))
        xx, qx, qq = (
            product - self._count * torch.outer(means[i], means[j])
            for product, (i, j) in zip(self._products, pairs, strict=True)
        )
        return Moments(self._count, origin + means[0], origin + means[1], xx, qx, qq)
