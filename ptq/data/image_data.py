"""ImageData: preprocessed images that can be read again and again, one batch in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ptq.preprocessing import Preprocessing
from quantizers.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageData:
    """A fixed list of preprocessed images.

    Args:
        name: how reports call it (a base name, never a machine path).
        preprocessing: what was applied to the images.
        count: number of images.
        labels: int64 (count,), or None.
        read: starts a new pass; yields float32 (C, H, W), ``count`` times, the same images in the same order.
    """

    name: str
    preprocessing: Preprocessing
    count: int
    labels: Tensor | None
    read: Callable[[], Iterator[Tensor]]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.read()

    def batches(self, batch_size: int) -> ImageBatches:
        """Pairs of images (b, C, H, W) and labels (b,) or None; the last batch may be smaller."""
        return ImageBatches(self, batch_size)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over the count, the shape and the float32 bytes of all images in order."""
        digest = hashlib.sha256(f"{self.count} {self.preprocessing.input_size}".encode())
        for image in self.read():
            digest.update(image.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_labels(self, num_classes: int) -> None:
        """Check that every label is a class of the model.

        Raises:
            DataError: a label lies outside 0 .. num_classes - 1.
        """
        if self.labels is None:
            return
        wrong = torch.nonzero((self.labels < 0) | (self.labels >= num_classes)).reshape(-1)
        if len(wrong):
            first = int(wrong[0])
            raise DataError(
                f"{self.name}: label {int(self.labels[first])} of image {first} is out of range 0..{num_classes - 1} "
                f"({len(wrong)} of {self.count} labels): the model has {num_classes} classes; use its class numbering"
            )


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """The batches of an :class:`ImageData`; every iteration is a new pass over the same images."""

    data: ImageData
    batch_size: int

    def __len__(self) -> int:
        return (len(self.data) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        images, labels = self.data.read(), self.data.labels
        for start in range(0, len(self.data), self.batch_size):
            batch = torch.stack(list(islice(images, self.batch_size)))
            yield batch, None if labels is None else labels[start : start + self.batch_size]
