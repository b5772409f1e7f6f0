"""Any iterable of images, as single float32 images: the one door of the Python API for data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantizers.errors import DataError

IMAGE_KEYS = ("images", "pixel_values", "image", "x")
LABEL_KEYS = ("labels", "label", "y")


def iterate_images(items: Iterable[Any]) -> Iterator[Tensor]:
    """Yield single images, one by one, from whatever a data loader yields.

    Args:
        items: an iterable of images (C, H, W) or batches (N, C, H, W), already preprocessed: float tensors or
            arrays, tuples or lists whose first element is one, or dicts with one under ``images``,
            ``pixel_values``, ``image`` or ``x`` (or else their first tensor).

    Yields:
        float32 (C, H, W), all of one shape.

    Raises:
        DataError: an item of another kind, integer pixels, NaN or infinity, or another shape than the first
            image's, each with the index of the image.
    """
    for image, _ in iterate_pairs(items):
        yield image


def iterate_pairs(items: Iterable[Any]) -> Iterator[tuple[Tensor, int | None]]:
    """Like :func:`iterate_images`, with the label of each image or None.

    Raises:
        DataError: as above; or a batch with another number of labels than images.
    """
    index = 0
    expected: torch.Size | None = None
    for item in items:
        images, labels = _split(item, index)
        batch = images if images.ndim == 4 else images[None]
        targets = [None] * len(batch) if labels is None else labels.reshape(-1).tolist()
        if len(targets) != len(batch):
            raise DataError(f"image {index}: a batch of {len(batch)} images came with {len(targets)} labels")
        for image, target in zip(batch, targets, strict=True):
            expected = expected or image.shape
            yield _checked(image, index, expected), target
            index += 1


def _split(item: Any, index: int) -> tuple[Tensor, Tensor | None]:
    """Images and labels of one item."""
    labels: Any = None
    if isinstance(item, Mapping):
        images = next((item[key] for key in IMAGE_KEYS if key in item), None)
        if images is None:
            images = next((v for v in item.values() if isinstance(v, Tensor | np.ndarray)), None)
        labels = next((item[key] for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, tuple | list):
        images = item[0] if item else None
        labels = item[1] if len(item) > 1 else None
    else:
        images = item
    if isinstance(images, np.ndarray) and images.dtype != np.object_:
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor) or images.ndim not in (3, 4):
        got = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(item).__name__
        raise DataError(
            f"image {index}: expected a tensor (C,H,W) or (N,C,H,W), a tuple that starts with one, or a dict with "
            f"one of the keys {', '.join(IMAGE_KEYS)}; got {got}"
        )
    if labels is None:
        return images, None
    return images, _as_labels(labels, index)


def _as_labels(labels: Any, index: int) -> Tensor | None:
    """Whole-number labels as int64, or None where the second element is something else (a name, a mask)."""
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
    if numbers.is_floating_point() or numbers.is_complex():
        raise DataError(f"image {index}: labels must be whole numbers, got {numbers.dtype}")
    return numbers.to(torch.int64)


def _checked(image: Tensor, index: int, expected: torch.Size) -> Tensor:
    if not image.is_floating_point():
        raise DataError(
            f"image {index}: expected preprocessed floating-point pixels, got {image.dtype}: "
            "scale and normalize the images as the model's preprocessing says"
        )
    if image.shape != expected:
        raise DataError(
            f"image {index}: shape {tuple(image.shape)}, the first image has {tuple(expected)}: "
            "bring all images to one size and channel count"
        )
    single = image.detach().to(device="cpu", dtype=torch.float32)
    if not bool(torch.isfinite(single).all()):
        raise DataError(f"image {index}: holds NaN or infinity: check how the images are read and normalized")
    return single
