"""Laws of the streaming histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.statistics import Histogram, empty, update

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: Values of one magnitude, of all magnitudes, and zeros, in one sample.
VALUES = st.lists(st.one_of(FLOAT32, st.floats(-8, 8, width=32), st.just(0.0)), min_size=1, max_size=60)


def of(*batches: list[float]) -> Histogram:
    stats = empty()
    for batch in batches:
        stats = update(stats, torch.tensor(batch, dtype=torch.float32))
    return stats


def assert_equal(found: Histogram, expected: Histogram) -> None:
    assert (found.count, found.low, found.high, found.exponent) == (
        expected.count,
        expected.low,
        expected.high,
        expected.exponent,
    )
    assert torch.equal(found.counts, expected.counts)


@UNTIMED
@given(st.permutations([-3e38, -1e30, -2.0, -1e-3, -1e-30, -1e-40, 0.0, 1e-45, 1e-20, 0.1, 5.0, 1e20, 3e38]))
def test_order_does_not_matter(values: list[float]) -> None:
    """Values of every magnitude, one at a time in any order, give the same bins."""
    assert_equal(of(*([value] for value in values)), of(sorted(values)))


@UNTIMED
@given(VALUES, st.data())
def test_batching_does_not_matter(values: list[float], data: st.DataObject) -> None:
    """Cut anywhere and shuffled, the values give the histogram of one shot."""
    cuts = sorted(data.draw(st.lists(st.integers(1, len(values)), max_size=5)))
    shuffled = data.draw(st.permutations(values))
    batches = [list(part) for part in np.split(np.array(shuffled), cuts) if len(part)]
    assert_equal(of(*batches), of(values))


@UNTIMED
@given(VALUES)
def test_bins_are_those_of_the_final_width(values: list[float]) -> None:
    """Each value is counted in the bin ``floor(value / width)``, as exact arithmetic gives it."""
    stats = of(*([value] for value in values))
    width = 2.0 ** (stats.exponent or 0)
    expected = np.zeros(4096, np.int64)
    for value in values:
        # Python's floor of the double quotient: division by a power of two is exact in double.
        expected[int(np.floor(value / width)) + 2048] += 1
    assert stats.counts.tolist() == expected.tolist()


@UNTIMED
@given(VALUES)
def test_extremes_and_count_are_exact(values: list[float]) -> None:
    """The lowest and highest value are kept as they are, and nothing is lost."""
    stats = of(values)
    assert (stats.low, stats.high, stats.count) == (min(values), max(values), len(values))
    assert int(stats.counts.sum()) == len(values)


@UNTIMED
@given(VALUES)
def test_width_is_as_fine_as_the_largest_value_allows(values: list[float]) -> None:
    """More than half of the bins of one side are in use, unless the values are near the smallest float32."""
    stats = of(values)
    peak = max(abs(value) for value in values)
    if peak == 0:
        assert stats.exponent is None
        return
    assert stats.exponent is not None
    steps = peak / 2.0**stats.exponent
    assert steps < 2048
    assert steps >= 1024 or stats.exponent == -126


def test_an_update_leaves_the_old_statistics_alone() -> None:
    """Statistics are values: what was returned before does not change."""
    first = of([1.0, 2.0])
    kept = first.counts.clone()
    update(first, torch.tensor([100.0, 0.0]))
    assert first.count == 2
    assert torch.equal(first.counts, kept)


def test_memory_is_constant() -> None:
    """Many values of any magnitude take the 4,096 bins that one value takes."""
    generator = torch.Generator().manual_seed(0)
    stats = empty()
    for exponent in range(-60, 61, 5):
        stats = update(stats, torch.randn(1000, generator=generator) * 2.0**exponent)
    assert stats.counts.shape == of([1.0]).counts.shape == (4096,)
    assert stats.counts.dtype == torch.int64


def test_all_zero() -> None:
    """Zeros have no width; the first other value gives one, and the zeros stay in the bin that starts at 0."""
    stats = of([0.0, 0.0])
    assert (stats.count, stats.low, stats.high, stats.exponent) == (2, 0.0, 0.0, None)
    stats = update(stats, torch.tensor([-1.0]))
    assert stats.counts[2048] == 2
    assert stats.counts[1024] == 1


@pytest.mark.parametrize("value", [1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 2.0**-126, -(2.0**127)])
def test_smallest_and_largest_values(value: float) -> None:
    """The ends of float32 have a bin, and a bin's centre is within one width of what it holds."""
    stats = of([value])
    assert stats.exponent is not None
    (index,) = stats.counts.nonzero().flatten().tolist()
    assert abs(stats.centers()[index] - stats.low) <= 2.0**stats.exponent


def test_shape_does_not_matter() -> None:
    """A tensor of any shape, contiguous or not, is a bag of values."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert_equal(update(empty(), x.permute(2, 0, 1)), update(empty(), x.flatten()))
