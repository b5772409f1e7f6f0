"""Number formats in artifacts: they come back equal, and what no format can have is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support.models import calibrated

from calibration.calibrated import QParams
from calibration.qparams_json import format_label, format_name, qparams_from_json, qparams_to_json
from calibration.serialize import calibrated_from_bytes, calibrated_to_bytes
from quantizers.adalog import adalog
from quantizers.codebook import CodebookQParams, uniform_codebook
from quantizers.errors import ArtifactError
from quantizers.families import FAMILIES, candidates
from quantizers.logarithm import log_sqrt2
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.sulq import sulq
from quantizers.tangent import tangent
from quantizers.uniform import UniformQParams

CODEBOOKS = [candidates(family, bits)[-1] for family in FAMILIES for bits in (2, 8)]
OTHERS = [tangent(4, 1.2, "T1"), tangent(4, 1.2, "T3"), sulq(4, 0.01, powers_of_two=True)]
LOG2 = {"family": "log2", "parameter": 0.0, "levels": [0, 64, 128, 255]}


@pytest.mark.parametrize(
    "qparams",
    [
        *(RowRelativeQParams(codebook) for codebook in (*CODEBOOKS, *OTHERS)),
        *(CodebookQParams(codebook, 2.0**-7, 17) for codebook in (*CODEBOOKS, *OTHERS)),
        *(ShiftmaxQParams(16), UniformQParams((0.5, 0.25), 0, -7, 7)),
    ],
)
def test_formats_come_back_equal(qparams: QParams) -> None:
    text = json.dumps(qparams_to_json(qparams))
    assert qparams_from_json(format_name(qparams), json.loads(text), "here") == qparams


@pytest.mark.parametrize(
    ("qparams", "name", "label"),
    [
        (UniformQParams((0.5,), 0, -8, 7), "uniform", "uniform"),
        (ShiftmaxQParams(16), "shiftmax", "shiftmax"),
        (RowRelativeQParams(uniform_codebook(8)), "row_relative", "row_relative"),
        (RowRelativeQParams(log_sqrt2(4)), "row_relative", "row_relative log_sqrt2"),
        (CodebookQParams(adalog(4, 20), 0.5, 0), "codebook", "adalog(q=20)"),
        (CodebookQParams(uniform_codebook(4), 0.5, 0), "codebook", "uniform"),
    ],
)
def test_people_read_the_codebook_and_files_the_kind(qparams: QParams, name: str, label: str) -> None:
    assert format_name(qparams) == name
    assert format_label(qparams) == label


def test_even_rows_keep_their_old_form() -> None:
    """Artifacts of before codebooks are read, and written again with the same bytes."""
    assert qparams_to_json(RowRelativeQParams(uniform_codebook(8))) == {"levels": 255}
    assert qparams_from_json("row_relative", {"levels": 15}, "here") == RowRelativeQParams(uniform_codebook(4))


@pytest.mark.parametrize("codebook", CODEBOOKS[1::2])
def test_an_artifact_keeps_codebooks(codebook: Any) -> None:
    """In a whole model, next to uniform formats; the same bytes again."""
    result = calibrated("ours")
    formats = {"probability": RowRelativeQParams(codebook), "value": CodebookQParams(codebook, 0.5, 128)}
    sites = tuple(replace(e, qparams=formats.get(e.site.kind, e.qparams)) for e in result.sites)
    written = calibrated_to_bytes(replace(result, sites=sites))
    again = calibrated_from_bytes(*written)
    assert again.sites == sites
    assert calibrated_to_bytes(again) == written


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("nf4", {}, "unknown format 'nf4'"),
        ("row_relative", {"levels": 14}, r"the largest level of a row is 14, expected 2\^bits - 1"),
        ("row_relative", {"levels": 1}, "a codebook has 2 to 8 bits, got 1"),
        ("row_relative", {"levels": 511}, "a codebook has 2 to 8 bits, got 9"),
        ("row_relative", {"levels": True}, "the largest level of a row is True"),
        ("row_relative", {"levels": 255.0}, "the largest level of a row is 255.0"),
        ("row_relative", {"levels": 255, "bits": 8}, r"expected the keys \['levels'\], found \['bits', 'levels'\]"),
        ("row_relative", {}, r"expected the keys \['codebook'\], found \[\]"),
        ("row_relative", {"codebook": [0, 1]}, r"a codebook is \[0, 1\], expected family, parameter and levels"),
        ("row_relative", {"codebook": {**LOG2, "levels": [0, 255]}}, "codebook log2 has 2 levels"),
        ("row_relative", {"codebook": {**LOG2, "levels": [0, 64.0, 128, 255]}}, "has the level 64.0"),
        ("row_relative", {"codebook": {**LOG2, "levels": "0123"}}, "levels that are no list"),
        ("row_relative", {"codebook": {**LOG2, "family": ["log2"]}}, "a family that is no text"),
        ("row_relative", {"codebook": {**LOG2, "family": "log3"}}, "codebook family is 'log3'"),
        (
            "row_relative",
            {"codebook": {**LOG2, "parameter": "0"}},
            "the parameter of a codebook is '0', expected a number",
        ),
        ("row_relative", {"codebook": {**LOG2, "parameter": 10**400}}, "parameter of a codebook is beyond the range"),
        ("row_relative", {"codebook": {**LOG2, "bits": 2}}, r"expected the keys \['family', 'levels', 'parameter'\]"),
        ("codebook", {"codebook": LOG2, "scale": 1.0}, r"expected the keys \['codebook', 'scale', 'zero_point'\]"),
        (
            "codebook",
            {"codebook": LOG2, "scale": 0.1, "zero_point": 0},
            "scale of a codebook is 0.1, expected a positive",
        ),
        ("codebook", {"codebook": LOG2, "scale": True, "zero_point": 0}, "scale of a codebook is True"),
        ("codebook", {"codebook": LOG2, "scale": [1.0], "zero_point": 0}, r"scale of a codebook is \[1.0\]"),
        ("codebook", {"codebook": LOG2, "scale": 1.0, "zero_point": 256}, "zero point of a codebook is 256"),
        ("shiftmax", {"bits": 9}, "published probabilities have 8 or 16 bits, got 9"),
    ],
)
def test_what_no_format_has_is_refused(name: str, values: dict[str, Any], message: str) -> None:
    """As a fault of the artifact, with the site."""
    with pytest.raises(ArtifactError, match=f"site here: .*{message}"):
        qparams_from_json(name, values, "here")
