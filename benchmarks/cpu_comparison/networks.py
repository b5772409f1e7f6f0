"""The networks that are compared: real architectures with random weights, the same ones in every process.

Speed does not depend on what the weights are, as long as no engine meets NaN, infinity or denormals, so nothing
has to be downloaded. The seed is fixed, hence each process that builds a network builds the same one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SEED = 0
EMBEDDED = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist_vit" / "config.json"


@dataclass(frozen=True, slots=True)
class Network:
    """A row of the table of networks.

    Args:
        title: what people call it.
        factory: timm's name, or ``plain`` for the project's own Vision Transformer.
        arguments: of the factory.
        image_size: height and width of the input, pixels.
        channels: of the input.
    """

    title: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 224
    channels: int = 3


NETWORKS: dict[str, Network] = {
    "deit-t": Network("DeiT-T", "deit_tiny_patch16_224"),
    "deit-s": Network("DeiT-S", "deit_small_patch16_224"),
    "vit-b": Network("ViT-B/16", "vit_base_patch16_224"),
    "dinov2-s": Network("DINOv2-S/14", "vit_small_patch14_dinov2", {"img_size": 224, "num_classes": 0}),
    "swin-t": Network("Swin-T", "swin_tiny_patch4_window7_224"),
    # Which the export presets are compared on.
    "fashion": Network("embedded ViT", "plain", json.loads(EMBEDDED.read_text())["model_args"], 28, 1),
    # Not worth comparing: it shows within seconds whether every engine loads and answers.
    "tiny": Network(
        "tiny ViT",
        "plain",
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10},
        image_size=32,
    ),
}


def build_network(name: str) -> Any:
    """Build a network of :data:`NETWORKS`: a torch module in evaluation mode, the same weights in each process."""
    import torch  # noqa: PLC0415 - workers of engines without torch read the table above only

    network = NETWORKS[name]
    torch.manual_seed(SEED)
    if network.factory == "plain":
        from ptq.vision_transformer import VisionTransformer  # noqa: PLC0415 - as above

        return VisionTransformer(**network.arguments).eval()
    from ptq.sources.torchvision_shim import define_torchvision_schemas  # noqa: PLC0415 - as above

    define_torchvision_schemas()
    import timm  # noqa: PLC0415 - timm imports torchvision, which needs the schemas defined above

    return timm.create_model(network.factory, pretrained=False, **network.arguments).eval()


def make_images(name: str, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Return normalized noise, float32 (count, channels, size, size); the same seed gives the same images."""
    network = NETWORKS[name]
    shape = (count, network.channels, network.image_size, network.image_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
