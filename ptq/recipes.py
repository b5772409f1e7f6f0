"""The named recipes, as one literal table from which CLI choices, documentation and tests are made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from quantizers.errors import UsageError
from quantizers.spec import MAX_BITS, MIN_BITS, WIDE_BITS, QuantSpec

if TYPE_CHECKING:
    from calibration.rules import Recipe


@dataclass(frozen=True, slots=True)
class RecipeEntry:
    """A method of the table.

    Args:
        summary: one line for people.
        weight: search of weights.
        activation: search of activations.
        symmetric: whether activations have zero point 0.
        attention: granularity of queries, keys and values.
        probability: format of attention probabilities.
        activation_output: format of what GELU makes for the next linear.
        activation_output_search: its search; that of the other activations where None.
        choices: further keys of a recipe.
    """

    summary: str
    weight: str
    activation: str
    symmetric: bool = True
    attention: str = "tensor"
    probability: str = "uniform"
    activation_output: str = "uniform"
    activation_output_search: str | None = None
    choices: Mapping[str, str | bool] = field(default_factory=dict)


RECIPES: Mapping[str, RecipeEntry] = MappingProxyType(
    {
        "auto": RecipeEntry(
            "each site the format, each layer the rewrite and rounding, with the least measured error at its output",
            weight="feedback",
            activation="output",
            symmetric=False,
            attention="head",
            probability="any",
            activation_output="any",
            choices=MappingProxyType(
                {
                    "propagation": "quantized",
                    "layer_norm_scale": "best",
                    "centring": True,
                    "correction": "least_squares",
                }
            ),
        ),
        "minmax": RecipeEntry(
            "the full range of what was seen, weights and activations", weight="minmax", activation="minmax"
        ),
        "percentile": RecipeEntry(
            "activations: the range of 99.99 % of the values; weights: full", weight="minmax", activation="percentile"
        ),
        "mse": RecipeEntry(
            "the range with the least mean squared error, weights and activations", weight="mse", activation="mse"
        ),
        "repq": RecipeEntry(
            "RepQ-ViT: LayerNorm scales folded to their mean, powers of sqrt 2 for attention",
            weight="output",
            activation="percentile_mse",
            symmetric=False,
            probability="log_sqrt2",
            activation_output_search="percentile_output",
            choices=MappingProxyType({"propagation": "quantized", "layer_norm_scale": "mean"}),
        ),
        "dopq": RecipeEntry(
            "DopQ-ViT without its gradient stage: LayerNorm scales folded to the median, tangent levels for attention",
            weight="output",
            activation="percentile_mse",
            symmetric=False,
            probability="tangent",
            activation_output_search="percentile_output",
            choices=MappingProxyType({"propagation": "quantized", "layer_norm_scale": "median"}),
        ),
        "adalog": RecipeEntry(
            "AdaLog: searched logarithm bases for attention and after GELU, progressive search by layer output",
            weight="output",
            activation="output",
            symmetric=False,
            attention="head",
            probability="adalog",
            activation_output="adalog",
            choices=MappingProxyType({"layer_norm_scale": "mean"}),
        ),
        "ias": RecipeEntry(
            "I&S-ViT without its gradient stages: shifted uniform logarithm for attention, LayerNorm scales folded",
            weight="output",
            activation="percentile_mse",
            symmetric=False,
            probability="sulq",
            activation_output_search="percentile_output",
            choices=MappingProxyType({"propagation": "quantized", "layer_norm_scale": "mean"}),
        ),
        "ivit": RecipeEntry(
            "the full range, and softmax, GELU, LayerNorm and sums as I-ViT publishes them, without fine-tuning",
            weight="minmax",
            activation="minmax",
            choices=MappingProxyType({"nonlinear": "published"}),
        ),
    }
)
DEFAULT_METHOD = "auto"


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
    from calibration.rules import Recipe, Rule

    entry = RECIPES.get(method)
    if entry is None:
        raise UsageError(f"unknown method {method!r}; known methods: {', '.join(RECIPES)}")
    weight_bits, activation_bits = parse_bits(bits)
    wide, published = QuantSpec(WIDE_BITS), entry.choices.get("nonlinear") == "published"
    # What a table of 256 entries reads stays at 8 bits: narrower codes would save nothing there.
    table_input = QuantSpec(8, search=entry.activation)
    activation = QuantSpec(activation_bits, entry.symmetric, search=entry.activation)
    # Only products read levels, and centred keys and values are symmetric.
    attention = replace(activation, granularity=entry.attention, symmetric=entry.attention == "head" or entry.symmetric)
    probability = wide if published else replace(activation, format=entry.probability)
    rules = [Rule(QuantSpec(weight_bits, granularity="channel", search=entry.weight), kind="weight")]
    rules += [Rule(wide, kind=kind, optional=True) for kind in ("residual", "constant", "output")]
    rules += [Rule(QuantSpec(8), kind="image", optional=True)]
    rules += [Rule(table_input, kind=kind, optional=True) for kind in ("scores", "activation_input")]
    rules += [Rule(attention, kind=kind, optional=True) for kind in ("query", "key", "value")]
    rules += [Rule(probability, kind="probability", optional=True)]
    made = replace(activation, search=entry.activation_output_search or entry.activation)
    rules += [Rule(replace(made, format=entry.activation_output), kind="activation_output", optional=True)]
    rules += [Rule(activation)]
    return Recipe(f"{method}-{bits}", tuple(rules), **dict(entry.choices))  # type: ignore[arg-type]
