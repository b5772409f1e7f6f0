"""``preprocessor_config.json`` of transformers as a :class:`ptq.Preprocessing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq.preprocessing import Preprocessing

#: Pillow's numbers, which the files hold.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_processor_config(config: Mapping[str, Any], input_size: tuple[int, int, int]) -> Preprocessing:
    """Translate an image processor's settings.

    Args:
        config: the document.
        input_size: (channels, height, width) of the model's configuration, where the document gives no size.

    Raises:
        UsageError: a value is wrong.
    """
    resized, cropped = _extent(config.get("size")), _extent(config.get("crop_size"))
    crops = bool(config.get("do_center_crop")) and cropped is not None
    height, width = (cropped if crops else resized) or input_size[1:]
    keeps_ratio = crops or _is_shortest_edge(config.get("size"))
    crop_pct = config.get("crop_pct")
    if crops and resized is not None:
        crop_pct = min(height / resized[0], 1.0)
    normalizes = config.get("do_normalize", True)
    return Preprocessing.from_config(
        {
            "input_size": (input_size[0], height, width),
            "mean": config.get("image_mean") if normalizes else None,
            "std": config.get("image_std") if normalizes else None,
            "interpolation": _INTERPOLATIONS.get(config.get("resample", 2), "bilinear"),
            "crop_pct": crop_pct if keeps_ratio else None,
            "crop_mode": "center" if keeps_ratio else "squash",
        }
    )


def _extent(size: Any) -> tuple[int, int] | None:
    """Height and width of ``224``, ``{"height": .., "width": ..}`` or ``{"shortest_edge": ..}``."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _is_shortest_edge(size: Any) -> bool:
    return isinstance(size, Mapping) and "shortest_edge" in size
