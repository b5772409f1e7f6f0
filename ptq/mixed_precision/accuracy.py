"""Accuracy beside float on the same images, with how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.engine import Progress
from quantizers.errors import DataError, UsageError

Run = Callable[[Tensor], Tensor]
#: Images and labels, anew in every pass.
Labelled = Iterable[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Drop:
    """Answers of a network and of float on the same images.

    Args:
        images: how many.
        float_right: images that float gets right.
        lost: of these, images that the network gets wrong.
        won: images that the network alone gets right.
    """

    images: int
    float_right: int
    lost: int
    won: int

    @property
    def points(self) -> float:
        """Points of top-1 that are lost."""
        return 100 * (self.lost - self.won) / self.images

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`points`; only answers that differ add to it, as both saw the same images."""
        return 100 * math.sqrt(self.lost + self.won) / self.images

    @property
    def float_top1(self) -> float:
        """Top-1 of float, percent."""
        return 100 * self.float_right / self.images

    @property
    def top1(self) -> float:
        """Top-1 of the network, percent."""
        return self.float_top1 - self.points

    def within(self, points: float) -> bool:
        """Whether the drop, and one standard error more, is at most so many points: other images then meet it too."""
        return self.points + self.standard_error <= points

    def beyond(self, points: float) -> bool:
        """Whether the drop, less one standard error, is more than so many points."""
        return self.points - self.standard_error > points


class Judge:
    """Measures networks on images that float has seen once.

    Args:
        float_run: maps float32 images (batch, C, H, W) to logits or features.
        data: labelled images.
        classify: maps results to classes, int64 (batch,).
        num_classes: labels have to be less.
        total: number of images if known, for progress only.
        progress: called with a stage, what is done and what there is to do.

    Raises:
        UsageError: images without labels.
        DataError: no image, or a label that no class stands for.
    """

    def __init__(
        self,
        float_run: Run,
        data: Labelled,
        classify: Callable[[Tensor], Tensor],
        num_classes: int,
        total: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._data, self._classify, self._progress = data, classify, progress
        self._total, expected = 0, total or 0
        right: list[Tensor] = []
        for images, labels in data:
            if labels is None:
                raise UsageError(
                    "accuracy is measured on labelled images and these have no labels: use a folder with a sub-folder "
                    "for each class, a .npz with 'labels', or --size-budget or --latency-budget, which need none"
                )
            if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
                raise DataError(
                    f"labels are {int(labels.min())} to {int(labels.max())}, expected 0 to {num_classes - 1}: "
                    "use the class numbering of the model, or of the bank"
                )
            right.append(classify(float_run(images)) == labels)
            self._total += len(images)
            self._report("measure float", self._total, expected)
        if not right:
            raise DataError("accuracy needs at least one image, got none")
        self._right = torch.cat(right)

    @property
    def images(self) -> int:
        """How many images there are."""
        return self._total

    def measure(self, run: Run, stage: str) -> Drop:
        """Measure a network on the images.

        Args:
            run: as float_run is.
            stage: what progress calls it.
        """
        right: list[Tensor] = []
        seen = 0
        for images, labels in self._data:
            assert labels is not None
            right.append(self._classify(run(images)) == labels)
            seen += len(images)
            self._report(stage, seen, self._total)
        found = torch.cat(right)
        lost, won = int((self._right & ~found).sum()), int((~self._right & found).sum())
        return Drop(self._total, int(self._right.sum()), lost, won)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, max(done, total))
