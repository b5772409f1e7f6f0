"""Small example models of every family that must trace, with random weights of the spread that trained ones have."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import Graph
from calibration.rules import Recipe, Rule
from calibration.trace import trace
from ptq.vision_transformer import VisionTransformer
from quantizers.spec import QuantSpec


def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw all weights so that every branch matters: fresh initializations leave most of them near zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, deviation: float) -> None:
        tensor.data.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "weight" and parameter.ndim >= 2:
                normal(parameter, 0.0, (parameter.numel() / parameter.shape[0]) ** -0.5)
            elif name in ("weight", "gamma"):
                normal(parameter, 1.0, 0.2)
            else:
                normal(parameter, 0.0, 0.1 if name == "bias" else 0.5)
        if isinstance(part, nn.BatchNorm2d):
            normal(part.running_mean, 0.0, 0.3)
            part.running_var.data.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    return module.eval()


def ours(**changes: int) -> VisionTransformer:
    """Build this project's ViT: 2 blocks, 5 tokens of width 24 in 3 heads, images (1, 8, 8)."""
    settings = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    settings.update({"embed_dim": 24, "depth": 2, "num_heads": 3}, **changes)
    return VisionTransformer(**settings, mlp_ratio=2.0)


def _timm(name: str, **settings: object) -> nn.Module:
    _declare_torchvision_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm")
        return timm.create_model(name, **settings)


def _declare_torchvision_operators() -> None:
    # torchvision registers meta kernels for two operators of its compiled part, which is missing where its
    # build differs from torch's; no vision transformer calls them.
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


#: A torch.library.Library takes its operators with it when it is collected.
_LIBRARIES: list[torch.library.Library] = []

_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def _transformers() -> nn.Module:
    _declare_torchvision_operators()
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    config.num_labels = 5
    return _Logits(transformers.ViTForImageClassification(config))


class Formula(nn.Module):
    """A module from a formula: ``forward(x)`` is ``formula(x, *layers)``."""

    def __init__(self, formula: Callable[..., object], *layers: nn.Module) -> None:
        super().__init__()
        self.formula = formula
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> object:
        return self.formula(x, *self.layers)


#: Name to a constructor and the shape of an image.
MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = MappingProxyType(
    {
        "ours": (ours, (1, 8, 8)),
        "vit": (lambda: _timm("vit_tiny_patch16_224", **_PLAIN), (3, 32, 32)),
        "deit": (lambda: _timm("deit_tiny_distilled_patch16_224", **_PLAIN), (3, 32, 32)),
        "dinov2": (
            lambda: _timm("vit_small_patch14_dinov2", img_size=42, embed_dim=24, depth=2, num_heads=3, num_classes=0),
            (3, 42, 42),
        ),
        "swin": (
            lambda: _timm(
                "swin_tiny_patch4_window7_224",
                img_size=32,
                window_size=4,
                depths=(2, 2),
                embed_dim=16,
                num_heads=(2, 4),
                num_classes=10,
            ),
            (3, 32, 32),
        ),
        "transformers": (_transformers, (3, 32, 32)),
    }
)


@functools.cache
def model(name: str) -> nn.Module:
    """Return an example model in eval mode; the same object each time."""
    return spread(MODELS[name][0]())


def images(name: str, count: int, seed: int = 0) -> Tensor:
    """Return random float32 images (count, channels, height, width) for an example model."""
    return torch.randn((count, *MODELS[name][1]), generator=torch.Generator().manual_seed(seed))


@functools.cache
def traced(name: str) -> Graph:
    """Return the traced graph of an example model."""
    return trace(model(name), (images(name, 2),))


def recipe(weight_bits: int = 8, activation_bits: int = 8, search: str = "minmax", *, symmetric: bool = True) -> Recipe:
    """Return the usual recipe: weights by channel, 16-bit residual stream, everything else one width."""
    weight = QuantSpec(weight_bits, granularity="channel", search=search)
    wide = QuantSpec(16, symmetric=symmetric)
    rules = (
        Rule(weight, "weight"),
        *(Rule(wide, kind, optional=True) for kind in ("residual", "constant", "output")),
        Rule(QuantSpec(activation_bits, symmetric=symmetric, search=search)),
    )
    return Recipe(f"w{weight_bits}a{activation_bits}", rules)


def calibrated(name: str, chosen: Recipe | None = None, count: int = 16) -> Calibrated:
    """Calibrate an example model on random images."""
    samples = [(image,) for image in images(name, count, seed=1)]
    return calibrate(traced(name), samples, recipe() if chosen is None else chosen)
