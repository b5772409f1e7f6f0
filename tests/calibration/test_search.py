"""Promises of the range searches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from calibration.search.ranges import histogram_error, search_activation, search_weight
from calibration.statistics import Histogram, empty, update
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, fake_quantize, qparams_from_range

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None, max_examples=50)
BITS = st.integers(2, 8)
SAMPLES = arrays.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e4, 1e4, width=32))
MATRICES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=st.floats(-1e4, 1e4, width=32)
)


def statistics(values: object) -> Histogram:
    return update(empty(), torch.as_tensor(values, dtype=torch.float32))


def heavy_tailed(count: int = 20000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator) * torch.rand(count, generator=generator).add(0.02).reciprocal()


@UNTIMED
@given(SAMPLES, st.sampled_from([2, 4, 8, 16]), st.booleans())
def test_minmax_takes_the_extremes(values: np.ndarray, bits: int, symmetric: bool) -> None:
    """``minmax`` is the format of the exact lowest and highest value."""
    spec = QuantSpec(bits, symmetric=symmetric)
    assert search_activation(statistics(values), spec) == qparams_from_range(values.min(), values.max(), spec)


@UNTIMED
@given(SAMPLES, BITS, st.booleans())
def test_mse_of_activations_is_never_worse_than_minmax(values: np.ndarray, bits: int, symmetric: bool) -> None:
    """On the histogram it is measured on, the error of ``mse`` is at most that of ``minmax``."""
    stats = statistics(values)
    found = search_activation(stats, QuantSpec(bits, symmetric=symmetric, search="mse"))
    full = search_activation(stats, QuantSpec(bits, symmetric=symmetric))
    assert histogram_error(stats, found) <= histogram_error(stats, full)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_mse_clips_heavy_tails(bits: int, symmetric: bool) -> None:
    """Few bits and outliers: on the values themselves, the error falls by more than a tenth."""
    values = heavy_tailed()
    stats = statistics(values)

    def error(search: str) -> float:
        qparams = search_activation(stats, QuantSpec(bits, symmetric=symmetric, search=search))
        return float((fake_quantize(values, qparams) - values).square().mean())

    assert error("mse") < 0.9 * error("minmax")


def test_histogram_error_is_the_error_of_the_values() -> None:
    """Measured on the bins' centres, the error is that of the values to a few percent."""
    values = heavy_tailed()
    stats = statistics(values)
    for bits in (4, 6, 8):
        qparams = search_activation(stats, QuantSpec(bits))
        exact = float((fake_quantize(values, qparams) - values).double().square().mean())
        assert histogram_error(stats, qparams) == pytest.approx(exact, rel=0.05)


@UNTIMED
@given(SAMPLES, st.floats(51, 100), st.booleans())
def test_percentile_keeps_its_share(values: np.ndarray, percentile: float, symmetric: bool) -> None:
    """At least the stated share of the values lies inside the representable range, to half a step."""
    spec = QuantSpec(8, symmetric=symmetric, search="percentile", percentile=percentile)
    qparams = search_activation(statistics(values), spec)
    assert share_inside(values, qparams) >= percentile / 100 - 1e-9


def share_inside(values: np.ndarray, qparams: UniformQParams) -> float:
    steps = values.astype(np.float64) / qparams.scale[0] + qparams.zero_point
    return float(((steps >= qparams.qmin - 0.500001) & (steps <= qparams.qmax + 0.500001)).mean())


@UNTIMED
@given(SAMPLES, st.booleans())
def test_percentile_100_is_minmax(values: np.ndarray, symmetric: bool) -> None:
    """All values inside the range: the extremes."""
    spec = QuantSpec(8, symmetric=symmetric, search="percentile", percentile=100)
    assert search_activation(statistics(values), spec) == qparams_from_range(values.min(), values.max(), spec)


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_cuts_what_lies_beyond(symmetric: bool) -> None:
    """99 % of a normal sample: the range ends at 2.576 standard deviations, to a bin and sampling error."""
    values = torch.randn(200000, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(8, symmetric=symmetric, search="percentile", percentile=99.0)
    qparams = search_activation(statistics(values), spec)
    assert qparams.qmax * qparams.scale[0] - qparams.zero_point * qparams.scale[0] == pytest.approx(2.576, rel=0.02)


@UNTIMED
@given(MATRICES, BITS)
def test_mse_of_weights_is_never_worse_than_minmax(weight: np.ndarray, bits: int) -> None:
    """In every output channel the squared error of ``mse`` is at most that of ``minmax``."""
    tensor = torch.from_numpy(weight)

    def errors(search: str) -> torch.Tensor:
        qparams = search_weight(tensor, QuantSpec(bits, granularity="channel", search=search))
        return (fake_quantize(tensor, qparams) - tensor).square().sum(1)

    assert bool((errors("mse") <= errors("minmax")).all())


@pytest.mark.parametrize("search", ["minmax", "percentile", "mse"])
def test_dead_channels(search: str) -> None:
    """A row of zeros and a row of one constant work beside others; the constant comes back exactly."""
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [-1.0, 0.5, 0.2], [1e-30, 0.0, 0.0]])
    spec = QuantSpec(8, granularity="channel", search=search)
    found = fake_quantize(weight, search_weight(weight, spec))
    assert found[0].tolist() == [0.0] * 3
    torch.testing.assert_close(found[1], weight[1], rtol=1e-6, atol=0)
    assert search_weight(weight, spec).scale[0] == search_weight(weight, spec).scale[3] == 1.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-40, 3e38])
def test_constant_activations(search: str, symmetric: bool, value: float) -> None:
    """One value only: it comes back within half a step, zero and denormals as zero."""
    qparams = search_activation(statistics([value] * 7), QuantSpec(8, symmetric=symmetric, search=search))
    found = fake_quantize(torch.tensor([value]), qparams)
    if abs(value) < 2.0**-60:
        assert found.item() == 0
    else:
        assert abs(found.item() - value) <= 0.5001 * qparams.scale[0]
        assert qparams.scale[0] <= abs(value) / 127 * 1.0001


def test_convolution_weights_are_searched_by_output_channel() -> None:
    """A weight (N, C, kh, kw) gets the scales of its rows (N, C kh kw)."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(4, granularity="channel", search="mse")
    assert search_weight(weight, spec) == search_weight(weight.reshape(4, -1), spec)
    assert len(search_weight(weight, spec).scale) == 4
