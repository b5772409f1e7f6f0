"""Classes for networks that give features: a vote of the nearest among labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quantizers.errors import DataError

#: How many images vote.
NEIGHBOURS = 10


@dataclass(frozen=True, eq=False)
class FeatureBank:
    """Labelled images that vote.

    Args:
        features: float32 (N, K), of the float network.
        labels: int64 (N,), not negative.
    """

    features: Tensor
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(self.labels.max()) + 1

    def classify(self, queries: Tensor) -> Tensor:
        """Return the class of each feature (M, K), int64 (M,); see :func:`nearest_neighbours`."""
        return nearest_neighbours(self.features, self.labels, queries)


def nearest_neighbours(bank: Tensor, labels: Tensor, queries: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Return the class of each query: the majority among the most similar features, by the cosine; the lower in a tie.

    Args:
        bank: float32 (N, K).
        labels: int64 (N,), not negative.
        queries: float32 (M, K).
        neighbours: how many vote; all of a bank that has fewer.

    Returns:
        int64 (M,).
    """
    similarity = functional.normalize(queries, dim=1) @ functional.normalize(bank, dim=1).T
    nearest = similarity.topk(min(neighbours, len(bank)), 1).indices
    votes = functional.one_hot(labels[nearest], int(labels.max()) + 1).sum(1)
    return votes.argmax(1)


@torch.no_grad()
def make_bank(run: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor | None]]) -> FeatureBank:
    """Run the float network on labelled images.

    Args:
        run: maps float32 images (batch, C, H, W) to features (batch, K).
        batches: images and labels.

    Raises:
        DataError: no image, images without labels, negative labels, or results that are no features.
    """
    features, labels = [], []
    for images, known in batches:
        if known is None:
            raise DataError("the images of a bank need labels: use a folder with sub-folders, or a .npz with 'labels'")
        made = run(images)
        if made.ndim != 2:
            raise DataError(
                f"a bank needs one feature for each image, (batch, K); the network gives {tuple(made.shape)}"
            )
        features.append(made)
        labels.append(known)
    if not features:
        raise DataError("a bank needs at least one labelled image, got none")
    joined = torch.cat(labels)
    if int(joined.min()) < 0:
        raise DataError(f"the labels of a bank must not be negative, found {int(joined.min())}")
    return FeatureBank(torch.cat(features), joined)
