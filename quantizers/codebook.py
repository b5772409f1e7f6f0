"""Codebooks: formats of b bits whose 2^b levels lie where values are dense, in integers throughout.

A level is an unsigned byte, so that codes become operands of an int8 matrix product by one table:

    real value = scale (level[code] - zero_point)
    code       = how many thresholds lie below value / scale + zero_point
    threshold  = the midpoint of two neighbouring levels; kept doubled, hence an integer

This codes to the *nearest level*, a tie to the lower one. The papers round in the logarithmic domain, where the
border between s and 2 s is 1.41 s and not 1.5 s; the nearest level has the smaller squared error for every value.
:mod:`quantizers.parity` rounds as the papers do, for comparison only.

Neighbouring levels may coincide where 255 steps cannot tell them apart: from 4 bits on for steep families (log2 at
4 bits has powers below half a step, which are zeros), from 6 bits on for nearly all. Coinciding levels have codes of
their own and one value, so that such a codebook represents fewer values than it has codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantizers.errors import DataError, UsageError
from quantizers.spec import MAX_BITS, MIN_BITS, QuantSpec
from quantizers.uniform import UniformQParams, qparams_from_range

#: The largest level of a codebook that is not uniform: one byte without sign.
TOP = 255
#: Name of a family to the symbol of its parameter; families without one have the parameter 0.
PARAMETERS: dict[str, str] = {
    "uniform": "",
    "log2": "",
    "log_sqrt2": "",
    "adalog": "q",
    "tangent": "alpha",
    "tangent_t1": "alpha",
    "tangent_t3": "alpha",
    "sulq": "eta",
    "sulq_powers_of_two": "eta",
}


@dataclass(frozen=True, slots=True)
class Codebook:
    """Exactly ``2^b`` levels.

    Args:
        family: a key of :data:`PARAMETERS`, which says how the levels were made.
        parameter: the family's parameter, finite; 0 where it has none.
        levels: ``2^b`` integers, b from 2 to 8, ascending (neighbours may coincide), the first 0 and the last 255;
            those of ``uniform`` are 0, 1, ... ``2^b - 1``.

    Raises:
        UsageError: anything else.
    """

    family: str
    parameter: float
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.family not in PARAMETERS:
            raise UsageError(f"codebook family is {self.family!r}, expected one of {', '.join(PARAMETERS)}")
        if not math.isfinite(self.parameter) or (self.parameter and not PARAMETERS[self.family]):
            expected = "a finite number" if PARAMETERS[self.family] else "0: this family has none"
            raise UsageError(f"the parameter of a {self.family} codebook is {self.parameter}, expected {expected}")
        where, count = f"codebook {self.name}", len(self.levels)
        if count not in {1 << bits for bits in range(MIN_BITS, MAX_BITS + 1)}:
            raise UsageError(f"{where} has {count} levels, expected 2^bits for {MIN_BITS} to {MAX_BITS} bits")
        # A bool is an int to isinstance, and a float that is whole would be written as another artifact.
        wrong = [level for level in self.levels if type(level) is not int or not 0 <= level <= TOP]
        if wrong:
            raise UsageError(f"{where} has the level {wrong[0]!r}, expected integers from 0 to {TOP}")
        if self.family == "uniform" and self.levels != tuple(range(count)):
            raise UsageError(f"{where} has other levels than 0, 1, ... {count - 1}")
        if self.family != "uniform" and (self.levels[0], self.levels[-1]) != (0, TOP):
            found = f"{self.levels[0]} to {self.levels[-1]}"
            raise UsageError(f"{where} has levels from {found}, expected 0 to {TOP}")
        for lower, upper in zip(self.levels, self.levels[1:], strict=False):
            if lower > upper:
                raise UsageError(f"{where} has level {upper} after {lower}, expected ascending levels")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def name(self) -> str:
        """Family and parameter as reports spell them: ``log2``, ``adalog(q=20)``."""
        symbol = PARAMETERS[self.family]
        return f"{self.family}({symbol}={self.parameter:g})" if symbol else self.family


@dataclass(frozen=True, slots=True)
class CodebookQParams:
    """Parameters of one tensor.

    Args:
        codebook: the levels.
        scale: real value of one level step, a positive float32 value.
        zero_point: level step of real zero, 0 to 255. Real zero is exact where this is a level: always at 0. The
            post-GELU shift of AdaLog puts it elsewhere on purpose.

    Raises:
        UsageError: a value outside its range.
    """

    codebook: Codebook
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            representable = float(np.float32(self.scale)) == self.scale
        if not (representable and 0 < self.scale < math.inf):
            raise UsageError(f"the scale of a codebook is {self.scale}, expected a positive float32 value")
        if type(self.zero_point) is not int or not 0 <= self.zero_point <= TOP:
            raise UsageError(f"the zero point of a codebook is {self.zero_point!r}, expected an integer, 0 to {TOP}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.codebook.bits

    @property
    def dtype(self) -> str:
        """Type of a level in the program."""
        return "uint8"

    @property
    def carrier(self) -> UniformQParams:
        """The 8-bit uniform format in steps of a level, from whose codes a table reads the nearest levels."""
        return UniformQParams((self.scale,), self.zero_point, 0, TOP)

    def scales(self) -> npt.NDArray[np.float64]:
        """Return the scale as float64, shape (1,), as uniform formats return theirs."""
        return np.array([self.scale], np.float64)


def check_bits(bits: int) -> None:
    """Refuse a width that a codebook cannot have.

    Raises:
        UsageError: not 2 to 8.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(f"a codebook has {MIN_BITS} to {MAX_BITS} bits, got {bits}")


