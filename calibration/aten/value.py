"""What a converter handles: batched values, and constants as tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from calibration.layout import Layout
from quantizers.errors import ModelError


class Value:
    """A batched value while converting: the graph's name for it, its sample shape, its traced layout."""

    __slots__ = ("layout", "name", "shape")

    def __init__(self, name: str, shape: tuple[int, ...], layout: Layout) -> None:
        self.name, self.shape, self.layout = name, shape, layout


def batched(x: Any) -> Value:
    """Return an operand that must depend on the input.

    Raises:
        ModelError: it is a constant.
    """
    if not isinstance(x, Value):
        raise ModelError("expected a value that depends on the model's input")
    return x


def weights(x: Any) -> Tensor:
    """Return an operand that must be constant.

    Raises:
        ModelError: it depends on the input.
    """
    if not isinstance(x, Tensor):
        raise ModelError("expected constant weights; weights computed from the input have no integer form")
    return x
