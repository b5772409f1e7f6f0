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
    """Adds up moments; rows arrive in batches, about fixed origins so that float32 products lose nothing.

    Float rows and quantized rows have an origin each: about a common one, inputs that never change would leave products
    of two offsets, of which centring takes all but the rounding, and that is no second moment of anything.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._count = 0
        self._origins: tuple[Tensor, Tensor] | None = None
        self._sums = [torch.zeros(width, dtype=torch.float64, device=device) for _ in range(2)]
        self._products = [torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3)]

    def add(self, rows: Tensor, quantized: Tensor) -> None:
        """Add float32 rows (R, K) and what the quantized layer reads in their place."""
        if self._origins is None:
            # In float64 the mean of equal values is that value.
            first, second = (values.mean(0, dtype=torch.float64).to(torch.float32) for values in (rows, quantized))
            self._origins = first, second
        x, q = rows - self._origins[0], quantized - self._origins[1]
        self._count += len(rows)
        for total, values in zip(self._sums, (x, q), strict=True):
            total += values.sum(0, dtype=torch.float64)
        for product, (a, b) in zip(self._products, ((x, x), (q, x), (q, q)), strict=True):
            product += (a.T @ b).to(torch.float64)

    def __add__(self, other: MomentSums) -> MomentSums:
        """Return the sums over the rows of both; both have seen rows."""
        assert self._origins is not None and other._origins is not None
        total = MomentSums(len(self._sums[0]), self._sums[0].device)
        # About these origins a row is (row - other's origin) + d.
        d, e = ((b - a).to(torch.float64) for a, b in zip(self._origins, other._origins, strict=True))
        x, q = other._sums
        total._origins, total._count = self._origins, self._count + other._count
        moved = [x + other._count * d, q + other._count * e]
        total._sums = [a + b for a, b in zip(self._sums, moved, strict=True)]
        pairs = ((x, x, d, d), (q, x, e, d), (q, q, e, e))
        total._products = [
            a + b + torch.outer(left, v) + torch.outer(u, right) + other._count * torch.outer(u, v)
            for a, b, (left, right, u, v) in zip(self._products, other._products, pairs, strict=True)
        ]
        return total

    def finish(self) -> Moments:
        """Return the centred moments of what was added; at least one row."""
        assert self._origins is not None
        means = [total / self._count for total in self._sums]
        pairs = ((0, 0), (1, 0), (1, 1))
        xx, qx, qq = (
            product - self._count * torch.outer(means[i], means[j])
            for product, (i, j) in zip(self._products, pairs, strict=True)
        )
        mean, mean_quantized = (o.to(torch.float64) + m for o, m in zip(self._origins, means, strict=True))
        return Moments(self._count, mean, mean_quantized, xx, qx, qq)
