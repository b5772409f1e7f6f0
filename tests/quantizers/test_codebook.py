"""Laws of codebooks: nearest level, ties to the lower, the same in reals and in integers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantizers.codebook import (
    Codebook,
    CodebookQParams,
    codebook_qparams,
    decode,
    encode,
    fake_quantize_codebook,
    nearest_levels,
    thresholds,
    uniform_codebook,
)
from quantizers.errors import DataError, UsageError
from quantizers.families import FAMILIES, candidates

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None)
CANDIDATES = st.builds(candidates, st.sampled_from(sorted(FAMILIES)), st.integers(2, 8))
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
LOG2 = Codebook("log2", 0.0, (0, 64, 128, 255))


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    return draw(st.sampled_from(draw(CANDIDATES)))


@st.composite
def formats(draw: st.DrawFn) -> CodebookQParams:
    scale = draw(st.floats(2.0**-40, 2.0**40, width=32))
    return CodebookQParams(draw(codebooks()), scale, draw(st.integers(0, 255)))


def exact_steps(value: float, qparams: CodebookQParams) -> Fraction:
    return Fraction(value) / Fraction(qparams.scale) + qparams.zero_point


def nearest(value: float, qparams: CodebookQParams) -> int:
    """Return the nearest level, the lower one of two, in exact arithmetic."""
    steps = exact_steps(value, qparams)
    return min(qparams.codebook.levels, key=lambda level: (abs(steps - level), level))


# Encoding -------------------------------------------------------------------------------------------


@UNTIMED
@given(formats(), st.lists(FLOAT32, min_size=1, max_size=20))
def test_the_nearest_level_is_coded(qparams: CodebookQParams, values: list[float]) -> None:
    """For any finite float32 at all, in exact arithmetic; a tie goes to the lower level."""
    codes = encode(torch.tensor(values), qparams).tolist()
    assert [qparams.codebook.levels[code] for code in codes] == [nearest(value, qparams) for value in values]


@UNTIMED
@given(formats(), st.lists(FLOAT32, min_size=1, max_size=20))
@example(CodebookQParams(next(b for b in candidates("adalog", 5) if len(set(b.levels)) < 32), 1.0, 0), [1.2, 1.5])
def test_a_code_counts_the_thresholds_below(qparams: CodebookQParams, values: list[float]) -> None:
    """Which of several coinciding levels is coded is this count too, so that integers find the same code."""
    doubled = [2 * exact_steps(value, qparams) for value in values]
    below = [sum(threshold < twice for threshold in thresholds(qparams.codebook)) for twice in doubled]
    assert encode(torch.tensor(values), qparams).tolist() == below


@UNTIMED
@given(codebooks(), st.integers(-20, 20))
def test_exact_ties_go_to_the_lower_level(codebook: Codebook, exponent: int) -> None:
    """Every midpoint, and the float32 values right beside it."""
    qparams = CodebookQParams(codebook, 2.0**exponent, 0)
    midpoints = (np.array(thresholds(codebook)) * 2.0 ** (exponent - 1)).astype(np.float32)
    lower, upper = np.array(codebook.levels[:-1]), np.array(codebook.levels[1:])
    levels = np.array(codebook.levels)
    assert np.array_equal(levels[encode(torch.from_numpy(midpoints), qparams)], lower)
    above = np.nextafter(midpoints, np.float32(np.inf))
    apart = upper > lower
    assert np.array_equal(levels[encode(torch.from_numpy(above), qparams)][apart], upper[apart])


def test_ties_of_integers_go_to_the_lower_level() -> None:
    """96 lies between 64 and 128; 32 between 0 and 64."""
    assert nearest_levels(np.array([32, 33, 96, 97]), LOG2).tolist() == [0, 64, 64, 128]
    assert thresholds(LOG2) == (64, 192, 383)


@UNTIMED
@given(formats())
def test_levels_are_fixed_points(qparams: CodebookQParams) -> None:
    """A value that is representable stays, bit for bit."""
    values = decode(torch.arange(2**qparams.bits), qparams)
    assert values.dtype == torch.float32
    assert torch.equal(fake_quantize_codebook(values, qparams), values)
    assert nearest_levels(np.array(qparams.codebook.levels), qparams.codebook).tolist() == [*qparams.codebook.levels]


@UNTIMED
@given(formats(), st.lists(FLOAT32, min_size=2, max_size=30))
def test_order_is_kept(qparams: CodebookQParams, values: list[float]) -> None:
    """A larger value never gets a lower code."""
    assert bool((encode(torch.tensor(sorted(values)), qparams).diff() >= 0).all())


@UNTIMED
@given(codebooks(), st.floats(2.0**-30, 2.0**30, width=32))
def test_zero_and_the_top_are_exact(codebook: Codebook, top: float) -> None:
    """Real zero has a code, and the largest value of the range is the largest level."""
    qparams = codebook_qparams(0.0, top, codebook)
    zero, largest = fake_quantize_codebook(torch.tensor([0.0, top]), qparams).tolist()
    assert zero == 0
    assert largest == pytest.approx(top, rel=1e-6)
    assert encode(torch.tensor([2 * top, -top]), qparams).tolist() == encode(torch.tensor([top, 0.0]), qparams).tolist()


@UNTIMED
@given(codebooks(), st.integers(0, 2**32 - 1))
def test_integers_agree_with_reals(codebook: Codebook, seed: int) -> None:
    """Levels read from a table of 8-bit carrier codes differ only within a carrier step of a threshold."""
    qparams = codebook_qparams(0.0, 1.0, codebook)
    x = torch.rand(2000, generator=torch.Generator().manual_seed(seed))
    steps = (x.double() / qparams.scale).numpy()
    by_table = nearest_levels(np.arange(256), codebook)[np.rint(steps).astype(np.int64).clip(0, 255)]
    by_value = np.array(codebook.levels)[encode(x, qparams)]
    borders = np.array(thresholds(codebook)) / 2
    far = np.abs(steps[:, None] - borders).min(1) > 1
    assert np.array_equal(by_table[far], by_value[far])
    assert by_table.dtype == np.uint8


@UNTIMED
@given(formats())
def test_every_carrier_code_agrees(qparams: CodebookQParams) -> None:
    """On the carrier's own values there is no difference at all."""
    carrier = np.arange(256)
    reals = torch.from_numpy((carrier - qparams.zero_point) * float(qparams.scale))
    by_value = np.array(qparams.codebook.levels)[encode(reals, qparams)]
    assert np.array_equal(nearest_levels(carrier, qparams.codebook), by_value)


