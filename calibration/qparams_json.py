"""Number formats as JSON: the parameters of one site, by the name of their format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from calibration.calibrated import QParams
from quantizers.codebook import Codebook, CodebookQParams, uniform_codebook
from quantizers.errors import ArtifactError, UsageError
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.uniform import UniformQParams

_NAMES: dict[type[QParams], str] = {
    CodebookQParams: "codebook",
    RowRelativeQParams: "row_relative",
    ShiftmaxQParams: "shiftmax",
    UniformQParams: "uniform",
}


def format_name(qparams: QParams) -> str:
    """Return the name of a number format as artifacts spell it: one for each kind of parameters."""
    return _NAMES[type(qparams)]


def format_label(qparams: QParams) -> str:
    """Return the name of a number format as people read it: with its codebook, such as ``adalog(q=20)``."""
    if isinstance(qparams, CodebookQParams):
        return qparams.codebook.name
    name = format_name(qparams)
    if isinstance(qparams, RowRelativeQParams) and qparams.codebook.family != "uniform":
        return f"{name} {qparams.codebook.name}"
    return name


def qparams_to_json(qparams: QParams) -> dict[str, Any]:
    """Return parameters as plain numbers, lists and mappings."""
    if isinstance(qparams, RowRelativeQParams) and qparams.codebook.family == "uniform":
        # Its levels are their own codes: the largest says them all, in the bytes of artifacts before codebooks.
        return {"levels": qparams.peak}
    return dataclasses.asdict(qparams)


def qparams_from_json(name: str, values: Mapping[str, Any], where: str) -> QParams:
    """Rebuild the parameters that :func:`qparams_to_json` wrote.

    Args:
        name: of the format.
        values: what was written.
        where: the site, for messages.

    Raises:
        ArtifactError: an unknown format, or values that it cannot have.
        KeyError, TypeError: a missing or unknown entry.
    """
    try:
        if name == "row_relative":
            return RowRelativeQParams(_row_codebook(values))
        if name == "codebook":
            _require_keys(values, {"codebook", "scale", "zero_point"})
            scale = _real(values["scale"], "the scale of a codebook")
            return CodebookQParams(_codebook(values["codebook"]), scale, values["zero_point"])
        if name == "shiftmax":
            return ShiftmaxQParams(**values)
        if name == "uniform":
            return UniformQParams(**{**values, "scale": tuple(values["scale"])})
    except UsageError as error:
        raise ArtifactError(f"site {where}: {error}") from error
    raise ArtifactError(f"site {where}: unknown format {name!r}")


def _row_codebook(values: Mapping[str, Any]) -> Codebook:
    if "levels" not in values:
        _require_keys(values, {"codebook"})
        return _codebook(values["codebook"])
    _require_keys(values, {"levels"})
    peak = values["levels"]
    if type(peak) is not int or peak < 1 or peak & (peak + 1):
        raise UsageError(f"the largest level of a row is {peak!r}, expected 2^bits - 1")
    return uniform_codebook(peak.bit_length())


def _codebook(values: object) -> Codebook:
    if not isinstance(values, dict):
        raise UsageError(f"a codebook is {values!r}, expected family, parameter and levels")
    _require_keys(values, {"family", "parameter", "levels"})
    if not isinstance(values["family"], str) or not isinstance(values["levels"], list):
        raise UsageError("a codebook has a family that is no text, or levels that are no list")
    parameter = _real(values["parameter"], "the parameter of a codebook")
    return Codebook(values["family"], parameter, tuple(values["levels"]))


def _require_keys(values: Mapping[str, Any], expected: set[str]) -> None:
    if set(values) != expected:
        raise UsageError(f"expected the keys {sorted(expected)}, found {sorted(values)}")


def _real(value: object, what: str) -> float:
    if type(value) not in (int, float):
        raise UsageError(f"{what} is {value!r}, expected a number")
    try:
        return float(value)  # type: ignore[arg-type]  # the line above says what it is
    except OverflowError as error:
        raise UsageError(f"{what} is beyond the range of floats") from error
