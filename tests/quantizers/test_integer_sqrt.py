"""The integer square root is the exact floor."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.integer.interpret import integer_sqrt


def test_every_small_value() -> None:
    values = torch.arange(1 << 17)
    assert integer_sqrt(values).tolist() == [math.isqrt(v) for v in range(1 << 17)]


@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=50))
def test_values_below_two_to_62(values: list[int]) -> None:
    assert integer_sqrt(torch.tensor(values)).tolist() == [math.isqrt(v) for v in values]


@given(st.integers(1, 2**31 - 1))
def test_around_perfect_squares(root: int) -> None:
    """A float square root is wrong here: 2^62 needs nine bits more than float64 has."""
    around = torch.tensor([root * root - 1, root * root, root * root + 1 if root < 2**31 - 1 else root * root])
    assert integer_sqrt(around).tolist() == [root - 1, root, root]


def test_the_ends_of_the_domain() -> None:
    assert integer_sqrt(torch.tensor([0, 1, 3, 4, 2**62 - 1])).tolist() == [0, 1, 1, 2, 2**31 - 1]
