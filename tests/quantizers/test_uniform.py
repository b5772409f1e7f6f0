"""Laws of the uniform affine format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantizers.errors import UsageError
from quantizers.rounding import round_half_even
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, bounds, dequantize, fake_quantize, qparams_from_range, quantize

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None)
WIDTHS = [*range(2, 9), 16]
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: Values whose steps are far from both ends of float32.
MODERATE = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@st.composite
def activation_specs(draw: st.DrawFn) -> QuantSpec:
    return QuantSpec(draw(st.sampled_from(WIDTHS)), symmetric=draw(st.booleans()))


@st.composite
def formats(draw: st.DrawFn, ends: st.SearchStrategy[float] = FLOAT32) -> UniformQParams:
    low, high = sorted((draw(ends), draw(ends)))
    return qparams_from_range(low, high, draw(activation_specs()))


def slack(qparams: UniformQParams) -> float:
    """Steps that float32 division and product may lose: a few units in the last place of the largest code."""
    return (qparams.qmax - qparams.qmin) * 2.0**-21


def ends(qparams: UniformQParams) -> tuple[float, float]:
    """Real values of the lowest and the highest code."""
    scale = qparams.scale[0]
    return (qparams.qmin - qparams.zero_point) * scale, (qparams.qmax - qparams.zero_point) * scale


@UNTIMED
@given(formats(), st.lists(FLOAT32, min_size=1, max_size=20))
def test_codes_are_integers_in_range(qparams: UniformQParams, values: list[float]) -> None:
    """Every finite float32 gets an integer code between qmin and qmax, whatever the range was."""
    codes = quantize(torch.tensor(values), qparams)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= qparams.qmin
    assert codes.max() <= qparams.qmax


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_heads_have_their_own_scales(lead: tuple[int, ...], symmetric: bool) -> None:
    """Whatever stands before the axis of the heads, each has the codes that it has alone with its scale."""
    spec = QuantSpec(4, symmetric=symmetric, granularity="head")
    qparams = qparams_from_range([-1.0, -20.0, 0.0], [2.0, 10.0, 0.5], spec)
    assert (len(qparams.scale), qparams.axis, qparams.scales().shape) == (3, -3, (3, 1, 1))
    assert len(set(qparams.scale)) == 3
    x = 15 * torch.randn((*lead, 3, 4, 6), generator=torch.Generator().manual_seed(0))
    for head, scale in enumerate(qparams.scale):
        alone = UniformQParams((scale,), qparams.zero_point, qparams.qmin, qparams.qmax)
        index = (..., head, slice(None), slice(None))
        assert torch.equal(quantize(x, qparams)[index], quantize(x[index], alone))
        assert torch.equal(fake_quantize(x, qparams)[index], fake_quantize(x[index], alone))


@UNTIMED
@given(formats(MODERATE), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_error_inside_the_range_is_half_a_step(qparams: UniformQParams, shares: list[float]) -> None:
    """Between the lowest and the highest representable value, the error is at most half a step."""
    low, high = ends(qparams)
    x = torch.tensor([low + share * (high - low) for share in shares], dtype=torch.float32)
    error = (fake_quantize(x, qparams) - x).abs().double() / qparams.scale[0]
    assert float(error.max()) <= 0.5 + slack(qparams)


@UNTIMED
@given(formats(MODERATE), st.lists(MODERATE, min_size=1, max_size=20))
def test_values_outside_the_range_get_its_ends(qparams: UniformQParams, values: list[float]) -> None:
    """What lies beyond the representable values becomes the nearest of them."""
    low, high = ends(qparams)
    x = torch.tensor(values)
    found = fake_quantize(x, qparams)
    assert torch.equal(found[x >= high], torch.full_like(found[x >= high], high))
    assert torch.equal(found[x <= low], torch.full_like(found[x <= low], low))


@UNTIMED
@given(MODERATE, MODERATE, activation_specs())
def test_the_range_is_covered_to_half_a_step(first: float, second: float, spec: QuantSpec) -> None:
    """The ends of the range that was asked for lie within half a step of a code."""
    low, high = min(first, second, 0.0), max(first, second, 0.0)
    qparams = qparams_from_range(low, high, spec)
    x = torch.tensor([low, high], dtype=torch.float32)
    error = (fake_quantize(x, qparams) - x).abs().double() / qparams.scale[0]
    assert float(error.max()) <= 0.5 + slack(qparams)


@UNTIMED
@given(formats(MODERATE), st.lists(MODERATE, min_size=1, max_size=20))
def test_idempotent(qparams: UniformQParams, values: list[float]) -> None:
    """Quantizing what is representable changes no bit."""
    once = fake_quantize(torch.tensor(values), qparams)
    assert torch.equal(fake_quantize(once, qparams), once)


@UNTIMED
@given(formats())
def test_zero_is_exact(qparams: UniformQParams) -> None:
    """Real zero has the code zero_point and comes back as zero."""
    zero = torch.tensor([0.0, -0.0])
    assert quantize(zero, qparams).tolist() == [qparams.zero_point] * 2
    assert fake_quantize(zero, qparams).tolist() == [0.0, 0.0]


@UNTIMED
@given(formats(), st.lists(FLOAT32, min_size=2, max_size=20))
def test_monotone(qparams: UniformQParams, values: list[float]) -> None:
    """A larger value never gets a smaller code."""
    codes = quantize(torch.tensor(sorted(values)), qparams)
    assert bool((codes.diff() >= 0).all())


@UNTIMED
@given(formats())
def test_scales_are_positive_float32_values(qparams: UniformQParams) -> None:
    """Scales survive storage as float32, and zero points are codes."""
    assert all(scale > 0 and np.isfinite(scale) and float(np.float32(scale)) == scale for scale in qparams.scale)
    assert qparams.qmin <= qparams.zero_point <= qparams.qmax
    assert isinstance(qparams.zero_point, int)


@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_have_two_to_the_bits_codes(bits: int) -> None:
    """An activation gets exactly 2^b codes, symmetric or not, and every one is reached."""
    for symmetric in (True, False):
        qparams = qparams_from_range(-1.0, 1.0, QuantSpec(bits, symmetric=symmetric))
        assert qparams.qmax - qparams.qmin + 1 == 2**bits
        assert qparams.bits == bits
        low, high = ends(qparams)
        assert quantize(torch.linspace(low, high, 4 * 2**bits), qparams).unique().numel() == 2**bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_have_one_code_less(bits: int) -> None:
    """A weight gets 2^b - 1 codes, symmetric about zero, so that -x is representable whenever x is."""
    spec = QuantSpec(bits, granularity="channel")
    qparams = qparams_from_range([-1.0], [1.0], spec)
    assert (qparams.qmin, qparams.qmax) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) == bounds(spec)
    assert qparams.bits == bits
    codes = quantize(torch.linspace(-1, 1, 4 * 2**bits)[None], qparams).unique()
    assert codes.numel() == 2**bits - 1
    assert torch.equal(codes, -codes.flip(0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.1, 3.0, 1e-17, 1e30])
def test_all_8_bit_codes_round_trip(symmetric: bool, scale: float) -> None:
    """All 256 codes come back from their real values, with every zero point."""
    scale = float(np.float32(scale))
    for zero_point in [0] if symmetric else range(-128, 128):
        qparams = UniformQParams((scale,), zero_point, -128, 127)
        codes = torch.arange(-128.0, 128.0)
        assert torch.equal(quantize(dequantize(codes, qparams), qparams), codes)


def test_all_16_bit_codes_round_trip() -> None:
    """All 65,536 codes come back, although float32 holds their real values with 24 bits only."""
    codes = torch.arange(-32768.0, 32768.0)
    for scale in (0.1, 1 / 3, 1e-4):
        for zero_point in (0, -32768, 32767, 1234):
            qparams = UniformQParams((float(np.float32(scale)),), zero_point, -32768, 32767)
            assert torch.equal(quantize(dequantize(codes, qparams), qparams), codes)


def test_ties_go_to_the_even_step() -> None:
    """All ties of an 8-bit format, half-way between two codes: the even multiple of the step is taken."""
    qparams = UniformQParams((0.25,), 0, -128, 127)
    steps = torch.arange(-128, 127)
    codes = quantize((steps + 0.5) * 0.25, qparams)
    assert torch.equal(codes, torch.where(steps % 2 == 0, steps, steps + 1).float())


def test_ties_are_even_before_the_zero_point_is_added() -> None:
    """An odd zero point does not change which way a tie goes: 0.5 is 0 steps, 1.5 is 2 steps."""
    qparams = UniformQParams((2.0,), 3, -128, 127)
    assert quantize(torch.tensor([1.0, 3.0, 5.0, -1.0, -3.0]), qparams).tolist() == [3, 5, 5, 3, 1]


@pytest.mark.parametrize(
    ("granularity", "value", "code"),
    [
        ("tensor", 126.5, 126),
        ("tensor", 127.5, 127),
        ("tensor", -127.5, -128),
        ("tensor", -128.5, -128),
        ("tensor", -129.5, -128),
        ("channel", 126.5, 126),
        ("channel", 127.5, 127),
        ("channel", -126.5, -126),
        ("channel", -127.5, -127),
        ("channel", -128.5, -127),
    ],
)
def test_ties_at_the_bounds(granularity: str, value: float, code: int) -> None:
    """Ties at the ends saturate: activations at -128 and 127, weights at -127 and 127."""
    low, high = bounds(QuantSpec(8, granularity=granularity))
    assert quantize(torch.tensor([[value]]), UniformQParams((1.0,), 0, low, high)).item() == code


def test_round_half_even() -> None:
    """The one rounding of real values: 0.5 to 0, 1.5 and 2.5 to 2, also below zero."""
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 0.49999997, 8388607.5])
    assert round_half_even(x).tolist() == [0, 2, 2, 4, 0, -2, -2, 0, 8388608]


@pytest.mark.parametrize(
    ("low", "high", "spec", "scale", "zero_point"),
    [
        (-2.0, 1.0, QuantSpec(8), 2 / 127, 0),
        (0.0, 1.0, QuantSpec(8), 1 / 127, 0),
        (-1.0, 2.0, QuantSpec(8, symmetric=False), 3 / 255, -43),
        (0.0, 6.0, QuantSpec(8, symmetric=False), 6 / 255, -128),
        (2.0, 6.0, QuantSpec(8, symmetric=False), 6 / 255, -128),
        (-6.0, -2.0, QuantSpec(8, symmetric=False), 6 / 255, 127),
        (5.0, 5.0, QuantSpec(8, symmetric=False), 5 / 255, -128),
        (-5.0, -5.0, QuantSpec(8), 5 / 127, 0),
        (0.0, 0.0, QuantSpec(8), 1.0, 0),
        (0.0, 0.0, QuantSpec(8, symmetric=False), 1.0, -128),
        (-1e-45, 1e-45, QuantSpec(8), 1.0, 0),
        (0.0, 1e-38, QuantSpec(4, symmetric=False), 1.0, -8),
        (-1.0, 3.0, QuantSpec(2), 3.0, 0),
        (-1.0, 1.0, QuantSpec(16), 1 / 32767, 0),
        (-3.4e38, 3.4e38, QuantSpec(8, symmetric=False), 6.8e38 / 255, 0),
    ],
)
def test_ranges(low: float, high: float, spec: QuantSpec, scale: float, zero_point: int) -> None:
    """Symmetric, one-sided, constant, all-zero, denormal and huge ranges: scale and zero point by hand."""
    qparams = qparams_from_range(low, high, spec)
    assert qparams.scale == (float(np.float32(scale)),)
    assert qparams.zero_point == zero_point


def test_channels_have_their_own_scales() -> None:
    """A dead channel gets scale 1 and codes of zero; it does not disturb the others."""
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0], [1e-3, 5e-4]])
    peak = weight.abs().amax(1).numpy()
    qparams = qparams_from_range(-peak, peak, QuantSpec(8, granularity="channel"))
    assert qparams.scale == tuple(float(np.float32(s)) for s in (2 / 127, 1.0, 1e-3 / 127))
    assert quantize(weight, qparams).tolist() == [[64, -127], [0, 0], [127, 64]]


def test_channels_lie_along_axis_0() -> None:
    """Each slice of a convolution weight is quantized with its own scale."""
    weight = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    qparams = UniformQParams((0.1, 0.2, 0.3), 0, -127, 127)
    for channel, scale in enumerate(qparams.scale):
        expected = fake_quantize(weight[channel], UniformQParams((scale,), 0, -127, 127))
        assert torch.equal(fake_quantize(weight, qparams)[channel], expected)


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(-128, 127, "int8"), (-2, 1, "int8"), (0, 255, "uint8"), (-32768, 32767, "int16")]
)
def test_dtype_holds_the_codes(low: int, high: int, dtype: str) -> None:
    """The dtype is the smallest of the program's that holds all codes."""
    assert UniformQParams((1.0,), max(low, 0), low, high).dtype == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits is 1, expected 2 to 8, or 16 for residuals"),
        ({"bits": 9}, "bits is 9, expected 2 to 8"),
        ({"bits": 32}, "bits is 32, expected 2 to 8"),
        ({"bits": 8, "search": "kl"}, "search is 'kl', expected one of minmax, percentile, mse"),
        ({"bits": 8, "granularity": "group"}, "granularity is 'group', expected one of tensor, channel"),
        ({"bits": 8, "percentile": 50}, "percentile is 50, expected more than 50 and at most 100"),
        ({"bits": 8, "percentile": 100.5}, "percentile is 100.5, expected more than 50 and at most 100"),
    ],
)
def test_impossible_specs_are_refused(settings: dict[str, object], message: str) -> None:
    """A spec with a value outside its range says which one and what was expected."""
    with pytest.raises(UsageError) as caught:
        QuantSpec(**settings)
    assert message in str(caught.value)
