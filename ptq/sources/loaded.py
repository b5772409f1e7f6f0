"""LoadedModel: what every kind of MODEL argument turns into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ptq.preprocessing import Preprocessing


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A float model that is ready to be traced.

    Args:
        module: in eval mode; maps float32 (batch, channels, height, width) to logits or features.
        example_inputs: float32 inputs of batch size 2.
        preprocessing: how images become inputs.
        source: the MODEL argument, with paths reduced to their last part.
        weights_sha256: hash over the names, shapes and bytes of all weights.
        num_classes: width of the logits, or None for features.
        label_names: class names, where the model's configuration has them.
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    preprocessing: Preprocessing
    source: str
    weights_sha256: str
    num_classes: int | None = None
    label_names: tuple[str, ...] | None = None
