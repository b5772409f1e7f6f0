"""Laws of ratios as an int32 multiplier and a right shift."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizers.errors import ProgramError
from quantizers.integer.fixed_point import MAX_SHIFT, MIN_SHIFT, choose_shift, to_common_fixed_point, to_fixed_point

LARGEST = 2.0**30 - 1
ratios = st.floats(-LARGEST, LARGEST, allow_nan=False)


@given(st.lists(ratios, min_size=1, max_size=5))
def test_the_error_is_half_a_unit_of_the_shift(values: list[float]) -> None:
    multipliers, shift = to_fixed_point(values)
    assert multipliers.dtype == np.int32
    for value, multiplier in zip(values, multipliers.tolist(), strict=True):
        assert abs(Fraction(multiplier, 2**shift) - Fraction(value)) <= Fraction(1, 2 ** (shift + 1))


@given(st.lists(ratios, min_size=1, max_size=5))
def test_shift_and_multipliers_stay_in_range_and_the_largest_uses_all_bits(values: list[float]) -> None:
    multipliers, shift = to_fixed_point(values)
    largest = max(abs(m) for m in multipliers.tolist())
    assert MIN_SHIFT <= shift <= MAX_SHIFT
    assert largest <= 2**31 - 1
    # Only where the shift is at its end may bits stay unused. Just below a power of two, rounding up would need
    # one bit more; the shift is one less there and the multiplier is 2^30 after rounding.
    assert largest >= 2**30 or shift == MAX_SHIFT


@given(st.floats(2.0**-30, LARGEST))
def test_the_relative_error_of_a_single_ratio_is_at_most_two_to_minus_31(value: float) -> None:
    (multiplier,), shift = to_fixed_point(value)
    assert abs(Fraction(int(multiplier), 2**shift) / Fraction(value) - 1) <= Fraction(1, 2**31)


@pytest.mark.parametrize("exponent", [-31, -30, -1, 0, 1, 29])
def test_around_powers_of_two(exponent: int) -> None:
    power = 2.0**exponent
    for value in (power, math.nextafter(power, 0), math.nextafter(power, math.inf), power * (1 - 2.0**-32)):
        (multiplier,), shift = to_fixed_point(value)
        assert multiplier in (2**30, 2**31 - 1)
        assert abs(multiplier / 2.0**shift - value) <= 2.0 ** -(shift + 1)


def test_zero_and_tiny_ratios_get_the_largest_shift() -> None:
    assert to_fixed_point([0.0, 0.0])[0].tolist() == [0, 0]
    assert to_fixed_point(0.0)[1] == MAX_SHIFT
    assert to_fixed_point(5e-324) == (np.array([0], np.int32), MAX_SHIFT)
    assert to_fixed_point(2.0**-62)[0].tolist() == [1]


def test_no_ratio_at_all_is_allowed() -> None:
    multipliers, shift = to_fixed_point(np.zeros(0))
    assert multipliers.shape == (0,)
    assert shift == MAX_SHIFT


def test_ties_of_the_multiplier_go_to_even() -> None:
    multipliers, shift = to_fixed_point([LARGEST, 0.25, 0.75])
    assert shift == 1
    assert multipliers.tolist() == [2**31 - 2, 0, 2]


@given(st.lists(ratios, min_size=1, max_size=4), st.lists(ratios, min_size=1, max_size=4))
def test_common_shift_is_the_shift_of_all_together(first: list[float], second: list[float]) -> None:
    (a, b), shift = to_common_fixed_point(first, second)
    together, expected = to_fixed_point([*first, *second])
    assert shift == expected
    assert [*a.tolist(), *b.tolist()] == together.tolist()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_ratios_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ProgramError, match="expected a finite number; look for a zero scale"):
        to_fixed_point([1.0, value])


@pytest.mark.parametrize("value", [2.0**30, 1e300, -(2.0**31), 2.0**30 - 2.0**-23])
def test_ratios_beyond_31_bits_are_refused(value: float) -> None:
    with pytest.raises(ProgramError, match="too large for a 31-bit multiplier"):
        to_fixed_point(value)


@given(st.floats(0, 2.0**13 - 1), st.integers(16, 31))
def test_choose_shift_honours_fewer_bits(value: float, bits: int) -> None:
    shift = choose_shift(value, bits)
    assert MIN_SHIFT <= shift <= MAX_SHIFT
    assert round(value * 2.0**shift) <= 2**bits - 1
