"""The search of the codebook of attention probabilities, by the error of their product with the values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantizers.codebook import Codebook
from quantizers.families import candidates
from quantizers.row_relative import RowRelativeQParams, fake_quantize_rows

#: Distance of the parameters that are tried first; those between follow around the best.
_STRIDE = 4


def search_probabilities(
    probabilities: Tensor, values: Tensor, bits: int, families: Sequence[str]
) -> RowRelativeQParams:
    """Return the codebook with the least squared error of ``P V``; of equal ones, the first of the families.

    Args:
        probabilities: float32 ``(images, ..., heads, M, keys)``.
        values: float32 ``(images, ..., heads, keys, d)``.
        bits: width.
        families: names from :mod:`quantizers.families`.
    """
    expected = probabilities @ values
    best: tuple[float, Codebook] | None = None

    def look(codebook: Codebook) -> float:
        nonlocal best
        rows = fake_quantize_rows(probabilities, RowRelativeQParams(codebook))
        error = float((rows @ values - expected).square().mean())
        if best is None or error < best[0]:
            best = (error, codebook)
        return error

    for family in families:
        codebooks = candidates(family, bits)
        coarse = range(0, len(codebooks), _STRIDE)
        errors = {i: look(codebooks[i]) for i in coarse}
        middle = min(errors, key=lambda i: (errors[i], i))
        for i in range(max(0, middle - _STRIDE + 1), min(len(codebooks), middle + _STRIDE)):
            if i not in errors:
                look(codebooks[i])
    assert best is not None
    return RowRelativeQParams(best[1])
