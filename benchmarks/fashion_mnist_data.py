"""Fashion-MNIST as its files hold it, and as the embedded network takes it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptq.preprocessing import Preprocessing

#: The embedded network.
MODEL = Path(__file__).resolve().parent.parent / "examples" / "fashion_mnist_vit"


def read_split(folder: Path, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read uint8 images (N, 28, 28) and int64 labels (N,).

    Args:
        folder: of the ``*-ubyte.gz`` files.
        split: ``train`` or ``t10k``.
    """
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    return images, _read_idx(folder / f"{split}-labels-idx1-ubyte.gz").astype(np.int64)


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def preprocessed(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """Return images (N, 28, 28) as the embedded network takes them, float32 (N, 1, 28, 28)."""
    return torch.stack([preprocessing.apply(image[:, :, None]) for image in pixels])
