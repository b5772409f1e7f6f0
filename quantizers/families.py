"""The families of codebooks by name, and what a search tries of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from quantizers.adalog import Q_RANGE, adalog
from quantizers.codebook import Codebook, uniform_codebook
from quantizers.errors import UsageError
from quantizers.logarithm import log2, log_sqrt2
from quantizers.spec import MAX_BITS
from quantizers.sulq import SHIFTS, sulq
from quantizers.tangent import ALPHAS, tangent


class Family(NamedTuple):
    """How to make a codebook of a family.

    Args:
        build: codebook from bits (2 to 8) and parameter.
        parameters: what a search tries, at every width.
    """

    build: Callable[[int, float], Codebook]
    parameters: tuple[float, ...]


FAMILIES: dict[str, Family] = {
    "uniform": Family(lambda bits, _: uniform_codebook(bits), (0.0,)),
    "log2": Family(lambda bits, _: log2(bits), (0.0,)),
    "log_sqrt2": Family(lambda bits, _: log_sqrt2(bits), (0.0,)),
    "adalog": Family(adalog, tuple(map(float, Q_RANGE))),
    "tangent": Family(tangent, ALPHAS),
    "sulq": Family(sulq, SHIFTS),
}


def candidates(family: str, bits: int) -> tuple[Codebook, ...]:
    """Return the codebooks that a search tries, each once: of equal levels, the first parameter.

    Args:
        family: a key of :data:`FAMILIES`.
        bits: 2 to 8.

    Raises:
        UsageError: an unknown family, or bits outside their range.
    """
    if family not in FAMILIES:
        raise UsageError(f"codebook family is {family!r}, expected one of {', '.join(FAMILIES)}")
    build, parameters = FAMILIES[family]
    found: dict[tuple[int, ...], Codebook] = {}
    for parameter in parameters:
        codebook = build(bits, parameter)
        found.setdefault(codebook.levels, codebook)
    return tuple(found.values())


def families_of(format_name: str, bits: int) -> tuple[str, ...]:
    """Return the families that a spec's format allows: all of them for ``any``, uniform first.

    Levels are whole steps of an 8-bit grid. At 8 bits even levels are all of these steps, so that no other family has a
    level nearer to any value, and ``any`` is uniform: as good, and without a table, which other runtimes pay for.

    Args:
        format_name: a key of :data:`FAMILIES`, or ``any``.
        bits: 2 to 8.
    """
    if format_name != "any":
        return (format_name,)
    return tuple(FAMILIES) if bits < MAX_BITS else ("uniform",)