def from_shares(family: str, parameter: float, shares: Iterable[float]) -> Codebook:
    """Return a codebook from its levels as shares of the largest, each rounded to 255 steps, half to even.

    Args:
        family: a key of :data:`PARAMETERS`.
        parameter: the family's parameter.
        shares: ``2^b`` ascending numbers from 0 to 1.
    """
    return Codebook(family, float(parameter), tuple(round(TOP * share) for share in shares))


def uniform_codebook(bits: int) -> Codebook:
    """Return levels 0 to ``2^bits - 1``: evenly spaced, and small so that sums of a row stay narrow.

    Raises:
        UsageError: bits outside 2 to 8.
    """
    check_bits(bits)
    return Codebook("uniform", 0.0, tuple(range(1 << bits)))


def codebook_qparams(low: float, high: float, codebook: Codebook) -> CodebookQParams:
    """Choose scale and zero point for values in ``[low, high]``, as an affine uniform format of the same range does.

    Args:
        low: lowest value; counts as 0 where positive. At 0 or above, the zero point is 0, a level.
        high: highest value, the largest level; counts as 0 where negative.
        codebook: the levels.
    """
    steps = qparams_from_range(low, high, QuantSpec(codebook.levels[-1].bit_length(), symmetric=False))
    return CodebookQParams(codebook, steps.scale[0], steps.zero_point - steps.qmin)


def thresholds(codebook: Codebook) -> tuple[int, ...]:
    """Return the ``2^b - 1`` ascending midpoints of neighbouring levels, doubled: integers from 0 to 510."""
    return tuple(lower + upper for lower, upper in zip(codebook.levels, codebook.levels[1:], strict=False))


def encode(values: Tensor, qparams: CodebookQParams) -> Tensor:
    """Return the code of the nearest level of each value; a tie goes to the lower level, values beyond saturate.

    The quotient is a float64, in which that of two float32 values never lands on a threshold by rounding.

    Args:
        values: real values of any shape and type; float32 ones are coded exactly.
        qparams: the format.

    Returns:
        int64 codes, 0 to ``2^b - 1``, same shape.

    Raises:
        DataError: infinite values or NaN.
    """
    if not bool(values.isfinite().all()):
        raise DataError(
            f"{int((~values.isfinite()).sum())} of {values.numel()} values are infinite or NaN; "
            f"{qparams.codebook.name} codes finite values only"
        )
    # A value lies above half a whole number where its double, rounded up, is larger than the number: so a table does
    # what a search of the thresholds would, many times faster. Whole numbers take the zero point, for the sum of it and
    # a value would round small ones away.
    borders = torch.tensor(thresholds(qparams.codebook), device=values.device)
    passed = torch.searchsorted(borders, torch.arange(2 * TOP + 2, device=values.device))
    shift = 2 * qparams.zero_point
    doubled = (2 * (values.to(torch.float64) / qparams.scale)).ceil_()
    return passed[doubled.clamp_(-shift, 2 * TOP + 1 - shift).to(torch.int64) + shift]


def levels_of(values: Tensor, qparams: CodebookQParams) -> npt.NDArray[np.uint8]:
    """Return the nearest level of each value, uint8, same shape: what a program holds for it.

    Args:
        values: real values, as :func:`encode` takes them.
        qparams: the format.

    Raises:
        DataError: infinite values or NaN.
    """
    return np.array(qparams.codebook.levels, np.uint8)[encode(values, qparams).numpy()]


def decode(codes: Tensor, qparams: CodebookQParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the real values of codes: one product of an integer with the scale.

    Args:
        codes: integers from 0 to ``2^b - 1``, any shape.
        qparams: the format.
        dtype: of the result; in float64 the product is exact.
    """
    steps = torch.tensor(qparams.codebook.levels, dtype=dtype, device=codes.device) - qparams.zero_point
    return steps[codes.to(torch.int64)] * torch.tensor(qparams.scale, dtype=dtype, device=codes.device)


def fake_quantize_codebook(x: Tensor, qparams: CodebookQParams) -> Tensor:
    """Return the nearest representable values, in the type of ``x``: encode, then decode.

    Raises:
        DataError: infinite values or NaN.
    """
    return decode(encode(x, qparams), qparams, x.dtype)


def nearest_levels(
    carrier: npt.NDArray[np.integer] | npt.NDArray[np.floating], codebook: Codebook
) -> npt.NDArray[np.uint8]:
    """Return the nearest level, uint8, same shape: what a 256-entry table of an integer program holds.

    Args:
        carrier: level steps: 8-bit codes, 0 to 255, or real numbers where a table holds a function's values.
        codebook: the levels.
    """
    passed = np.searchsorted(np.array(thresholds(codebook)), 2 * np.asarray(carrier, np.float64), side="left")
    return np.array(codebook.levels, np.uint8)[passed]


def carrier_table(codebook: Codebook) -> npt.NDArray[np.uint8]:
    """Return the level nearest to each code of the carrier, uint8[256], ties to the lower one."""
    return nearest_levels(np.arange(TOP + 1), codebook)
