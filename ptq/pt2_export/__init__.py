"""A torch.export program with the standard quantize and dequantize operators, for torch.compile.

=============================  ==================================================================================
tensor                         in the program
=============================  ==================================================================================
weight                         int8 buffer and dequantize_per_channel, one scale for each output channel
bias                           float32, in whole steps of input scale x weight scale
input of a linear or a conv    quantize_per_tensor and dequantize_per_tensor with the site's parameters, uint8
operands of attention          the same, on both inputs of each product
operand with a codebook        steps of a level, and an index into a table of 256 levels between the pair
probabilities                  scale 1/255, zero point 0
probabilities with a codebook  relative to the largest of their row, then as any other operand; the product is divided
                               by the sum of each row
scales of heads                divided out before a pair of scale 1, multiplied in after the product
everything else                float32
=============================  ==================================================================================

The pairs stand where :mod:`ptq.onnx_export` puts them, with the same parameters, so the two files differ by roundings
of float operators only; quantize_per_tensor multiplies by the reciprocal of a scale where QuantizeLinear divides. Codes
are uint8, shifted where the site's are int8: all kernels of oneDNN take these. A convolution that cuts patches is a
linear on them. The operators are those that torch.compile matches and that the ``pt2e`` flow of torchao writes;
``torch.ao.quantization.fx._decomposed`` declares them, and has to be imported before a program is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from calibration.calibrated import Calibrated
from ptq.artifact import refuse_existing, write_file
from ptq.pt2_export.program import build_program, program_to_bytes
from quantizers.errors import UsageError


def export_pt2(calibrated: Calibrated, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a torch.export program; the same arguments write the same bytes with the same torch.

    Inputs are float32 ``(batch, *shape)``, outputs likewise; the batch size is free. The file is written beside its
    place, then renamed there.

    Args:
        calibrated: a graph whose sites have formats.
        path: the file; its directory is made if absent.
        metadata: texts that the file carries as ``metadata.json``, one of torch.export's extra files.

    Raises:
        UsageError: the path exists, or the recipe asks for the published integer forms, which float operators between
            quantized operands cannot express.
    """
    if calibrated.recipe.nonlinear == "published":
        raise UsageError(
            f"recipe {calibrated.recipe.name} uses the published integer forms of softmax, GELU and LayerNorm, which "
            "a program of quantized operands cannot compute; export with '--format onnx-integer' or '--format tvm', or "
            "quantize with a method whose forms are corrected, such as minmax"
        )
    refuse_existing(path)
    write_file(path, program_to_bytes(build_program(calibrated), metadata))


__all__ = ["export_pt2"]
