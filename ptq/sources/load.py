"""load_model: the MODEL argument, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.importing import is_callable_spec
from ptq.preprocessing import full_size
from ptq.sources.directory import load_directory
from ptq.sources.exported import load_exported
from ptq.sources.factory import load_made
from ptq.sources.loaded import LoadedModel
from ptq.sources.parts import Parts
from ptq.sources.timm_models import timm_model, timm_preprocessing
from ptq.sources.transformers_models import transformers_model
from ptq.sources.weights import PICKLED, hash_weights, read_weights, require_finite
from quantizers.errors import ModelError

KINDS = (
    "timm:NAME, timm:NAME@weights.safetensors, hf:DIRECTORY_OR_ID, an exported program (.pt2), "
    "package.module:factory, or a directory with config.json and model.safetensors"
)


def load_model(spec: str, overrides: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load a model.

    Args:
        spec: one of :data:`KINDS`.
        overrides: fields of :class:`ptq.Preprocessing` to replace; None values are ignored.

    Raises:
        UsageError: an unknown name, a wrong override, or an extra that is not installed.
        ModelError: the model cannot be loaded, does not run on its input size, or holds NaN or infinity.
    """
    given = dict(overrides or {})
    size = given.get("input_size")
    parts = _parts(spec, None if size is None else full_size(size, 1)[1:])
    module = parts.module.eval().requires_grad_(False)
    require_finite(module)
    preprocessing = parts.preprocessing.override(**given)
    example = torch.zeros(2, *preprocessing.input_size)
    if parts.example is not None and tuple(parts.example.shape[1:]) == preprocessing.input_size:
        example = parts.example.detach().to(torch.float32)
    width = _output_width(module, example, spec)
    return LoadedModel(
        module=module,
        example_inputs=(example,),
        preprocessing=preprocessing,
        source=_public(spec),
        weights_sha256=hash_weights(module),
        num_classes=width if parts.measure_classes else parts.num_classes,
        label_names=parts.label_names,
    )


def _parts(spec: str, extent: tuple[int, int] | None) -> Parts:
    path = Path(spec)
    if spec.startswith("timm:"):
        name, _, checkpoint = spec.removeprefix("timm:").partition("@")
        module = timm_model(name, Path(checkpoint) if checkpoint else None, extent=extent)
        return Parts(module, timm_preprocessing(module), int(getattr(module, "num_classes", 0)) or None)
    if spec.startswith("hf:"):
        return transformers_model(spec.removeprefix("hf:"))
    if path.suffix == ".pt2":
        return load_exported(path)
    if path.suffix in PICKLED:
        read_weights(path)
    if path.is_dir():
        return load_directory(path, extent)
    if is_callable_spec(spec):
        return load_made(spec)
    if path.exists():
        raise ModelError(f"{spec}: expected {KINDS}")
    raise ModelError(f"no such model: {spec}; expected {KINDS}")


@torch.no_grad()
def _output_width(module: nn.Module, example: Tensor, spec: str) -> int | None:
    """Run the model once; return the width of logits (batch, width), None for other outputs."""
    try:
        output = module(example)
    # The user's module may raise anything; a wrong input size surfaces in many types.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{spec}: does not run on images of {tuple(example.shape[1:])} (channels, height, width): "
            f"{type(error).__name__}: {reason}; check --input-size, or the example input"
        ) from error
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def _public(spec: str) -> str:
    """Return the argument without the directories of whoever ran the command."""
    prefix, separator, checkpoint = spec.partition("@")
    if spec.startswith("timm:"):
        return f"{prefix}{separator}{Path(checkpoint).name}" if separator else spec
    if spec.startswith("hf:"):
        path = Path(spec.removeprefix("hf:"))
        return f"hf:{path.resolve().name}" if path.exists() else spec
    return Path(spec).resolve().name if Path(spec).exists() else spec
