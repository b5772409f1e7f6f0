"""Attention probabilities as I-ViT publishes them (arXiv 2207.01405, section 3.3): codes of a fixed power of two."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantizers.errors import UsageError

#: Widths of the official code: 16 for ViT and DeiT, 8 for Swin and in the TVM graph.
SHIFTMAX_BITS = (8, 16)


@dataclass(frozen=True, slots=True)
class ShiftmaxQParams:
    """Probabilities in steps of ``2^-(bits-1)``, cut off and never rounded.

    Args:
        bits: 8 or 16.

    Raises:
        UsageError: another width.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in SHIFTMAX_BITS:
            raise UsageError(f"published probabilities have 8 or 16 bits, got {self.bits}")

    @property
    def scale(self) -> float:
        """Real value of one step."""
        return 2.0 ** (1 - self.bits)


def cut_off(probabilities: Tensor, qparams: ShiftmaxQParams) -> Tensor:
    """Return float probabilities as multiples of the step, rounded down: the 8-bit form is the 16-bit form cut off."""
    return (probabilities / qparams.scale).floor() * qparams.scale
