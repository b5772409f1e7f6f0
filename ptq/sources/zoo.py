"""Models of timm and of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq.importing import import_extra
from ptq.preprocessing import Preprocessing
from ptq.sources.torchvision_shim import define_torchvision_schemas
from ptq.sources.weights import fit_weights, read_weights
from quantizers.errors import ModelError, UsageError


def timm_model(name: str, checkpoint: Path | None, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Make a timm model; without a checkpoint its pre-trained weights come from the hub.

    Raises:
        UsageError: timm is not installed, or has no model of that name.
        ModelError: the hub cannot be reached, or the checkpoint does not fit.
    """
    _import_timm()
    import timm

    if not timm.is_model(name.rsplit("/", maxsplit=1)[-1]) and not name.startswith("hf-hub:"):
        close = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise UsageError(f"timm has no model {name!r}; names like it: {', '.join(close) or 'none'}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=checkpoint is None, **(model_args or {}))
    # The hub client raises its own, changing, types for a missing network or entry.
    except Exception as error:
        raise ModelError(
            f"timm:{name}: cannot be made: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; "
            f"without a network, give the weights: timm:{name}@weights.safetensors"
        ) from error
    if checkpoint is not None:
        fit_weights(model, read_weights(checkpoint), checkpoint.name)
    return model


def timm_preprocessing(model: nn.Module) -> Preprocessing:
    """Return the preprocessing of a timm model's own configuration."""
    _import_timm()
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    config["crop_mode"] = config.get("crop_mode") if config.get("crop_mode") in ("center", "squash") else "center"
    return Preprocessing.from_config(config)


def transformers_model(source: str) -> tuple[nn.Module, Preprocessing, int | None]:
    """Load an image model of transformers from a directory or a hub id.

    Raises:
        UsageError: transformers is not installed.
        ModelError: nothing there that can be loaded without pickle.
    """
    define_torchvision_schemas()
    import_extra("transformers", "transformers")
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(source)
        classifies = any("ForImageClassification" in name for name in config.architectures or [])
        kind = AutoModelForImageClassification if classifies else AutoModel
        model = kind.from_pretrained(source, use_safetensors=True)
    # from_pretrained raises many unrelated types for a wrong id, a missing file or a missing network.
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        raise ModelError(f"hf:{source}: cannot be loaded: {type(error).__name__}: {message}") from error
    size = config.image_size
    extent = (size, size) if isinstance(size, int) else tuple(size)
    preprocessing = _processor(Path(source), (getattr(config, "num_channels", 3), *extent))
    return _Features(model, classifies), preprocessing, config.num_labels if classifies else None


class _Features(nn.Module):
    """A transformers model that returns one tensor: logits, or the class token's feature."""

    def __init__(self, model: nn.Module, classifies: bool) -> None:
        super().__init__()
        self.model = model
        self.classifies = classifies

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to (batch, classes) or (batch, width)."""
        result = self.model(pixel_values=pixel_values)
        features: Tensor = result.logits if self.classifies else result.last_hidden_state[:, 0]
        return features


def _processor(directory: Path, input_size: tuple[int, int, int]) -> Preprocessing:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing.identity(input_size)
    config = json.loads(path.read_text(encoding="utf-8"))
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    return Preprocessing.from_config(
        {
            "input_size": input_size,
            "mean": config.get("image_mean"),
            "std": config.get("image_std"),
            "interpolation": names.get(config.get("resample"), "bilinear"),
            "crop_mode": "center" if config.get("do_center_crop") else "squash",
        }
    )


def _import_timm() -> None:
    define_torchvision_schemas()
    import_extra("timm", "timm")
