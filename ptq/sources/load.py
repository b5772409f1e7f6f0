"""load_model: the MODEL argument, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.importing import import_callable, is_callable_spec
from ptq.preprocessing import Preprocessing
from ptq.sources.directory import load_directory
from ptq.sources.loaded import LoadedModel
from ptq.sources.weights import PICKLED, hash_weights, read_weights, require_finite
from ptq.sources.zoo import timm_model, timm_preprocessing, transformers_model
from quantizers.errors import ModelError, UsageError

KINDS = (
    "timm:NAME, timm:NAME@weights.safetensors, hf:DIRECTORY_OR_ID, an exported program (.pt2), "
    "package.module:factory, or a directory with config.json and model.safetensors"
)


@dataclass(frozen=True, eq=False)
class _Parts:
    module: nn.Module
    preprocessing: Preprocessing
    num_classes: int | None = None
    label_names: tuple[str, ...] | None = None
    example: Tensor | None = None


def load_model(spec: str, overrides: Mapping[str, Any] | None = None) -> LoadedModel:
    """Load a model.

    Args:
        spec: one of :data:`KINDS`.
        overrides: fields of :class:`ptq.Preprocessing` to replace; None values are ignored.

    Raises:
        UsageError: not a known kind, an unknown name, or an extra that is not installed.
        ModelError: the model cannot be loaded, or holds NaN or infinity.
    """
    parts = _parts(spec)
    module = parts.module.eval().requires_grad_(False)
    require_finite(module)
    preprocessing = parts.preprocessing.override(**dict(overrides or {}))
    example = parts.example if parts.example is not None else torch.zeros(2, *preprocessing.input_size)
    return LoadedModel(
        module=module,
        example_inputs=(example,),
        preprocessing=preprocessing,
        source=_public(spec),
        weights_sha256=hash_weights(module),
        num_classes=parts.num_classes,
        label_names=parts.label_names,
    )


def _parts(spec: str) -> _Parts:
    path = Path(spec)
    if spec.startswith("timm:"):
        name, _, checkpoint = spec.removeprefix("timm:").partition("@")
        module = timm_model(name, Path(checkpoint) if checkpoint else None)
        return _Parts(module, timm_preprocessing(module), int(getattr(module, "num_classes", 0)) or None)
    if spec.startswith("hf:"):
        module, preprocessing, classes = transformers_model(spec.removeprefix("hf:"))
        return _Parts(module, preprocessing, classes)
    if path.suffix == ".pt2":
        return _exported(path)
    if path.suffix in PICKLED:
        read_weights(path)
    if path.is_dir():
        module, preprocessing, classes, names = load_directory(path)
        return _Parts(module, preprocessing, classes, names)
    if is_callable_spec(spec):
        return _made(spec)
    if path.exists():
        raise ModelError(f"{spec}: expected {KINDS}")
    raise ModelError(f"no such model: {spec}; expected {KINDS}")


def _exported(path: Path) -> _Parts:
    """Read an exported program with torch.export.load; its example inputs give the input size."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        program = torch.export.load(path)
        arguments = program.example_inputs[0] if program.example_inputs else ()
    # A damaged archive surfaces as one of several unrelated types.
    except Exception as error:
        raise ModelError(f"{path}: not a readable exported program: {type(error).__name__}: {error}") from error
    if len(arguments) != 1 or not isinstance(arguments[0], Tensor) or arguments[0].ndim != 4:
        raise ModelError(f"{path}: expected a program with one example input (batch, channels, height, width)")
    return _Parts(_InEval(program.module()), Preprocessing.identity(_size(arguments[0])))


class _InEval(nn.Module):
    """An exported module cannot change its mode; it was exported in the one it has."""

    def __init__(self, exported: nn.Module) -> None:
        super().__init__()
        self.exported = exported

    def train(self, mode: bool = True) -> _InEval:
        """Keep the mode of the export."""
        del mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Run the program."""
        result: Tensor = self.exported(images)
        return result


def _made(spec: str) -> _Parts:
    made = import_callable(spec, ModelError)()
    wanted = f"{spec}: expected (module, example input, preprocessing)"
    if not isinstance(made, tuple) or len(made) != 3:
        raise ModelError(f"{wanted}, got {type(made).__name__}")
    module, example, settings = made
    if isinstance(example, tuple) and len(example) == 1:
        example = example[0]
    if not isinstance(module, nn.Module) or not isinstance(example, Tensor) or example.ndim != 4:
        raise ModelError(f"{wanted} with an input (batch, channels, height, width)")
    if settings is None:
        preprocessing = Preprocessing.identity(_size(example))
    elif isinstance(settings, Preprocessing):
        preprocessing = settings
    elif isinstance(settings, dict):
        try:
            preprocessing = Preprocessing.from_config({"input_size": _size(example), **settings})
        except UsageError as error:
            raise ModelError(f"{spec}: preprocessing: {error}") from error
    else:
        raise ModelError(f"{wanted}, the last being a dict, a ptq.Preprocessing or None, got {type(settings).__name__}")
    return _Parts(module, preprocessing, example=example)


def _size(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = list(images.shape)[1:]
    return channels, height, width


def _public(spec: str) -> str:
    """Return the argument without the directories of whoever ran the command."""
    prefix, separator, checkpoint = spec.partition("@")
    if spec.startswith("timm:"):
        return f"{prefix}{separator}{Path(checkpoint).name}" if separator else spec
    if spec.startswith("hf:"):
        path = Path(spec.removeprefix("hf:"))
        return f"hf:{path.resolve().name}" if path.exists() else spec
    return Path(spec).resolve().name if Path(spec).exists() else spec
