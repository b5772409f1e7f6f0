"""Recipes with a scale for each head, and a model whose heads differ."""

from __future__ import annotations

import functools

import torch
from support.models import ours, recipe, spread
from torch import Tensor

from calibration.graph import Graph
from calibration.rules import Recipe, Rule
from calibration.trace import trace
from quantizers.spec import QuantSpec

KINDS = ("query", "key", "value")


def head_recipe(
    bits: int = 8,
    search: str = "minmax",
    *,
    symmetric: bool = True,
    nonlinear: str = "corrected",
    granularity: str = "head",
    rest: int | None = None,
    kinds: tuple[str, ...] = KINDS,
) -> Recipe:
    """Return the usual recipe with a scale for each head of some kinds; other sites have ``rest`` bits."""
    spec = QuantSpec(bits, symmetric=symmetric, granularity=granularity, search=search)
    base = recipe(8, bits if rest is None else rest, search, symmetric=symmetric)
    if nonlinear == "published":
        base = Recipe("", (Rule(QuantSpec(16), "probability"), *base.rules))
    return Recipe("heads", (*(Rule(spec, kind) for kind in kinds), *base.rules), nonlinear)


@functools.cache
def uneven_heads() -> tuple[Graph, Tensor]:
    """Return a traced ViT and images; the channels of one of its three heads are ten times larger or smaller."""
    module = spread(ours(), seed=3)
    factors = torch.tensor([1.0, 10.0, 1.0]).repeat_interleave(8)
    for block in module.blocks:
        qkv = block.attn.qkv
        # Products of queries and keys keep their size, as do the results of the attention: only the formats see it.
        scale = torch.cat([factors, 1 / factors, factors])
        qkv.weight.data *= scale[:, None]
        qkv.bias.data *= scale
        block.attn.proj.weight.data /= factors
    x = torch.randn((32, 1, 8, 8), generator=torch.Generator().manual_seed(4))
    return trace(module, (x[:2],)), x
