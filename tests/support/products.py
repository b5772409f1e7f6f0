"""Layers and products of every kind, alone and in networks, for the tests of exports."""

from __future__ import annotations

import torch
from support.codebooks import GELU_LOW, with_codebooks
from support.heads import head_recipe
from support.models import Formula, calibrated, recipe, spread
from torch import Tensor, nn

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.rules import Recipe
from calibration.trace import trace
from quantizers.adalog import adalog
from quantizers.logarithm import log_sqrt2
from quantizers.tangent import tangent

#: Families whose attention differs: fused and separate projections, two heads, windows with a mask.
FAMILIES = ("ours", "deit", "dinov2", "swin", "transformers")
RECIPES = {"tensor": recipe(), "head": head_recipe(), "affine head": head_recipe(symmetric=False)}
FC2 = r".*\.(mlp\.fc2|output\.dense)\.input"


def calibrated_formula(module: nn.Module, *shape: int, chosen: Recipe | None = None) -> Calibrated:
    samples = torch.randn((8, *shape), generator=torch.Generator().manual_seed(2))
    graph = trace(spread(module), (samples[:2],))
    return calibrate(graph, [(x,) for x in samples], recipe() if chosen is None else chosen)


def _two_products(x: Tensor, layer: nn.Module) -> Tensor:
    return (layer(x) @ x.transpose(-1, -2)) @ (0.1 * x)


def _attention(x: Tensor, layer: nn.Module) -> Tensor:
    return (layer(x) @ x.transpose(-1, -2)).softmax(-1) @ x


def heads(x: Tensor, *layers: nn.Module) -> Tensor:
    query, key, value = (layer(x).unflatten(-1, (2, 4)).transpose(-2, -3) for layer in layers)
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


def product_cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "vector": (nn.Linear(12, 7), (12,)),
        "tokens": (nn.Linear(12, 7), (5, 12)),
        "windows": (nn.Linear(12, 7), (3, 5, 12)),
        "patches": (nn.Conv2d(3, 5, 4, stride=4), (3, 8, 12)),
        "oblong patches": (nn.Conv2d(2, 5, (2, 4), stride=(2, 4)), (2, 8, 8)),
        "cropped patches": (nn.Conv2d(3, 5, 4, stride=4), (3, 9, 11)),
        "overlapping": (nn.Conv2d(3, 5, 3, stride=2, padding=(1, 0)), (3, 8, 8)),
        "grouped, dilated": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 9, 9)),
        "products": (Formula(_two_products, nn.Linear(8, 8)), (2, 5, 8)),
        "attention": (Formula(_attention, nn.Linear(8, 8)), (2, 5, 8)),
    }


def codebook_model(name: str) -> Calibrated:
    """Log probabilities, and levels behind GELU and at the values."""
    result = with_codebooks(calibrated(name), {"probability": log_sqrt2(4), "value": tangent(6, 1.2)})
    return with_codebooks(result, {FC2: adalog(6, 20)}, low=GELU_LOW)
