"""INT8 ONNX: a standard QDQ model at opset 20, laid out for the integer kernels of ONNX Runtime.

=============================  ==================================================================================
tensor                         in the file
=============================  ==================================================================================
weight                         int8 initializer and DequantizeLinear, one scale for each output channel
bias                           int32 initializer and DequantizeLinear, scale = input scale x weight scale
input of a linear or a conv    QuantizeLinear and DequantizeLinear with the site's parameters, int8
operands of attention          the same, directly on both inputs of each product, behind transposes
operand with a codebook        uint8 steps of a level, Cast and Gather from a table of 256 levels between the pair
probabilities                  uint8, scale 1/255, zero point 0
probabilities with a codebook  relative to the largest of their row, then as any other operand; the product is divided
                               by the sum of each row
everything else                float
=============================  ==================================================================================

Only operands of products are quantized. Residual streams, tables and outputs have 16-bit formats, which opset 20
cannot express and which no runtime speeds up; LayerNorm, GELU and softmax are single float operators, so their
inputs gain nothing from a format. Evenly spaced row-relative probabilities of the simulation and of the integer
program become plain ones, which hold little of a row that is spread over hundreds of keys, but around which runtimes
fuse attention. The file is therefore close to the simulation and not equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from calibration.calibrated import Calibrated
from ptq.onnx_export.files import write_model
from ptq.onnx_export.model import build_model
from quantizers.errors import UsageError


def export_onnx(calibrated: Calibrated, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an INT8 ONNX file; the same arguments write the same bytes.

    Inputs are float32 ``(batch, *shape)`` under the graph's names, outputs likewise; the batch size is free.
    The file is checked, written beside its place, then renamed there.

    Args:
        calibrated: a graph whose sites have formats.
        path: the file; its directory is made if absent.
        metadata: texts that the file carries as ``metadata_props``.

    Raises:
        UsageError: the path exists, or the recipe asks for the published integer forms, which QDQ cannot express.
    """
    if calibrated.recipe.nonlinear == "published":
        raise UsageError(
            f"recipe {calibrated.recipe.name} uses the published integer forms of softmax, GELU and LayerNorm, which "
            "a QDQ file cannot compute; export with '--format onnx-integer' or '--format tvm', or quantize with a "
            "method whose forms are corrected, such as minmax"
        )
    write_model(lambda: build_model(calibrated, metadata), path)


__all__ = ["export_onnx"]
