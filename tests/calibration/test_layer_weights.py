"""Weights of a layer: room for the bias, and moments that rounding errors do not spoil."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.layer_weights import (
    LayerFit,
    LayerMoments,
    LayerWeights,
    choose_in_range,
    fit_to_bias,
    round_bias,
)
from calibration.moments import Moments, MomentSums
from quantizers.spec import QuantSpec

UNTIMED = settings(deadline=None)
CPU = torch.device("cpu")


def layer(bits: int, magnitudes: list[float], biases: list[float]) -> tuple[LayerWeights, QuantSpec]:
    """Quantized weights (N, 6) of the given magnitudes; 0 makes a dead row."""
    spec = QuantSpec(bits, granularity="channel")
    rows = torch.randn((len(magnitudes), 6), generator=torch.Generator().manual_seed(0))
    made = choose_in_range(rows * torch.tensor(magnitudes)[:, None], torch.tensor(biases), spec)
    return made, spec


ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 50.0]),
        st.sampled_from([0.0, 1e-6, -0.3, 7.0, -1e3, 1e6]),
    ),
    min_size=1,
    max_size=5,
)


@UNTIMED
@given(ROWS, st.integers(2, 8), st.sampled_from([2.0**-20, 1e-3, 0.7, 40.0]))
def test_every_bias_has_room(rows: list[tuple[float, float]], bits: int, input_scale: float) -> None:
    """It fits int32 with room for the products, and is rounded by half a step at most."""
    made, spec = layer(bits, *map(list, zip(*rows, strict=True)))
    fitted = fit_to_bias(made, input_scale, spec)
    step = fitted.scale.to(torch.float64) * input_scale
    assert bool((made.bias.to(torch.float64).abs() / step <= 2**30 * (1 + 2**-20)).all())
    rounded = round_bias(fitted, input_scale).to(torch.float64)
    # Half a step, and float32 of the result.
    assert bool(((rounded - made.bias).abs() <= step * 0.5000001 + made.bias.abs() * 2.0**-23).all())


@UNTIMED
@given(ROWS, st.integers(2, 8), st.sampled_from([2.0**-20, 1e-3, 0.7, 40.0]))
def test_codes_change_where_the_step_had_to_grow_only(
    rows: list[tuple[float, float]], bits: int, input_scale: float
) -> None:
    """Dead rows stay zero; rows with room keep scale and codes; a grown step has the nearest codes."""
    made, spec = layer(bits, *map(list, zip(*rows, strict=True)))
    fitted = fit_to_bias(made, input_scale, spec)
    dead = (made.codes == 0).all(1)
    assert bool((fitted.codes[dead] == 0).all())
    kept = (made.bias.abs().to(torch.float64) / input_scale / 2**30 <= made.scale) & ~dead
    assert torch.equal(fitted.scale[kept], made.scale[kept])
    assert torch.equal(fitted.codes[kept], made.codes[kept])
    assert bool((fitted.scale[~dead] >= made.scale[~dead]).all())
    error = (fitted.values() - made.values()).abs()
    assert bool((error <= fitted.scale[:, None] * 0.500001).all())


def test_a_dead_row_takes_a_step_of_its_layer() -> None:
    """Its own, 1, would round a bias of 0.003 away."""
    made, spec = layer(8, [0.0, 1.0, 2.0], [0.003, 0.0, 0.0])
    fitted = fit_to_bias(made, 0.01, spec)
    assert float(fitted.scale[0]) == float(fitted.scale[1:].max())
    assert float(round_bias(fitted, 0.01)[0]) == pytest.approx(0.003, abs=float(fitted.scale[0]) * 0.005)


def moments(rows: Tensor, quantized: Tensor, batches: int = 3) -> Moments:
    sums = MomentSums(rows.shape[1], CPU)
    for x, q in zip(rows.chunk(batches), quantized.chunk(batches), strict=True):
        sums.add(x, q)
    return sums.finish()


def test_moments_are_those_of_all_rows() -> None:
    """Whatever the batches and the mean, also where two sums are added."""
    x = torch.randn((90, 5), generator=torch.Generator().manual_seed(0)) + 100
    q = (x * 8).round() / 8 + 3
    halves = MomentSums(5, CPU), MomentSums(5, CPU)
    halves[0].add(x[:31], q[:31])
    halves[1].add(x[31:], q[31:])
    exact = [values.to(torch.float64) - values.to(torch.float64).mean(0) for values in (x, q)]
    for found in (moments(x, q), (halves[0] + halves[1]).finish()):
        assert found.count == 90
        for name, i, j in (("xx", 0, 0), ("qx", 1, 0), ("qq", 1, 1)):
            torch.testing.assert_close(getattr(found, name), exact[i].T @ exact[j], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found.mean, x.to(torch.float64).mean(0), rtol=1e-7, atol=0)
        torch.testing.assert_close(found.mean_quantized, q.to(torch.float64).mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("count", [1, 2, 64, 1000])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_inputs_that_never_differ_have_no_moments(size: float, count: int) -> None:
    """What float32 leaves of a constant is not mistaken for data, beside inputs that vary too."""
    generator = torch.Generator().manual_seed(1)
    x = (size * torch.randn((1, 8), generator=generator)).repeat(count, 1)
    q = (x / size * 7).round() / 7 * size
    found = moments(x, q, min(count, 3))
    assert not any(bool(moment.any()) for moment in (found.xx, found.qx, found.qq))
    x[:, 3], q[:, 3] = torch.arange(count), torch.arange(count) + 0.1
    found = moments(x, q, min(count, 3))
    assert int((found.qq != 0).sum()) == (count > 1)


@pytest.mark.parametrize("search", ["minmax", "output", "feedback"])
def test_a_layer_that_reads_a_constant_gets_weights(search: str) -> None:
    """Every rounding gives the same outputs; their mean is kept."""
    x = torch.randn((1, 8), generator=torch.Generator().manual_seed(1)).repeat(40, 1)
    q = (x * 3).round() / 3
    spec, weight = QuantSpec(4, granularity="channel", search=search), torch.randn(5, 8)
    made = LayerFit(weight, torch.ones(5), LayerMoments(moments(x, q), None), correct=True).choose(spec)
    assert float((made.values() - weight).abs().max()) <= float(made.scale.max())
    torch.testing.assert_close(q @ made.values().T + made.bias, x @ weight.T + 1, rtol=1e-4, atol=1e-4)
