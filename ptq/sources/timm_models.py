"""Models of timm: made by name, with weights of the hub or of a safetensors file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq.importing import import_extra
from ptq.preprocessing import Preprocessing
from ptq.sources.torchvision_shim import define_torchvision_schemas
from ptq.sources.weights import fit_weights, read_weights
from quantizers.errors import ModelError, UsageError


def timm_model(
    name: str,
    checkpoint: Path | None,
    model_args: Mapping[str, Any] | None = None,
    extent: tuple[int, int] | None = None,
) -> nn.Module:
    """Make a timm model; without a checkpoint its pre-trained weights come from the hub.

    Args:
        name: timm's name of the model.
        checkpoint: safetensors file. A classifier of another width than the name's own is taken from it.
        model_args: more arguments of ``timm.create_model``.
        extent: (height, width) of the input, where it is not the name's own; position embeddings are resampled.

    Raises:
        UsageError: timm is not installed, or has no model of that name.
        ModelError: the hub cannot be reached, or the checkpoint does not fit.
    """
    _import_timm()
    import timm

    if not timm.is_model(name.rsplit("/", maxsplit=1)[-1]) and not name.startswith("hf-hub:"):
        close = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise UsageError(f"timm has no model {name!r}; names like it: {', '.join(close) or 'none'}")
    weights = None if checkpoint is None else read_weights(checkpoint)
    arguments = {**_implied_by(weights, name), **(model_args or {})}
    if extent is not None:
        arguments["img_size"] = extent
    try:
        model = _create(name, pretrained=weights is None, arguments=arguments)
    # The hub client raises its own, changing, types for a missing network or entry.
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        advice = (
            "" if weights is not None else f"; without a network, give the weights: timm:{name}@weights.safetensors"
        )
        raise ModelError(f"timm:{name}: cannot be made: {type(error).__name__}: {message}{advice}") from error
    if weights is not None and checkpoint is not None:
        fit_weights(model, _resampled(model, weights) if extent is not None else weights, checkpoint.name)
    return model


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """Return the preprocessing of a timm model's own configuration."""
    _import_timm()
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    config["crop_mode"] = config.get("crop_mode") if config.get("crop_mode") in ("center", "squash") else "center"
    return Preprocessing.from_config(config)


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        # Networks without position embeddings take images of any size, and have no argument for it.
        if "img_size" not in str(error):
            raise
        rest = {key: value for key, value in arguments.items() if key != "img_size"}
        model = timm.create_model(name, pretrained=pretrained, **rest)
    return model


def _implied_by(weights: Mapping[str, Tensor] | None, name: str) -> dict[str, int]:
    """The number of classes of a fine-tuned checkpoint; a checkpoint without a classifier implies nothing."""
    import timm

    settings = timm.get_pretrained_cfg(name)
    classifier = settings.classifier if settings is not None else None
    if weights is None or not isinstance(classifier, str) or f"{classifier}.weight" not in weights:
        return {}
    return {"num_classes": weights[f"{classifier}.weight"].shape[0]}


def _resampled(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit position embeddings to another input size with the function that timm's own loading uses."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return weights if fit is None else dict(fit(dict(weights), model))


def _import_timm() -> None:
    define_torchvision_schemas()
    import_extra("timm", "timm")
