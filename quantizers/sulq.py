"""Shift-uniform-log2 codes (SULQ of I&S-ViT, arXiv 2311.10126).

As published, a post-softmax value x with shift eta and b bits is

    u  = log2(x + eta),   d = (u_max - u_min) / (2^b - 1)
    k  = clip(round((u - u_min) / d), 0, 2^b - 1)
    x' = 2^round(k d + u_min) - eta

with u_min and u_max seen at calibration and eta by the smallest error from a list. The shift bounds the logarithmic
domain, so that small values do not all fall into the last code. The official forward pass divides by 2^b and clips to
2^b: 2^b + 1 codes. Here there are ``2^b``, over the whole range of a probability, u from log2(eta) to log2(1 + eta).

Two forms: exponents kept real (the default: a table of levels costs the same for every exponent, and all codes differ
where 255 steps can tell them apart), or rounded to integers as published. Rounded ones miss zero (by -0.0022 for eta
0.01, 0.05 for eta 0.2) and leave [0, 1]: the value nearest to zero becomes exactly zero, which attention needs, levels
are clipped to [0, 1], and the largest becomes 255 (a scale takes the difference).
"""

from __future__ import annotations

import math

from quantizers.codebook import Codebook, check_bits, from_shares
from quantizers.errors import UsageError

#: The published candidates of eta.
SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def sulq(bits: int, eta: float, powers_of_two: bool = False) -> Codebook:
    """Return levels that are uniform in ``log2(x + eta)``.

    Args:
        bits: 2 to 8.
        eta: one of :data:`SHIFTS`.
        powers_of_two: round exponents to integers, as published; coarser, with many coinciding levels.

    Raises:
        UsageError: a value outside its range.
    """
    check_bits(bits)
    if eta not in SHIFTS:
        raise UsageError(f"eta of SULQ is {eta}, expected one of {', '.join(map(str, SHIFTS))}")
    last, lowest = (1 << bits) - 1, math.log2(eta)
    exponents = [lowest + k / last * (math.log2(1 + eta) - lowest) for k in range(last + 1)]
    values = [2.0 ** (round(u) if powers_of_two else u) - eta for u in exponents]
    nearest_zero = min(values, key=abs)
    clipped = [0.0 if value == nearest_zero else min(max(value, 0.0), 1.0) for value in values]
    family = "sulq_powers_of_two" if powers_of_two else "sulq"
    return from_shares(family, eta, [value / clipped[-1] for value in clipped])
