"""What every backend asks of the images it is given, without the library that holds them."""

from __future__ import annotations

from collections.abc import Sequence

from quantizers.errors import DataError
from quantizers.integer.program import TensorType


def check_inputs(expected: Sequence[tuple[str, TensorType]], given: Sequence[tuple[tuple[int, ...], str]]) -> None:
    """Compare shapes (with batch axis) and dtypes of the given inputs with a program's.

    Raises:
        DataError: count, dtype or shape differs, or the batches are empty or unequal.
    """
    if len(given) != len(expected):
        raise DataError(f"the program takes {len(expected)} inputs, got {len(given)}")
    for (name, kind), (shape, dtype) in zip(expected, given, strict=True):
        if dtype != kind.dtype or shape[1:] != kind.shape or not shape or shape[0] < 1:
            raise DataError(
                f"input {name}: expected {kind.dtype} of shape (batch >= 1, {', '.join(map(str, kind.shape))}), "
                f"got {dtype} of shape {shape}"
            )
    if len({shape[0] for shape, _ in given}) > 1:
        raise DataError(f"inputs must have one batch size, got {[shape[0] for shape, _ in given]}")


def check_finite(name: str, *, finite: bool) -> None:
    """Refuse an input that holds NaN or infinity.

    Raises:
        DataError: ``finite`` is false.
    """
    if not finite:
        raise DataError(f"input {name} holds NaN or infinity; integer codes need finite images")
