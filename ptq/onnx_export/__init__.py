"""INT8 ONNX: a standard QDQ model at opset 20, laid out for a runtime by :mod:`ptq.onnx_export.layout`.

=============================  ==================================================================================
tensor                         in the file
=============================  ==================================================================================
weight                         int8 initializer and DequantizeLinear, one scale for each output channel
bias                           int32 initializer and DequantizeLinear, scale = input scale x weight scale; float32
                               values of the same grid for TensorRT, which has no int32 codes
input of a linear or a conv    QuantizeLinear and DequantizeLinear with the site's parameters, int8
operands of attention          the same, on both inputs of each product
operand with a codebook        uint8 steps of a level, Cast and Gather from a table of 256 levels between the pair
probabilities                  a fixed scale, zero point 0: uint8 and 1/255, or int8 and 1/127
probabilities with a codebook  relative to the largest of their row, then as any other operand; the product is divided
                               by the sum of each row
everything else                float
=============================  ==================================================================================

Only operands of products are quantized. Residual streams, tables and outputs have 16-bit formats, which opset 20
cannot express and which no runtime speeds up; LayerNorm, GELU and softmax are single float operators, so their
inputs gain nothing from a format. Evenly spaced row-relative probabilities of the simulation and of the integer
program become plain ones, which hold little of a row that is spread over hundreds of keys, but around which runtimes
fuse attention. The file is therefore close to the simulation and not equal to it.

Weights of at most 4 bits may be stored as int4, which takes opset 21. Runtimes have kernels for such weights and
float activations only, so the inputs of these layers have no format in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from calibration.calibrated import Calibrated
from ptq.onnx_export.files import write_model
from ptq.onnx_export.layout import DEFAULT_TARGET, get_layout
from ptq.onnx_export.model import build_model
from ptq.onnx_export.products import has_int4_weights
from quantizers.errors import UsageError


def export_onnx(
    calibrated: Calibrated,
    path: Path,
    metadata: Mapping[str, str],
    target: str = DEFAULT_TARGET,
    *,
    int4: bool = False,
    batch_size: int | None = None,
) -> None:
    """Write an INT8 ONNX file; the same arguments write the same bytes.

    Inputs are float32 ``(batch, *shape)`` under the graph's names, outputs likewise. The file is checked, written
    beside its place, then renamed there.

    Args:
        calibrated: a graph whose sites have formats.
        path: the file; its directory is made if absent.
        metadata: texts that the file carries as ``metadata_props``.
        target: a key of :data:`ptq.onnx_export.layout.LAYOUTS`.
        int4: whether weights of at most 4 bits are stored as int4.
        batch_size: the only one that the file takes; any where None.

    Raises:
        UsageError: the path exists, the target is unknown, no weight has at most 4 bits where ``int4`` asks for them,
            or the recipe asks for the published integer forms, which QDQ cannot express.
    """
    layout = get_layout(target)
    if int4 and not has_int4_weights(calibrated):
        raise UsageError(
            f"recipe {calibrated.recipe.name} has no linear whose weights have at most 4 bits (and a multiple of 16 "
            "inputs), which is what int4 stores; quantize with --bits w4a8, or export without int4"
        )
    if calibrated.recipe.nonlinear == "published":
        raise UsageError(
            f"recipe {calibrated.recipe.name} uses the published integer forms of softmax, GELU and LayerNorm, which "
            "a QDQ file cannot compute; export with '--format onnx-integer' or '--format tvm', or quantize with a "
            "method whose forms are corrected, such as minmax"
        )
    write_model(lambda: build_model(calibrated, layout, metadata, int4, batch_size), path)


__all__ = ["export_onnx"]
