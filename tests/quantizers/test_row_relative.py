"""Laws of attention probabilities relative to their row's largest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.codebook import thresholds, uniform_codebook
from quantizers.errors import DataError
from quantizers.families import FAMILIES, candidates
from quantizers.row_relative import RowRelativeQParams, exponential_table, fake_quantize_rows

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None)
UNIFORM = st.integers(2, 8).map(lambda bits: RowRelativeQParams(uniform_codebook(bits)))
CANDIDATES = st.builds(candidates, st.sampled_from(sorted(FAMILIES)), st.integers(2, 8))
FORMATS = CANDIDATES.flatmap(st.sampled_from).map(RowRelativeQParams)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    scores = draw(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=200))
    return torch.tensor(scores).softmax(-1)


@UNTIMED
@given(rows(), FORMATS)
def test_rows_sum_to_one(row: Tensor, qparams: RowRelativeQParams) -> None:
    """No probability mass is lost, however flat or peaked the row is."""
    assert abs(float(fake_quantize_rows(row, qparams).double().sum()) - 1) < 1e-5


@UNTIMED
@given(rows(), UNIFORM)
def test_error_bound(row: Tensor, qparams: RowRelativeQParams) -> None:
    """An entry p of a row of n is off by at most (1 + n p) / (2 levels).

    Codes are off by a half each, their sum, at least the largest level, by n halves; the quotient follows.
    """
    error = (fake_quantize_rows(row, qparams) - row).abs().double()
    bound = (1 + len(row) * row.double()) / (2 * qparams.peak)
    assert bool((error <= bound + 1e-5).all())


@UNTIMED
@given(rows(), FORMATS)
def test_order_is_kept(row: Tensor, qparams: RowRelativeQParams) -> None:
    """A larger probability never gets a smaller value, and the largest is never lost."""
    quantized = fake_quantize_rows(row.sort().values, qparams)
    assert bool((quantized.diff() >= 0).all())
    assert quantized[-1] > 0


@UNTIMED
@given(rows(), FORMATS)
def test_idempotent(row: Tensor, qparams: RowRelativeQParams) -> None:
    """A row that is representable stays as it is, to the rounding of float32."""
    once = fake_quantize_rows(row, qparams)
    torch.testing.assert_close(fake_quantize_rows(once, qparams), once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("keys", [1, 2, 5, 197, 4096])
def test_flat_rows_are_exact(bits: int, keys: int) -> None:
    """Equal probabilities come back bit for bit, even where each is far below one 8-bit step of [0, 1]."""
    row = torch.full((keys,), 1 / keys)
    assert torch.equal(fake_quantize_rows(row, RowRelativeQParams(uniform_codebook(bits))), row)


def test_zero_is_kept() -> None:
    """A zero probability stays zero, and one-hot rows are exact."""
    row = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    assert torch.equal(fake_quantize_rows(row, RowRelativeQParams(uniform_codebook(8))), row)


@UNTIMED
@given(rows(), UNIFORM)
def test_uniform_rows_round_half_to_even(row: Tensor, qparams: RowRelativeQParams) -> None:
    """Bit for bit the rounded ratios: with even levels the codebook changes nothing."""
    levels = (row / row.amax() * (2**qparams.bits - 1)).round()
    assert torch.equal(fake_quantize_rows(row, qparams), levels / levels.sum())


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_tables_round_half_to_even(bits: int) -> None:
    for scale in (1e-3, 0.05, np.log(2), 3.0):
        expected = np.rint((2**bits - 1) * np.exp(-scale * np.arange(256.0))).astype(np.uint8)
        assert np.array_equal(exponential_table(scale, RowRelativeQParams(uniform_codebook(bits))), expected)


def test_ties_of_codebooks_go_to_the_lower_level() -> None:
    """log2 at 2 bits has the levels 0, 64, 128, 255: 96 of 255 becomes 64, where the logarithm rounds to 128."""
    (codebook,) = candidates("log2", 2)
    row = torch.tensor([96.0, 255.0])
    expected = torch.tensor([64.0, 255.0]) / 319
    assert torch.equal(fake_quantize_rows(row / row.sum(), RowRelativeQParams(codebook)), expected)


@UNTIMED
@given(st.floats(1e-6, 1e3), FORMATS)
def test_tables_hold_levels_only(score_scale: float, qparams: RowRelativeQParams) -> None:
    assert set(exponential_table(score_scale, qparams).tolist()) <= set(qparams.codebook.levels)


def test_rows_that_are_not_finite_are_refused() -> None:
    (codebook,) = candidates("log2", 4)
    with pytest.raises(DataError, match="3 of 3 values are infinite or NaN"):
        fake_quantize_rows(torch.full((1, 3), torch.nan), RowRelativeQParams(codebook))


def test_ties_go_to_the_even_code() -> None:
    """Ratios half-way between two codes of a 2-bit row: 0.5 / 3 to 0, 1.5 / 3 and 2.5 / 3 to 2."""
    ratios = torch.tensor([1.5, 3.0])
    assert (fake_quantize_rows(ratios / ratios.sum(), RowRelativeQParams(uniform_codebook(2))) * 5).tolist() == [
        2.0,
        3.0,
    ]


def test_rows_do_not_see_each_other() -> None:
    """Each row of a batch of heads is quantized as if it were alone."""
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    qparams = RowRelativeQParams(uniform_codebook(4))
    together = fake_quantize_rows(scores, qparams)
    assert torch.equal(together[1, 2, 3], fake_quantize_rows(scores[1, 2, 3], qparams))


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits(bits: int) -> None:
    """2^b - 1 levels above zero are b bits."""
    assert RowRelativeQParams(uniform_codebook(bits)).bits == bits


@UNTIMED
@given(st.floats(1e-6, 1e3), FORMATS)
def test_table_falls_from_levels(score_scale: float, qparams: RowRelativeQParams) -> None:
    """Entry 0, the row's maximum, is the largest level; entries never rise and are 256 bytes."""
    table = exponential_table(score_scale, qparams)
    assert table.shape == (256,)
    assert table.dtype == np.uint8
    assert table[0] == qparams.peak
    assert bool((np.diff(table.astype(np.int64)) <= 0).all())


@UNTIMED
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=50), st.floats(1e-3, 1.0), FORMATS)
def test_table_agrees_with_softmax(scores: list[int], score_scale: float, qparams: RowRelativeQParams) -> None:
    """Table codes, divided by their sum, are the simulation's row but for codes next to a rounding border."""
    codes = exponential_table(score_scale, qparams)[max(scores) - np.array(scores)].astype(np.int64)
    row = (torch.tensor(scores, dtype=torch.float64) * score_scale).softmax(-1).to(torch.float32)
    simulated = fake_quantize_rows(row, qparams)
    peak = int(codes.argmax())
    simulated_codes = (simulated / simulated[peak] * qparams.peak).round().to(torch.int64).numpy()
    exact = qparams.peak * np.exp(score_scale * (np.array(scores) - max(scores)))
    borders = np.array(thresholds(qparams.codebook)) / 2
    far_from_border = np.abs(exact[:, None] - borders).min(1) > 1e-3
    assert np.array_equal(codes[far_from_border], simulated_codes[far_from_border])
