"""A ``.npz`` file: ``images`` and, if there are any, ``labels``.

uint8 images (N, H, W[, C]) are pixels, and the model's preprocessing is applied. float32 images
(N, C, H, W) are network inputs: they are used as they are.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptq.preprocessing import Preprocessing
from quantizers.errors import DataError

Array = npt.NDArray[Any]


def read_npz(path: Path, preprocessing: Preprocessing, resize: bool) -> tuple[Array, Tensor | None]:
    """Read and check ``images`` and ``labels``.

    Args:
        path: the file.
        preprocessing: gives the size and channel count that the model takes.
        resize: accept uint8 images of another height and width; they are resized later.

    Returns:
        Images, uint8 (N, H, W, C) or float32 (N, C, H, W), and int64 labels (N,) or None.

    Raises:
        DataError: the file, its keys, a dtype, a shape or a value is not as described above.
    """
    arrays = _load(path)
    if "images" not in arrays:
        raise DataError(f"{path}: expected an array named 'images' (and 'labels'), found {sorted(arrays) or 'nothing'}")
    images, labels = arrays["images"], arrays.get("labels")
    if len(images.shape) == 0 or len(images) == 0:
        raise DataError(f"{path}: 'images' is empty, shape {images.shape}: it needs at least one image")
    images = _checked_pixels(path, images, preprocessing, resize)
    if labels is None:
        return images, None
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: 'labels' must be whole numbers (N,), got {labels.dtype} {labels.shape}")
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} images but {len(labels)} labels: one label per image is needed")
    return images, torch.from_numpy(labels.astype(np.int64))


def read_pixels(images: Array, indices: list[int], preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Preprocess the images with these indices one by one: float32 (C, H, W)."""
    for index in indices:
        image = images[index]
        yield preprocessing.apply(image) if image.dtype == np.uint8 else torch.from_numpy(image.copy())


def _load(path: Path) -> dict[str, Array]:
    try:
        # Opened here, because numpy leaves a damaged file open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: is a single array, expected a .npz archive with 'images'")
            return {name: archive[name] for name in archive.files if name in ("images", "labels")} or {
                name: np.empty(0) for name in archive.files
            }
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error}): the file is truncated or not a .npz") from error
    except ValueError as error:
        # NumPy raises ValueError both for object arrays and for files that are no archive at all.
        if "allow_pickle" not in str(error):
            raise DataError(f"{path}: cannot be read as .npz ({error})") from error
        raise DataError(
            f"{path}: would need pickle (an array of Python objects, or no .npz file at all), which can run code and "
            "is never loaded: save plain uint8 or float32 arrays with numpy.savez"
        ) from error


def _checked_pixels(path: Path, images: Array, preprocessing: Preprocessing, resize: bool) -> Array:
    channels, height, width = preprocessing.input_size
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        pixels = images[..., None] if images.ndim == 3 else images
        got = (pixels.shape[3], *pixels.shape[1:3])
        if got[0] != channels:
            raise DataError(f"{path}: {_mismatch(got, preprocessing)}: convert the images to {channels} channel(s)")
        if got[1:] != (height, width) and not resize:
            raise DataError(f"{path}: {_mismatch(got, preprocessing)}: pass --resize to resize and crop them")
        return pixels
    if images.dtype == np.float32 and images.ndim == 4:
        if images.shape[1:] != (channels, height, width):
            raise DataError(
                f"{path}: {_mismatch(images.shape[1:], preprocessing)}: float32 images are network inputs "
                "(N,C,H,W) and are used as they are; preprocess them to the model's size"
            )
        finite = np.isfinite(images).reshape(len(images), -1).all(axis=1)
        if not finite.all():
            raise DataError(f"{path}: image {int(np.argmin(finite))} holds NaN or infinity: repair or drop it")
        return images
    raise DataError(
        f"{path}: 'images' must be uint8 (N,H,W) or (N,H,W,C), or float32 (N,C,H,W); got {images.dtype} {images.shape}"
    )


def _mismatch(got: tuple[int, ...], preprocessing: Preprocessing) -> str:
    sizes = ("x".join(map(str, size)) for size in (preprocessing.input_size, got))
    return "expected images of {} (channels x height x width), got {}".format(*sizes)
