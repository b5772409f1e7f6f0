"""A directory with ``config.json`` and ``model.safetensors``: this project's own, timm's and transformers' layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ptq.artifact import MANIFEST
from ptq.preprocessing import Preprocessing
from ptq.sources.parts import Parts
from ptq.sources.timm_models import timm_model, timm_preprocessing
from ptq.sources.transformers_models import transformers_model
from ptq.sources.weights import fit_weights, read_weights
from ptq.vision_transformer import VisionTransformer
from quantizers.errors import ModelError, UsageError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_directory(path: Path, extent: tuple[int, int] | None = None) -> Parts:
    """Read the configuration, make the model and load its weights.

    Args:
        path: the directory.
        extent: (height, width) of the input where it is not the configuration's; timm's architectures adapt to it.

    Raises:
        ModelError: no configuration, an unknown layout, or weights that do not fit.
    """
    config = _read_config(path / CONFIG)
    if "model_type" in config:
        return transformers_model(str(path))
    if "architecture" not in config:
        raise ModelError(f"{path / CONFIG}: expected the key architecture (or model_type, for transformers)")
    model_args = dict(config.get("model_args", {}))
    settings = config.get("pretrained_cfg", {})
    names = settings.get("label_names")
    if config["architecture"] == "vision_transformer":
        module, classes = _own_model(path, model_args)
    else:
        if "num_classes" in config:
            model_args.setdefault("num_classes", config["num_classes"])
        module = timm_model(config["architecture"], path / WEIGHTS, model_args, extent)
        classes = int(getattr(module, "num_classes", 0)) or None
        if "input_size" not in settings:
            return Parts(module, timm_preprocessing(module), classes)
    try:
        preprocessing = Preprocessing.from_config(settings)
    except UsageError as error:
        raise ModelError(f"{path / CONFIG}: pretrained_cfg: {error}") from error
    return Parts(module, preprocessing, classes, None if names is None else tuple(names))


def _own_model(path: Path, model_args: dict[str, Any]) -> tuple[nn.Module, int | None]:
    try:
        module = VisionTransformer(**model_args)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path / CONFIG}: model_args: {error}") from error
    fit_weights(module, read_weights(path / WEIGHTS), str(path / WEIGHTS))
    return module, module.head.out_features


def _read_config(path: Path) -> dict[str, Any]:
    if (path.parent / MANIFEST).is_file():
        raise ModelError(f"{path.parent} is quantized already: expected a float model with {CONFIG} and {WEIGHTS}")
    if not path.is_file():
        raise ModelError(f"{path.parent}: expected a {CONFIG} and a {WEIGHTS}; found no {CONFIG}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected keys and values, got {type(document).__name__}")
    return document
