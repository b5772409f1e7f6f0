"""A directory with ``config.json`` and ``model.safetensors``: this project's own, timm's and transformers' layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ptq.preprocessing import Preprocessing
from ptq.sources.weights import fit_weights, read_weights
from ptq.sources.zoo import timm_model, timm_preprocessing, transformers_model
from ptq.vision_transformer import VisionTransformer
from quantizers.errors import ModelError, UsageError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_directory(path: Path) -> tuple[nn.Module, Preprocessing, int | None, tuple[str, ...] | None]:
    """Return module, preprocessing, number of classes and class names.

    Raises:
        ModelError: no configuration, an unknown layout, or weights that do not fit.
    """
    config = _read_config(path / CONFIG)
    if "model_type" in config:
        module, preprocessing, classes = transformers_model(str(path))
        return module, preprocessing, classes, None
    if "architecture" not in config:
        raise ModelError(f"{path / CONFIG}: expected the key architecture (or model_type, for transformers)")
    model_args = dict(config.get("model_args", {}))
    settings = config.get("pretrained_cfg", {})
    names = settings.get("label_names")
    if config["architecture"] == "vision_transformer":
        try:
            module = VisionTransformer(**model_args)
        except TypeError as error:
            raise ModelError(f"{path / CONFIG}: model_args: {error}") from error
        fit_weights(module, read_weights(path / WEIGHTS), str(path / WEIGHTS))
        classes = int(module.head.out_features)
    else:
        if "num_classes" in config:
            model_args.setdefault("num_classes", config["num_classes"])
        module = timm_model(config["architecture"], path / WEIGHTS, model_args)
        classes = int(getattr(module, "num_classes", 0)) or None
        if "input_size" not in settings:
            return module, timm_preprocessing(module), classes, None
    try:
        preprocessing = Preprocessing.from_config(settings)
    except UsageError as error:
        raise ModelError(f"{path / CONFIG}: pretrained_cfg: {error}") from error
    return module, preprocessing, classes, None if names is None else tuple(names)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path.parent}: expected a {CONFIG} and a {WEIGHTS}; found no {CONFIG}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected keys and values, got {type(document).__name__}")
    return document
