"""Laws of the families of codebooks, over every width and every parameter that a search tries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from quantizers.adalog import Q_RANGE, adalog, table
from quantizers.codebook import Codebook, CodebookQParams, fake_quantize_codebook, uniform_codebook
from quantizers.errors import UsageError
from quantizers.families import FAMILIES, candidates, families_of
from quantizers.logarithm import log2, log_sqrt2
from quantizers.sulq import SHIFTS, sulq
from quantizers.tangent import ALPHAS, tangent

BITS = range(2, 9)


def every(bits: int) -> list[Codebook]:
    """Return all codebooks of a width, those outside the registry too."""
    members = [tangent(bits, alpha, member) for member in ("T1", "T2", "T3") for alpha in (1e-3, *ALPHAS, 1.57)]
    rounded = [sulq(bits, eta, powers_of_two=True) for eta in SHIFTS]
    return [f.build(bits, p) for f in FAMILIES.values() for p in f.parameters] + members + rounded


@pytest.mark.parametrize("bits", BITS)
def test_exactly_two_to_the_bits_levels(bits: int) -> None:
    """Not one more, as published emulations have; zero and the top among them; never falling."""
    for codebook in every(bits):
        assert len(codebook.levels) == 2**bits, codebook.name
        assert codebook.bits == bits
        assert codebook.levels[0] == 0
        assert codebook.levels[-1] == (2**bits - 1 if codebook.family == "uniform" else 255)
        assert list(codebook.levels) == sorted(codebook.levels)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_differ(family: str, bits: int) -> None:
    """A search tries no codebook twice, and none that it was not offered."""
    found = candidates(family, bits)
    assert found
    assert len({codebook.levels for codebook in found}) == len(found)
    built = [FAMILIES[family].build(bits, parameter) for parameter in FAMILIES[family].parameters]
    assert {codebook.levels for codebook in found} == {codebook.levels for codebook in built}
    assert all(codebook.family == family for codebook in found)


def test_the_registry_has_these_names() -> None:
    assert list(FAMILIES) == ["uniform", "log2", "log_sqrt2", "adalog", "tangent", "sulq"]
    with pytest.raises(UsageError, match="codebook family is 'log3', expected one of uniform, log2, log_sqrt2"):
        candidates("log3", 4)


def test_any_family_is_the_uniform_one_at_8_bits() -> None:
    """Even levels are all steps of the grid there, so that no family has a level that they have not."""
    (even,) = candidates("uniform", 8)
    assert even.levels == tuple(range(256))
    assert families_of("any", 8) == ("uniform",)
    for bits in range(2, 8):
        assert families_of("any", bits) == tuple(FAMILIES)
    assert families_of("tangent", 8) == ("tangent",)


@pytest.mark.parametrize("bits", [1, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_widths_are_refused(family: str, bits: int) -> None:
    with pytest.raises(UsageError, match=f"a codebook has 2 to 8 bits, got {bits}"):
        candidates(family, bits)


# Log2 and log-sqrt2 ---------------------------------------------------------------------------------


def test_powers_of_two() -> None:
    """Literal levels; 127.5 rounds half to even."""
    assert log2(3).levels == (0, 4, 8, 16, 32, 64, 128, 255)
    assert log_sqrt2(3).levels == (0, 32, 45, 64, 90, 128, 180, 255)


@pytest.mark.parametrize(
    ("family", "different"),
    [
        ("uniform", (4, 8, 16, 64, 256)),
        ("log2", (4, 8, 10, 10, 10)),
        ("log_sqrt2", (4, 8, 16, 17, 17)),
        ("adalog", (4, 8, 16, 27, 27)),
        ("tangent", (4, 8, 16, 64, 247)),
        ("sulq", (4, 8, 16, 64, 234)),
    ],
)
def test_the_counts_of_the_page(family: str, different: tuple[int, ...]) -> None:
    """The most values that a byte tells apart, at 2, 3, 4, 6 and 8 bits."""
    found = tuple(max(len(set(c.levels)) for c in candidates(family, bits)) for bits in (2, 3, 4, 6, 8))
    assert found == different


# AdaLog ---------------------------------------------------------------------------------------------


def test_the_published_table_of_adalog() -> None:
    """The example of 4 bits, q = 20: t1 = 0, 0, 1, 1, 2, 2 and D t2 = 30, 21, 28, 19, 27, 18 with D = 30."""
    shifts, mantissas = (0, 0, 1, 1, 2, 2), (30, 21, 28, 19, 27, 18)
    assert table(4, 20)[:6] == tuple(m / 30 / 2**t for t, m in zip(shifts, mantissas, strict=True))
    assert adalog(4, 20).levels[-3:] == (119, 178, 255)


@pytest.mark.parametrize("bits", BITS)
def test_the_published_table_falls(bits: int) -> None:
    """Strictly, for every base: t2 lies in [(2^b - 1) / D, 1] and its error below that of the table's step."""
    for q in Q_RANGE:
        values = table(bits, q)
        assert values[0] == 1
        assert len(values) == 2**bits
        assert all(a > b for a, b in itertools.pairwise(values))
        exact = [-k * q / 37 for k in range(2**bits)]
        worst = max(abs(math.log2(value) - power) for value, power in zip(values, exact, strict=True))
        assert 2**worst - 1 <= 1 / (2 ** (bits + 1) - 2) + 1e-12


