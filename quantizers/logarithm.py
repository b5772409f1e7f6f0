"""Powers of two and of its square root: log2 and log-sqrt2 (RepQ-ViT, arXiv 2212.08254).

As published, a post-softmax value P with scale s and b bits is

    log2        k = round(-log2(P / s))       P' = s 2^-k
    log-sqrt2   k = round(-2 log2(P / s))     P' = s 2^(-k/2)

for k from 0 to 2^b - 1, *and* zero where k is larger: 2^b + 1 values, which b bits cannot hold. Here zero takes the
last code: ``2^b - 1`` powers, k from 0 to ``2^b - 2``, and zero, which attention needs (without it a row of 197 keys
gains a mass of its own). The paper splits odd and even k of log-sqrt2 into shifts with two scales; a table of levels
``round(255 2^(-k/2))`` needs one product and no shift.

The smallest powers are below half of 1/255 from k = 9 (log2) and k = 18 (log-sqrt2) on: log2 has 10 different levels
at 4 bits and above, log-sqrt2 16 at 4 bits and 17 above.
"""

from __future__ import annotations

from quantizers.codebook import Codebook, check_bits, from_shares


def log2(bits: int) -> Codebook:
    """Return zero and ``2^-k`` for k from 0 to ``2^bits - 2``.

    Raises:
        UsageError: bits outside 2 to 8.
    """
    return _powers("log2", bits, 1.0)


def log_sqrt2(bits: int) -> Codebook:
    """Return zero and ``2^(-k/2)`` for k from 0 to ``2^bits - 2``.

    Raises:
        UsageError: bits outside 2 to 8.
    """
    return _powers("log_sqrt2", bits, 0.5)


def _powers(family: str, bits: int, exponent: float) -> Codebook:
    check_bits(bits)
    return from_shares(family, 0.0, [0.0, *(2.0 ** (-exponent * k) for k in reversed(range((1 << bits) - 1)))])
