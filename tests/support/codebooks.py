"""Calibrated models whose operands have codebooks, before any recipe asks for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from calibration.calibrated import Calibrated, QParams
from quantizers.codebook import Codebook, CodebookQParams, codebook_qparams
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams

#: No GELU, tanh or sigmoid approximation of it is lower.
GELU_LOW = -0.17


def with_codebooks(result: Calibrated, codebooks: Mapping[str, Codebook], low: float | None = None) -> Calibrated:
    """Return a calibrated model with other formats.

    Args:
        result: with formats of one scale each.
        codebooks: kind of a site, or regular expression that its whole name matches, to its levels.
        low: lowest value of the sites; by default that of the site's format.
    """
    sites = list(result.sites)
    for index, entry in enumerate(sites):
        for key, codebook in codebooks.items():
            if key == entry.site.kind or re.fullmatch(key, entry.site.name):
                sites[index] = replace(entry, qparams=_qparams(entry.qparams, codebook, low))
    assert sites != list(result.sites), "no site has this name or kind"
    return replace(result, sites=tuple(sites))


def _qparams(qparams: QParams, codebook: Codebook, low: float | None) -> QParams:
    if isinstance(qparams, RowRelativeQParams):
        return RowRelativeQParams(codebook)
    if isinstance(qparams, CodebookQParams):
        ends, scale = (qparams.codebook.levels[0], qparams.codebook.levels[-1]), qparams.scale
    else:
        assert isinstance(qparams, UniformQParams)
        ends, scale = (qparams.qmin, qparams.qmax), qparams.scale[0]
    lowest, highest = ((end - qparams.zero_point) * scale for end in ends)
    return codebook_qparams(lowest if low is None else low, highest, codebook)
