"""``config.json``: what compressed-tensors has to know of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq.compressed_tensors.tensors import Compressed, Scheme

#: The version of the library whose layout this is, and with which it is tested.
LIBRARY_VERSION = "0.20.0"
INT_QUANTIZED, PACK_QUANTIZED, MIXED = "int-quantized", "pack-quantized", "mixed-precision"


def config(compressed: Compressed, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the document.

    Args:
        compressed: the tensors, with the scheme of each linear.
        metadata: texts that stand under ``vit_ptq``.
    """
    groups: dict[Scheme, list[str]] = {}
    for module, scheme in compressed.schemes.items():
        groups.setdefault(scheme, []).append(module)
    formats = sorted({_format(scheme) for scheme in groups})
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": formats[0] if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "version": LIBRARY_VERSION,
            "config_groups": {
                f"group_{index}": _group(scheme, modules) for index, (scheme, modules) in enumerate(groups.items())
            },
            "ignore": [],
        },
        "vit_ptq": {**metadata, "folded": list(compressed.folded), "new_biases": list(compressed.new_biases)},
    }


def _group(scheme: Scheme, modules: list[str]) -> dict[str, Any]:
    source = scheme.input_format
    return {
        "targets": modules,
        "format": _format(scheme),
        "weights": _arguments(scheme.bits, "channel", symmetric=True),
        "input_activations": None if source is None else _arguments(source.bits, "tensor", symmetric=source.symmetric),
    }


def _arguments(bits: int, strategy: str, *, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}


def _format(scheme: Scheme) -> str:
    return PACK_QUANTIZED if scheme.packed else INT_QUANTIZED
