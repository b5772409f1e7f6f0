"""Open a DATA argument: a folder of images, a ``.npz``, or ``package.module:callable``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq.data.arrays import read_npz, read_pixels
from ptq.data.folder import list_images, read_files
from ptq.data.image_data import ImageData
from ptq.data.stream import iterate_pairs
from ptq.importing import import_callable, is_callable_spec
from ptq.preprocessing import Preprocessing
from quantizers.errors import DataError

#: From the number of images to the indices of those that are taken.
Choose = Callable[[int], list[int]]


def open_data(
    spec: str,
    preprocessing: Preprocessing,
    *,
    limit: int | None = None,
    seed: int = 0,
    besides: int = 0,
    resize: bool = False,
    num_classes: int | None = None,
    label_names: Sequence[str] | None = None,
) -> ImageData:
    """Open images for a model.

    Args:
        spec: a folder, a ``.npz`` file, or ``package.module:callable`` where the callable returns an iterable
            of preprocessed tensors, (images, labels) tuples or dicts.
        preprocessing: the model's preprocessing.
        limit: use at most this many images: a random choice without replacement, in file order; of a callable,
            whose length nobody knows, the first ones.
        seed: of that choice. The same seed gives the same images.
        besides: leave out the images that a limit of this many chooses with the same seed; of a callable, so many first
            ones. ``limit`` then chooses among the others.
        resize: let a ``.npz`` hold uint8 images of another size than the model's.
        num_classes: check the labels against it.
        label_names: the model's class names, to match sub-folders with.

    Raises:
        DataError: the data is missing, empty, unreadable, or does not fit the model.
        UsageError: an image file needs Pillow and it is not installed.
    """
    path = Path(spec)

    def chosen(count: int) -> list[int]:
        if besides >= count:
            raise DataError(f"{spec}: {count} images, {besides} of them are set aside: none is left; give more images")
        aside = set(_choose(count, besides, seed)) if besides else set()
        others = [index for index in range(count) if index not in aside]
        return [others[index] for index in _choose(len(others), limit, seed)]

    if path.is_dir():
        data = _open_folder(path, preprocessing, chosen, label_names)
    elif path.is_file():
        data = _open_npz(path, preprocessing, chosen, resize)
    elif is_callable_spec(spec):
        data = _open_callable(spec, preprocessing, limit, besides)
    else:
        raise DataError(f"no such data: {spec}: expected a folder of images, a .npz file, or package.module:callable")
    if num_classes is not None:
        data.check_labels(num_classes)
    return data


def _choose(count: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist())


def _open_folder(
    path: Path, preprocessing: Preprocessing, choose: Choose, label_names: Sequence[str] | None
) -> ImageData:
    files, labels = list_images(path, label_names)
    indices = choose(len(files))
    chosen = [files[index] for index in indices]
    return ImageData(
        path.resolve().name,
        preprocessing,
        len(chosen),
        None if labels is None else labels[indices],
        lambda: read_files(chosen, preprocessing),
    )


def _open_npz(path: Path, preprocessing: Preprocessing, choose: Choose, resize: bool) -> ImageData:
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: expected a folder of images or a .npz file, got a file ending in {path.suffix!r}")
    images, labels = read_npz(path, preprocessing, resize)
    indices = choose(len(images))
    return ImageData(
        path.name,
        preprocessing,
        len(indices),
        None if labels is None else labels[indices],
        lambda: read_pixels(images, indices, preprocessing),
    )


def _open_callable(spec: str, preprocessing: Preprocessing, limit: int | None, besides: int) -> ImageData:
    function: Callable[[], Iterable[Any]] = import_callable(spec, DataError)

    def pairs() -> Iterator[tuple[Tensor, int | None]]:
        items = function()
        if not isinstance(items, Iterable):
            raise DataError(f"{spec}: must return an iterable of images, returned {type(items).__name__}")
        return islice(iterate_pairs(items), besides, None if limit is None else besides + limit)

    # One pass counts, collects the labels and finds bad images before anything is computed; the images are not kept.
    labels: list[int | None] = []
    for image, label in pairs():
        if tuple(image.shape) != preprocessing.input_size:
            raise DataError(
                f"{spec}: image {len(labels)} has shape {tuple(image.shape)}, the model takes "
                f"{preprocessing.input_size} (channels, height, width): preprocess the images to that size"
            )
        labels.append(label)
    if not labels:
        missing = f"no image after the first {besides}" if besides else "no image"
        raise DataError(f"{spec}: yielded {missing}: it must return a non-empty iterable, anew at every call")
    known = [label for label in labels if label is not None]
    if known and len(known) != len(labels):
        raise DataError(f"{spec}: {len(labels)} images but {len(known)} labels: give all images a label, or none")
    return ImageData(
        spec,
        preprocessing,
        len(labels),
        torch.tensor(known, dtype=torch.int64) if known else None,
        lambda: (image for image, _ in pairs()),
    )
