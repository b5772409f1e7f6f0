"""QuantSpec: how a tensor is quantized, without a word about where."""

from __future__ import annotations

from dataclasses import dataclass

from quantizers.errors import UsageError

#: Searches that look at the values alone.
RANGE_SEARCHES = ("minmax", "percentile", "mse", "percentile_mse")
SEARCHES = (*RANGE_SEARCHES, "percentile_output", "output", "feedback")
FORMATS = ("uniform", "log2", "log_sqrt2", "adalog", "tangent", "sulq", "any")
GRANULARITIES = ("tensor", "channel", "head")
#: Widths of codes that matrix products and tables read; 16 is the residual stream's.
MIN_BITS, MAX_BITS, WIDE_BITS = 2, 8, 16


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How to quantize one tensor.

    Args:
        bits: 2 to 8, or 16; a tensor gets exactly ``2^bits`` codes (weights one less, to be symmetric).
        symmetric: zero point 0.
        granularity: ``tensor``: scale of shape (); ``channel``: weights of shape (N, ...) get scales (N,);
            ``head``: queries, keys and values of shape (..., heads, M, K) get scales (heads,) and one zero point.
        search: how scale and zero point are found. ``minmax``: the extremes; ``percentile``: the range of that share of
            the values; ``mse``: the range with the least squared error; ``percentile_mse``: that of three percentiles
            (RepQ-ViT); ``percentile_output``, activations only: of these three and the full range the one with the
            least squared error at the result of the operation that reads the tensor; ``output``: the least squared
            error there; ``feedback``, weights only: as ``output``, with rounding that carries errors on (GPTQ).
        percentile: share of values inside the range, percent; read by ``percentile`` only.
        format: family of levels, a member of :data:`FORMATS`; ``any``: the one with the least error.

    Raises:
        UsageError: a value outside its range.
    """

    bits: int
    symmetric: bool = True
    granularity: str = "tensor"
    search: str = "minmax"
    percentile: float = 99.99
    format: str = "uniform"

    def __post_init__(self) -> None:
        if not (MIN_BITS <= self.bits <= MAX_BITS or self.bits == WIDE_BITS):
            raise UsageError(f"bits is {self.bits}, expected {MIN_BITS} to {MAX_BITS}, or {WIDE_BITS} for residuals")
        if self.search not in SEARCHES:
            raise UsageError(f"search is {self.search!r}, expected one of {', '.join(SEARCHES)}")
        if self.granularity not in GRANULARITIES:
            raise UsageError(f"granularity is {self.granularity!r}, expected one of {', '.join(GRANULARITIES)}")
        if self.format not in FORMATS:
            raise UsageError(f"format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile is {self.percentile}, expected more than 50 and at most 100")