def test_q_37_is_log2() -> None:
    for bits in BITS:
        assert adalog(bits, 37).levels == log2(bits).levels


@pytest.mark.parametrize("q", [9, 138, 20.5, math.nan])
def test_other_bases_are_refused(q: float) -> None:
    with pytest.raises(UsageError, match=f"q of AdaLog is {q}, expected an integer from 10 to 137"):
        adalog(4, q)


# Tangent --------------------------------------------------------------------------------------------


def test_the_members_of_the_tangent_family() -> None:
    """T1 is dense near 1, T2 near 0, T3 at both ends, and a small alpha is nearly uniform."""
    assert tangent(3, 1.2).levels == tangent(3, 1.2, "T2").levels == (0, 17, 35, 56, 81, 114, 165, 255)
    assert tangent(3, 1.2, "T1").levels == (0, 75, 135, 177, 207, 228, 243, 255)
    assert tangent(3, 1.2, "T3").levels == (0, 14, 39, 90, 165, 216, 241, 255)
    for member in ("T1", "T2", "T3"):
        assert tangent(8, 1e-3, member).levels == tuple(range(256))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.pi / 2, math.nan])
def test_other_shapes_are_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match=r"alpha of a tangent codebook is .*, expected a number between 0 and pi/2"):
        tangent(4, alpha)


def test_other_members_are_refused() -> None:
    with pytest.raises(UsageError, match="member of the tangent family is 'T4', expected one of T1, T2, T3"):
        tangent(4, 1.2, "T4")


# SULQ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("eta", SHIFTS)
def test_real_exponents_are_uniform_in_the_shifted_logarithm(bits: int, eta: float) -> None:
    """Ratios of neighbouring shifted values are all equal, to the rounding of a level."""
    last = 2**bits - 1
    for k, level in enumerate(sulq(bits, eta).levels):
        assert abs(level / 255 - eta * ((1 + eta) / eta) ** (k / last) + eta) <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize(
    ("eta", "different"), [(0.5, (0, 128, 255)), (0.2, (0, 96, 255)), (0.01, None), (1.0, (0, 255))]
)
def test_rounded_exponents_are_powers_of_two(eta: float, different: tuple[int, ...] | None) -> None:
    """2^n - eta; negative and slightly positive values next to zero become zero; the largest is 255."""
    levels = sorted(set(sulq(6, eta, powers_of_two=True).levels))
    if different is not None:
        assert tuple(levels) == different
    top = 2.0 ** round(math.log2(1 + eta)) - eta
    for level in levels[1:]:
        share = 2.0 ** round(math.log2(level / 255 * min(top, 1) + eta)) - eta
        assert level == round(255 * min(share / min(top, 1), 1))


def test_other_shifts_are_refused() -> None:
    with pytest.raises(UsageError, match=r"eta of SULQ is 0\.3, expected one of 0\.001, 0\.005"):
        sulq(4, 0.3)


# What they are for ----------------------------------------------------------------------------------


def product_error(rows: Tensor, values: Tensor, codebook: Codebook) -> float:
    """Return the relative squared error of rows relative to their largest, normalized, times values."""
    relative = rows / rows.amax(-1, keepdim=True) * codebook.levels[-1]
    levels = fake_quantize_codebook(relative, CodebookQParams(codebook, 1.0, 0)).double()
    wanted = rows @ values
    found = levels / levels.sum(-1, keepdim=True) @ values
    return float((found - wanted).square().sum() / wanted.square().sum())


def attention(deviation: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = deviation * torch.randn(197, 197, generator=generator, dtype=torch.float64)
    return scores.softmax(-1), torch.randn(197, 64, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("deviation", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("bits", [3, 4])
def test_log_codebooks_beat_uniform_on_attention(bits: int, deviation: float) -> None:
    """At their best parameters, AdaLog and SULQ err less than 0.6 times as much as the same number of even levels."""
    rows, values = attention(deviation)
    uniform = product_error(rows, values, uniform_codebook(bits))
    for family in ("adalog", "sulq"):
        best = min(product_error(rows, values, codebook) for codebook in candidates(family, bits))
        assert best < 0.6 * uniform
    if deviation > 1:
        assert min(product_error(rows, values, build(bits)) for build in (log2, log_sqrt2)) < 0.5 * uniform


@pytest.mark.parametrize("deviation", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_second_tangent_is_best_on_attention(bits: int, deviation: float) -> None:
    """T2, each at its best alpha; the reason why it is the default. T1 is no better than uniform."""
    rows, values = attention(deviation)
    first, second, third = (
        min(product_error(rows, values, tangent(bits, alpha, member)) for alpha in ALPHAS)
        for member in ("T1", "T2", "T3")
    )
    uniform = product_error(rows, values, uniform_codebook(bits))
    assert second < min(first, third, uniform)
    assert first > 0.99 * uniform
