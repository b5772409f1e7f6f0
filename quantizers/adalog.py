"""Powers of an adaptive base 2^(q/37) (AdaLog, arXiv 2407.12951).

As published, with base 2^(q/r), r = 37 and an integer q from 10 to 137 (37 is log2, 18 and 19 are nearly log-sqrt2),

    k = round(-log2(x / s) r / q),   x' = s 2^-t1[k] t2[k]
    t1[k] = floor(k q / r),   t2[k] = round(D 2^(-((k q) mod r) / r)) / D,   D = 2^(b+1) - 2

and zero where k is 2^b or larger: 2^b + 1 values. Here zero takes the last code, as in :mod:`quantizers.logarithm`,
so that k goes from 0 to ``2^b - 2``; zero is zero for every q, whereas the published clamp to 1e-15 gives it a power
where q is large. The levels are those of the published table, ``round(255 t2[k] / 2^t1[k])``: one table look-up takes
the place of two look-ups and a shift. Steep bases leave many of them below half of 1/255, hence zero.
"""

from __future__ import annotations

from quantizers.codebook import Codebook, check_bits, from_shares
from quantizers.errors import UsageError

#: r of the paper: steps of the base's logarithm to a factor of two.
R = 37
#: The published search range of q.
Q_RANGE = range(10, 138)


def adalog(bits: int, q: float) -> Codebook:
    """Return zero and ``2^(-k q / 37)`` by the published table for k from 0 to ``2^bits - 2``.

    Args:
        bits: 2 to 8.
        q: an integer, 10 to 137.

    Raises:
        UsageError: a value outside its range.
    """
    check_bits(bits)
    check_q(q)
    return from_shares("adalog", q, [0.0, *reversed(table(bits, int(q))[:-1])])


def table(bits: int, q: int) -> tuple[float, ...]:
    """Return ``t2[k] / 2^t1[k]``, the published values of all ``2^bits`` codes, falling from 1."""
    denominator = (2 << bits) - 2
    # A quotient of two integers is rounded once, and stays exact where a power of two would leave float's range.
    return tuple(
        round(denominator * 2.0 ** (-(k * q % R) / R)) / (denominator << (k * q // R)) for k in range(1 << bits)
    )


def check_q(q: float) -> None:
    """Refuse a base that the paper does not have.

    Raises:
        UsageError: not an integer from 10 to 137.
    """
    if q not in Q_RANGE:
        raise UsageError(f"q of AdaLog is {q}, expected an integer from {Q_RANGE.start} to {Q_RANGE.stop - 1}")
