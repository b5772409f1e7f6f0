"""Laws of second moments: sums over rows without the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.moments import Moments, MomentSums

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None, max_examples=30)
WIDTH, OUTPUTS = 7, 4


def rows(seed: int, count: int, offset: float) -> tuple[Tensor, Tensor]:
    """Return correlated rows about a mean that is ``offset`` deviations away, and what rounding makes of them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    means = offset * torch.randn(WIDTH, generator=generator)
    x = torch.randn(count, WIDTH, generator=generator) @ mixing + means
    return x, (x / 0.3).round() * 0.3 + 0.1


def weights(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, WIDTH, generator=generator)
    return weight, (weight / 0.4).round() * 0.4


def sums(x: Tensor, quantized: Tensor, size: int = 16) -> MomentSums:
    total = MomentSums(WIDTH, torch.device("cpu"))
    for a, b in zip(x.split(size), quantized.split(size), strict=True):
        total.add(a, b)
    return total


def direct(x: Tensor, quantized: Tensor) -> Moments:
    """Return the definition, in float64."""
    x, quantized = x.double(), quantized.double()
    a, b = x - x.mean(0), quantized - quantized.mean(0)
    return Moments(len(x), x.mean(0), quantized.mean(0), a.T @ a, b.T @ a, b.T @ b)


def assert_same(found: Moments, expected: Moments) -> None:
    """Entries agree to float32 products: 1e-5 of the two inputs' energies; means cancel out before they are squared."""
    assert found.count == expected.count
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.mean_quantized, expected.mean_quantized, rtol=1e-6, atol=1e-6)
    x, q = expected.xx.diagonal().sqrt(), expected.qq.diagonal().sqrt()
    for name, scale in (("xx", torch.outer(x, x)), ("qx", torch.outer(q, x)), ("qq", torch.outer(q, q))):
        difference = (getattr(found, name) - getattr(expected, name)).abs()
        assert bool((difference <= 1e-5 * scale + 1e-12).all()), name


@UNTIMED
@given(st.integers(0, 10**6), st.integers(1, 80), st.sampled_from([0.0, 1.0, 100.0, 1e4]), st.integers(1, 40))
def test_sums_are_the_definition(seed: int, count: int, offset: float, size: int) -> None:
    """Whatever the batches, and also where means are ten thousand deviations."""
    x, quantized = rows(seed, max(count, 2), offset)
    if len(x) <= size or offset < 1e4:
        assert_same(sums(x, quantized, size).finish(), direct(x, quantized))


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([0.0, 100.0]), st.integers(1, 79))
def test_the_sum_of_parts_is_the_whole(seed: int, offset: float, cut: int) -> None:
    x, quantized = rows(seed, 80, offset)
    parts = sums(x[:cut], quantized[:cut]) + sums(x[cut:], quantized[cut:])
    assert_same(parts.finish(), direct(x, quantized))
    halves = sums(x[::2], quantized[::2]) + sums(x[1::2], quantized[1::2])
    assert_same(halves.finish(), direct(x, quantized))


def test_a_sum_leaves_its_parts_alone() -> None:
    x, quantized = rows(0, 40, 3.0)
    left, right = sums(x[:20], quantized[:20]), sums(x[20:], quantized[20:])
    assert left + right is not left
    assert_same(left.finish(), direct(x[:20], quantized[:20]))
    assert_same(right.finish(), direct(x[20:], quantized[20:]))


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 100.0]))
def test_output_errors_are_those_of_the_rows(seed: int, offset: float) -> None:
    """With the best bias for each output; to float32 products of energies that are larger than the errors."""
    x, quantized = rows(seed, 60, offset)
    weight, changed = weights(seed)
    found = sums(x, quantized).finish().output_errors(weight, changed)
    outputs = x.double() @ weight.double().T
    errors = outputs - quantized.double() @ changed.double().T
    expected = (errors - errors.mean(0)).square().sum(0)
    energy = (outputs - outputs.mean(0)).square().sum(0)
    assert bool(((found - expected).abs() <= 1e-4 * (energy + expected)).all())


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 100.0]))
def test_errors_without_reference_rank_alike(seed: int, offset: float) -> None:
    """They are smaller than the errors by one number for each output, whatever the weights are."""
    x, quantized = rows(seed, 60, offset)
    weight, changed = weights(seed)
    moments = sums(x, quantized).finish()
    missing = [
        moments.output_errors(weight, other) - moments.errors_without_reference(moments.targets(weight), other.double())
        for other in (weight, changed, torch.zeros_like(weight))
    ]
    for difference in missing[1:]:
        torch.testing.assert_close(difference, missing[0], rtol=1e-9, atol=1e-9)


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 100.0]))
def test_the_bias_change_keeps_every_mean(seed: int, offset: float) -> None:
    """To the rounding of float32 rows."""
    x, quantized = rows(seed, 60, offset)
    weight, changed = weights(seed)
    change = sums(x, quantized).finish().bias_change(weight, changed)
    before, after = x.double() @ weight.double().T, quantized.double() @ changed.double().T + change
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-5, atol=1e-5 * (1 + offset))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3e4, 1e-20])
@pytest.mark.parametrize("error", [0.0, 0.03])
def test_inputs_that_never_change_have_no_moments(value: float, error: float) -> None:
    """Exactly none, also where their quantized value is another: rounding errors would pass for a direction."""
    x = torch.full((37, WIDTH), value)
    moments = sums(x, x + error).finish()
    for product in (moments.xx, moments.qx, moments.qq):
        assert not product.any()
    assert torch.equal(moments.mean_quantized, (x[0] + error).double())
