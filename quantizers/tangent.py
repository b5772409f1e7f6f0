"""A tangent compander, in the spirit of TanQ (DopQ-ViT, arXiv 2408.03291). It is ours, not a reproduction.

No public code and no public text of TanQ's formula could be confirmed: known is that it places levels for
post-softmax values by the tangent function, with more attention to values near 1 than logarithms pay. Any such
compander has one shape parameter alpha in (0, pi/2). For shares t in [0, 1] of the largest value, L = 2^b - 1:

====== ================================================= =======================================
member level of code k                                   levels are dense
====== ================================================= =======================================
T1     arctan(k / L tan alpha) / alpha                   near 1
T2     tan(alpha k / L) / tan alpha                      near 0; the last gap stays finite
T3     (arctan((2 k / L - 1) tan alpha) / alpha + 1) / 2 at both ends
====== ================================================= =======================================

T2 is the default: on softmax-like rows it has the smallest error of the three. All map 0 to 0 and 1 to 1, so that
zero costs no code; alpha towards 0 is uniform.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from quantizers.codebook import Codebook, check_bits, from_shares
from quantizers.errors import UsageError

#: alpha of a search: below 0.5 the levels are nearly uniform, above 1.55 nearly all of them lie in the lowest tenth.
ALPHAS = tuple(step / 20 for step in range(10, 32))

#: Member to family name and level, from code share k / L and alpha.
MEMBERS: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "T1": ("tangent_t1", lambda share, alpha: math.atan(share * math.tan(alpha)) / alpha),
    "T2": ("tangent", lambda share, alpha: math.tan(alpha * share) / math.tan(alpha)),
    "T3": ("tangent_t3", lambda share, alpha: (math.atan((2 * share - 1) * math.tan(alpha)) / alpha + 1) / 2),
}


def tangent(bits: int, alpha: float, member: str = "T2") -> Codebook:
    """Return the levels of a member of the family.

    Args:
        bits: 2 to 8.
        alpha: shape, between 0 and pi/2, both excluded.
        member: ``T1``, ``T2`` or ``T3``.

    Raises:
        UsageError: a value outside its range.
    """
    check_bits(bits)
    if not 0 < alpha < math.pi / 2:
        raise UsageError(f"alpha of a tangent codebook is {alpha}, expected a number between 0 and pi/2")
    if member not in MEMBERS:
        raise UsageError(f"member of the tangent family is {member!r}, expected one of {', '.join(MEMBERS)}")
    family, level = MEMBERS[member]
    last = (1 << bits) - 1
    return from_shares(family, alpha, [level(k / last, alpha) for k in range(last + 1)])
