"""The one rounding of reals: to nearest, ties to even, in every float type that torch computes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantizers.rounding import round_half_even


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_ties_go_to_the_even_neighbour(dtype: torch.dtype) -> None:
    ties = torch.arange(-1000, 1000, dtype=dtype) + 0.5
    rounded = round_half_even(ties)
    assert bool((rounded % 2 == 0).all())
    assert bool(((rounded - ties).abs() == 0.5).all())


@given(st.floats(-1e9, 1e9, width=32))
def test_it_equals_pythons_round(value: float) -> None:
    assert round_half_even(torch.tensor(value, dtype=torch.float32)).item() == round(value)


def test_just_below_and_above_a_tie() -> None:
    near = torch.nextafter(torch.tensor([0.5, 1.5, 2.5]), torch.tensor([0.0, 9.0, 9.0]))
    assert round_half_even(near).tolist() == [0, 2, 3]
