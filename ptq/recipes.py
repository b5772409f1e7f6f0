"""The named recipes, as one literal table from which CLI choices, documentation and tests are made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from calibration.rules import NONLINEAR, Recipe, Rule
from quantizers.errors import UsageError
from quantizers.spec import MAX_BITS, MIN_BITS, WIDE_BITS, QuantSpec


@dataclass(frozen=True, slots=True)
class RecipeEntry:
    """A method of the table.

    Args:
        summary: one line for people.
        weight_search: range search of weights.
        activation_search: range search of activations.
        nonlinear: integer forms of softmax, GELU, LayerNorm and sums.
    """

    summary: str
    weight_search: str
    activation_search: str
    nonlinear: str = NONLINEAR[0]


RECIPES: Mapping[str, RecipeEntry] = MappingProxyType(
    {
        "minmax": RecipeEntry("the full range of what was seen, weights and activations", "minmax", "minmax"),
        "percentile": RecipeEntry(
            "activations: the range of 99.99 % of the values; weights: full", "minmax", "percentile"
        ),
        "mse": RecipeEntry("the range with the least mean squared error, weights and activations", "mse", "mse"),
        "ivit": RecipeEntry(
            "the full range, and softmax, GELU, LayerNorm and sums as I-ViT publishes them, without fine-tuning",
            *("minmax", "minmax", "published"),
        ),
    }
)
DEFAULT_METHOD = "mse"


def parse_bits(bits: str) -> tuple[int, int]:
    """Return weight and activation widths of a spelling such as ``w8a8`` or ``w4a8``.

    Raises:
        UsageError: another spelling, or widths outside 2 to 8.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", bits)
    if match is None:
        raise UsageError(f"bits is {bits!r}, expected the form w8a8: weight bits, then activation bits")
    weight, activation = int(match[1]), int(match[2])
    for width in (weight, activation):
        if not MIN_BITS <= width <= MAX_BITS:
            raise UsageError(f"bits is {bits!r}: {width} is outside {MIN_BITS} to {MAX_BITS}")
    return weight, activation


def named_recipe(method: str, bits: str) -> Recipe:
    """Return a preset: first and last layer at the same widths as the rest, image and scores at 8 bits.

    Args:
        method: a key of :data:`RECIPES`.
        bits: for example ``w8a8``.

    Raises:
        UsageError: an unknown method or impossible bits.
    """
    entry = RECIPES.get(method)
    if entry is None:
        raise UsageError(f"unknown method {method!r}; known methods: {', '.join(RECIPES)}")
    weight_bits, activation_bits = parse_bits(bits)
    weight = QuantSpec(weight_bits, granularity="channel", search=entry.weight_search)
    wide = QuantSpec(WIDE_BITS)
    # What a table of 256 entries reads stays at 8 bits: narrower codes would save nothing there.
    table_input = QuantSpec(8, search=entry.activation_search)
    rules = [Rule(weight, kind="weight")]
    rules += [Rule(wide, kind=kind, optional=True) for kind in ("residual", "constant", "output")]
    if entry.nonlinear == "published":
        rules += [Rule(wide, kind="probability", optional=True)]
    rules += [Rule(QuantSpec(8), kind="image", optional=True)]
    rules += [Rule(table_input, kind=kind, optional=True) for kind in ("scores", "activation_input")]
    rules += [Rule(QuantSpec(activation_bits, search=entry.activation_search))]
    return Recipe(f"{method}-{bits}", tuple(rules), entry.nonlinear)