def test_the_nearest_level_errs_less_than_rounding_in_the_log_domain() -> None:
    """Between s and 2 s the log domain's border is 1.41 s."""
    x = torch.linspace(0, 1, 10001)
    qparams = codebook_qparams(0.0, 1.0, LOG2)
    steps = torch.tensor(LOG2.levels).double()
    codes = 3 + x.double().clamp(min=2.0**-10).log2().round().clamp(min=-3)
    published = (steps[codes.long()] * qparams.scale - x).square().mean()
    assert (fake_quantize_codebook(x, qparams) - x).square().mean() < published


# Inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [1e-45, -1e-45, 1e-40],
        [3.0, 3.0, 3.0],
        [-3.0, -3.0],
        [5.0, 6.0, 7.0],
        [-5.0, -6.0],
        [-1.0, 2.0],
        [-1e38, 1e38],
        [],
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_inputs_of_every_kind(family: str, bits: int, values: list[float]) -> None:
    """Zeros, denormals, constants, one-sided, negative, huge, none: finite values in the range, the top kept."""
    x = torch.tensor(values)
    low, high = (float(x.min()), float(x.max())) if values else (0.0, 0.0)
    for codebook in candidates(family, bits):
        qparams = codebook_qparams(low, high, codebook)
        result = fake_quantize_codebook(x, qparams)
        assert result.shape == x.shape
        assert bool(result.isfinite().all())
        assert bool(((result >= min(low, 0) - qparams.scale) & (result <= max(high, 0) + qparams.scale)).all())
        if values and high > 1e-30 and low >= 0:
            assert float(result.max()) == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_that_are_not_finite_are_refused(family: str, bad: float) -> None:
    qparams = codebook_qparams(0.0, 1.0, candidates(family, 4)[0])
    for function in (encode, fake_quantize_codebook):
        with pytest.raises(DataError, match=r"1 of 3 values are infinite or NaN; .* codes finite values only"):
            function(torch.tensor([0.5, bad, 0.1]), qparams)


