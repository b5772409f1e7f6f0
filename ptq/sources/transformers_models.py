"""Image models of transformers, from a directory or the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq.importing import import_extra
from ptq.preprocessing import Preprocessing
from ptq.sources.parts import Parts
from ptq.sources.processor_config import read_processor_config
from ptq.sources.torchvision_shim import define_torchvision_schemas
from quantizers.errors import ModelError

_PROCESSOR = "preprocessor_config.json"
#: The attribute that holds the model of transformers.
WRAPPED = "model"
#: Parts of a backbone that the class token's feature does not pass through; checkpoints often lack them.
_UNUSED_PARTS = ("pooler.",)


def transformers_model(source: str) -> Parts:
    """Load an image model of transformers from a directory or a hub id.

    The module gives logits, or, of a backbone, the class token's feature (the mean over all tokens where there is
    no class token).

    Raises:
        UsageError: transformers is not installed, or the preprocessing holds a wrong value.
        ModelError: nothing there that can be loaded without pickle, or weights that do not fit.
    """
    define_torchvision_schemas()
    import_extra("transformers", "transformers")
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(source)
        classifies = any("ForImageClassification" in name for name in config.architectures or [])
        kind = AutoModelForImageClassification if classifies else AutoModel
        model, report = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        processor = _read_processor(source)
    # from_pretrained raises many unrelated types for a wrong id, a missing file or a missing network.
    except Exception as error:
        message = str(error).splitlines()[0] if str(error) else ""
        raise ModelError(f"hf:{source}: cannot be loaded: {type(error).__name__}: {message}") from error
    _require_complete(source, report)
    extent = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
    size = (int(config.num_channels), int(extent[0]), int(extent[1]))
    preprocessing = Preprocessing.identity(size) if processor is None else read_processor_config(processor, size)
    return Parts(_OneTensor(model, classifies), preprocessing, config.num_labels if classifies else None)


class _OneTensor(nn.Module):
    """A transformers model that returns one tensor: logits, or a feature."""

    def __init__(self, model: nn.Module, classifies: bool) -> None:
        super().__init__()
        self.model = model
        self.classifies = classifies
        self.has_class_token = any(name.endswith("cls_token") for name, _ in model.named_parameters())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to (batch, classes) or (batch, width)."""
        result = self.model(pixel_values=pixel_values)
        if self.classifies:
            logits: Tensor = result.logits
            return logits
        tokens: Tensor = result.last_hidden_state
        return tokens[:, 0] if self.has_class_token else tokens.mean(1)


def _read_processor(source: str) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    path = cached_file(source, _PROCESSOR, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return document


def _require_complete(source: str, report: dict[str, Any]) -> None:
    """Refuse a model with weights that the checkpoint lacks: they would be random."""
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(_UNUSED_PARTS))
    wrong = sorted(str(entry) for entry in report["mismatched_keys"])
    if missing or wrong:
        shown = ", ".join((missing + wrong)[:5])
        raise ModelError(
            f"hf:{source}: the checkpoint does not fit the model: {len(missing)} weights missing, {len(wrong)} of "
            f"another shape: {shown}; check architectures and sizes in config.json"
        )
