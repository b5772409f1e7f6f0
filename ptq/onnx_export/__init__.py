"""INT8 ONNX: a standard QDQ model at opset 20, laid out for the integer kernels of ONNX Runtime.

=============================  ==================================================================================
tensor                         in the file
=============================  ==================================================================================
weight                         int8 initializer and DequantizeLinear, one scale for each output channel
bias                           int32 initializer and DequantizeLinear, scale = input scale x weight scale
input of a linear or a conv    QuantizeLinear and DequantizeLinear with the site's parameters, int8
operands of attention          the same, directly on both inputs of each product, behind transposes
probabilities                  uint8, scale 1/255, zero point 0
everything else                float
=============================  ==================================================================================

Only operands of products are quantized. Residual streams, tables and outputs have 16-bit formats, which opset 20
cannot express and which no runtime speeds up; LayerNorm, GELU and softmax are single float operators, so their
inputs gain nothing from a format. The row-relative probabilities of the simulation and of the integer program
become plain ones, which hold little of a row that is spread over hundreds of keys. The file is therefore close
to the simulation and not equal to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx

from calibration.calibrated import Calibrated, QParams
from ptq.artifact import refuse_existing
from ptq.onnx_export.model import build_model
from quantizers.codebook import CodebookQParams
from quantizers.errors import UsageError
from quantizers.row_relative import RowRelativeQParams


def export_onnx(calibrated: Calibrated, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an INT8 ONNX file; the same arguments write the same bytes.

    Inputs are float32 ``(batch, *shape)`` under the graph's names, outputs likewise; the batch size is free.
    The file is checked, written beside its place, then renamed there.

    Args:
        calibrated: a graph whose sites have formats.
        path: the file; its directory is made if absent.
        metadata: texts that the file carries as ``metadata_props``.

    Raises:
        UsageError: the path exists, or the recipe asks for the published integer forms or for levels that are not
            evenly spaced, which ONNX cannot express.
    """
    if calibrated.recipe.nonlinear == "published":
        raise UsageError(
            f"recipe {calibrated.recipe.name} uses the published integer forms of softmax, GELU and LayerNorm, which "
            "ONNX operators cannot compute; export with '--format tvm', or quantize with a method whose forms are "
            "corrected, such as minmax"
        )
    uneven = [entry.site.name for entry in calibrated.sites if _has_codebook(entry.qparams)]
    if uneven:
        raise UsageError(
            f"{len(uneven)} sites have levels that are not evenly spaced, which QuantizeLinear cannot express: "
            f"{', '.join(uneven)}; export with '--format tvm', or quantize them with uniform levels"
        )
    refuse_existing(path)
    model = build_model(calibrated, metadata)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _has_codebook(qparams: QParams) -> bool:
    if isinstance(qparams, RowRelativeQParams):
        return qparams.codebook.family != "uniform"
    return isinstance(qparams, CodebookQParams)


__all__ = ["export_onnx"]