def test_shapes_and_strides_do_not_matter() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    qparams = codebook_qparams(-3.0, 3.0, LOG2)
    assert torch.equal(encode(x.permute(2, 0, 1), qparams), encode(x, qparams).permute(2, 0, 1))
    assert encode(x, qparams).dtype == torch.int64


# Values of the format -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_levels_are_the_codes(bits: int) -> None:
    """So that attention of today stays as it is: levels 0 to 2^b - 1, thresholds at halves."""
    codebook = uniform_codebook(bits)
    assert codebook.levels == tuple(range(2**bits))
    assert thresholds(codebook) == tuple(range(1, 2 ** (bits + 1) - 1, 2))
    assert codebook.bits == CodebookQParams(codebook, 1.0, 0).bits == bits


def test_a_zero_point_shifts_the_levels() -> None:
    """GELU's lowest value becomes level 0; zero is coded like any other value."""
    qparams = codebook_qparams(-0.17, 4.0, LOG2)
    assert qparams.zero_point == 10
    assert qparams.dtype == "uint8"
    values = decode(torch.arange(4), qparams).tolist()
    assert values == pytest.approx([-0.1635, 0.883, 1.930, 4.007], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log3", 0.0, (0, 64, 128, 255)), "codebook family is 'log3', expected one of uniform, log2"),
        (("log2", 1.0, (0, 64, 128, 255)), "the parameter of a log2 codebook is 1.0, expected 0: this family has none"),
        (
            ("adalog", math.nan, (0, 64, 128, 255)),
            "the parameter of a adalog codebook is nan, expected a finite number",
        ),
        (("log2", 0.0, (0, 128, 255)), "codebook log2 has 3 levels, expected 2^bits for 2 to 8 bits"),
        (("log2", 0.0, (0, 255)), "has 2 levels"),
        (("log2", 0.0, ()), "has 0 levels"),
        (("log2", 0.0, (0, 64, 128, 256)), "has the level 256, expected integers from 0 to 255"),
        (("log2", 0.0, (-1, 64, 128, 255)), "has the level -1"),
        (("log2", 0.0, (0, 64.0, 128, 255)), "has the level 64.0"),
        (("log2", 0.0, (False, 64, 128, 255)), "has the level False"),
        (("log2", 0.0, (0, 128, 64, 255)), "has level 64 after 128, expected ascending levels"),
        (("log2", 0.0, (1, 64, 128, 255)), "has levels from 1 to 255, expected 0 to 255"),
        (("adalog", 20.0, (0, 64, 128, 254)), r"codebook adalog\(q=20\) has levels from 0 to 254, expected 0 to 255"),
        (("uniform", 0.0, (0, 1, 2, 255)), r"codebook uniform has other levels than 0, 1, \.\.\. 3"),
    ],
)
def test_bad_codebooks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("^", r"\^")):
        Codebook(*arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.1, math.inf, math.nan, 1e300])
def test_bad_scales_are_refused(scale: float) -> None:
    """A scale that is not a float32 value would be another one in every file that stores it."""
    with pytest.raises(UsageError, match=r"the scale of a codebook is .*, expected a positive float32 value"):
        CodebookQParams(LOG2, scale, 0)


@pytest.mark.parametrize("zero_point", [-1, 256, 1.0, True])
def test_bad_zero_points_are_refused(zero_point: int) -> None:
    with pytest.raises(UsageError, match=r"the zero point of a codebook is .*, expected an integer, 0 to 255"):
        CodebookQParams(LOG2, 1.0, zero_point)
