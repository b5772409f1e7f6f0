"""A folder of image files; class sub-folders, sorted by name, are the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ptq.preprocessing import PILLOW_MISSING, Preprocessing
from quantizers.errors import DataError, UsageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def list_images(folder: Path, label_names: Sequence[str] | None) -> tuple[list[Path], Tensor | None]:
    """Find the image files of a folder, in a fixed order.

    Args:
        folder: images directly in it (no labels), or one sub-folder per class.
        label_names: the model's class names. When every sub-folder is named after one, the label is the
            index of that name, so that a folder with some of the classes works too.

    Returns:
        The files, and int64 labels (N,) or None.

    Raises:
        DataError: no image, or images both in the folder and in its sub-folders.
    """
    flat = _images_in(folder.iterdir())
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    nested = [(index, path) for index, entry in enumerate(classes) for path in _images_in(entry.rglob("*"))]
    if flat and nested:
        raise DataError(
            f"{folder}: holds images both directly ({flat[0].name}, ...) and in sub-folders ({classes[0].name}, ...): "
            "use either a flat folder (no labels) or one sub-folder per class"
        )
    if not flat and not nested:
        raise DataError(f"{folder}: no image in it: expected files ending in {', '.join(SUFFIXES)}")
    if flat:
        return flat, None
    names = {name: index for index, name in enumerate(label_names or ())}
    known = all(entry.name in names for entry in classes)
    labels = [names[classes[index].name] if known else index for index, _ in nested]
    return [path for _, path in nested], torch.tensor(labels, dtype=torch.int64)


def read_files(files: Sequence[Path], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Decode and preprocess files one by one: float32 (C, H, W).

    Raises:
        DataError: a file cannot be read as an image.
        UsageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(PILLOW_MISSING) from None
    for path in files:
        try:
            with Image.open(path) as image:
                image.load()
                yield preprocessing.apply(image)
        # Pillow's decoders raise SyntaxError and ValueError for broken files, besides OSError.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}): remove or replace the file") from error


def _images_in(entries: Iterator[Path]) -> list[Path]:
    return sorted(
        path for path in entries if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
