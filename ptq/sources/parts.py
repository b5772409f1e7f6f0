"""What each kind of MODEL argument is read into, before overrides and checks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ptq.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class Parts:
    """A module as its source gives it.

    Args:
        module: maps images to logits or features.
        preprocessing: the model's own; identity where its source says nothing.
        num_classes: width of the logits, None for features; for a module that says nothing about itself,
            ``measure_classes`` is set instead.
        label_names: class names, where the source has them.
        example: an input, where the source has one.
        measure_classes: take the width of the output as the number of classes.
    """

    module: nn.Module
    preprocessing: Preprocessing
    num_classes: int | None = None
    label_names: tuple[str, ...] | None = None
    example: Tensor | None = None
    measure_classes: bool = False


def image_size(images: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of a batch (batch, channels, height, width)."""
    _, channels, height, width = images.shape
    return channels, height, width
