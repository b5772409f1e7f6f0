"""Accuracy of a backend beside float on the same images, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ptq.console import Reporter
from ptq.data import ImageData
from ptq.nearest_neighbours import FeatureBank


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an evaluation.

    Args:
        backend: what ran.
        n: number of images.
        top1: percent of images whose label it found; None without labels.
        float_top1: the same for float.
        agreement: share of images, 0 to 1, on which its first choice is float's.
    """

    backend: str
    n: int
    top1: float | None
    float_top1: float | None
    agreement: float


def evaluate(
    backend: str,
    run: Callable[[Tensor], Tensor],
    float_run: Callable[[Tensor], Tensor],
    data: ImageData,
    batch_size: int,
    progress: Reporter | None = None,
    bank: FeatureBank | None = None,
) -> Evaluation:
    """Compare first choices with labels and with float.

    Args:
        backend: name for the result.
        run: maps float32 images (batch, C, H, W) to logits (batch, classes), or to features where there is a bank.
        float_run: the same in float.
        data: images, with or without labels.
        batch_size: images run together.
        progress: called with what is done.
        bank: labelled images whose nearest features are the first choice; the largest logit where None.

    Raises:
        DataError: a label that no output stands for.
    """
    classify = bank.classify if bank is not None else _largest
    seen = correct = float_correct = agreed = 0
    for images, labels in data.batches(batch_size):
        results = float_run(images)
        if seen == 0:
            data.check_labels(results.shape[-1] if bank is None else bank.num_classes)
        expected = classify(results)
        found = expected if run is float_run else classify(run(images))
        agreed += int((found == expected).sum())
        if labels is not None:
            correct += int((found == labels).sum())
            float_correct += int((expected == labels).sum())
        seen += len(images)
        if progress is not None:
            progress(f"evaluate {backend}", seen, len(data))
    labelled = data.labels is not None
    return Evaluation(
        backend,
        seen,
        100.0 * correct / seen if labelled else None,
        100.0 * float_correct / seen if labelled else None,
        agreed / seen,
    )


def _largest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)
