"""A directory of quantized weights as the compressed-tensors library names them.

=====================================  ======================================================================
tensor of ``model.safetensors``        what it is
=====================================  ======================================================================
``<module>.weight``                    int8 codes (N, K) of a linear, of any width but 2 and 4 bits
``<module>.weight_packed``, ``_shape`` those of 2 and 4 bits, packed in int32, and the int64 shape (N, K)
``<module>.weight_scale``              float32 (N, 1): real value of a code
``<module>.input_scale``               float32 (1,), where the input has an evenly spaced format
``<module>.input_zero_point``          int8 (1,), where that format is not symmetric
everything else                        float32, named as in the checkpoint: biases, LayerNorm, tables, convolutions
=====================================  ======================================================================

The tensors are those of the quantized graph: rewrites, corrections and roundings of the recipe are in them, and weights
of convolutions, which the library does not compress, hold the values of their codes. Loaded into the model that was
quantized, the dequantized values compute the network with quantized weights and float activations. Parameters that
tracing computed a table from, as the position tables of Swin, are not here and stay the checkpoint's. Scales behind a
layer (LayerScale, BatchNorm) are folded into its weight and bias: ``config.json`` lists these layers under
``vit_ptq.folded``, and the scales have to be set to 1, the shifts to 0. A rewrite can give a bias to a layer that has
none; ``vit_ptq.new_biases`` lists them.

``config.json`` holds ``quantization_config``, with a group of linears for each combination of widths. Formats of
attention, of codebooks and of the residual stream have no place in this layout; the other exports have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch

from calibration.calibrated import Calibrated
from ptq.artifact import refuse_existing, write_directory
from ptq.compressed_tensors.config import config
from ptq.compressed_tensors.tensors import compress


def export_compressed_tensors(
    calibrated: Calibrated, directory: Path, metadata: Mapping[str, str], prefix: str = ""
) -> None:
    """Write ``model.safetensors`` and ``config.json``; the same arguments write the same bytes.

    Args:
        calibrated: a graph whose sites have formats.
        directory: must not exist.
        metadata: texts that ``config.json`` carries under ``vit_ptq``.
        prefix: what stands before all names of the checkpoint, because its model was traced inside of another module.

    Raises:
        UsageError: the directory exists, or layers share a parameter that has two values in the quantized network.
    """
    refuse_existing(directory)
    compressed = compress(calibrated, prefix)
    document = json.dumps(config(compressed, metadata), indent=2, sort_keys=True) + "\n"
    # transformers asks for this entry. Several would be written in an order that differs from run to run.
    weights = safetensors.torch.save(compressed.tensors, {"format": "pt"})
    write_directory(directory, {"model.safetensors": weights, "config.json": document.encode()})


__all__ = ["export_compressed_tensors"]
