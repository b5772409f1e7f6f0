"""Recipes as YAML: strict reading, and writing that reads back equal.

name: my-recipe
nonlinear: corrected        # integer forms of softmax, GELU, LayerNorm and sums; or: published (I-ViT)
propagation: float          # what later layers see in calibration: float activations, or: quantized
layer_norm_scale: none      # one scale for the channels after a LayerNorm: none, mean, median, best
centring: false             # move keys and values to the middle of their ranges
correction: none            # or least_squares: weights that make up for the errors of their inputs
rules:                      # the first rule that matches a site wins
  - kind: weight            # shell patterns on the kind and the name of a site
    bits: 4
    granularity: channel
    search: mse
  - {kind: value, bits: 8, granularity: head}       # a scale for each head: query, key or value
  - {kind: residual, bits: 16, optional: true}
  - {bits: 8, search: percentile, percentile: 99.9}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from calibration.rules import CHOICES, Recipe, Rule
from quantizers.errors import RecipeError, UsageError
from quantizers.spec import QuantSpec

_SPEC_KEYS = {field.name: field.type for field in dataclasses.fields(QuantSpec)}
_CHOICE_KEYS = {
    str(field.name): str(field.type) for field in dataclasses.fields(Recipe) if field.name not in ("name", "rules")
}
_RULE_KEYS = {"kind": "str", "name": "str", "optional": "bool"}
_TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "str": (str,), "float": (int, float)}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: not YAML, an unknown or missing key, or a value of the wrong type or range, with its rule.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse the YAML text of a recipe; ``where`` names it in errors."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict) or set(document) - set(_CHOICE_KEYS) != {"name", "rules"}:
        found = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
        raise RecipeError(
            f"recipe {where}: expected the keys name and rules, and perhaps {', '.join(_CHOICE_KEYS)}; found {found}"
        )
    if not isinstance(document["name"], str) or not isinstance(document["rules"], list) or not document["rules"]:
        raise RecipeError(f"recipe {where}: name must be a text and rules a list with at least one rule")
    rules = tuple(_parse_rule(entry, f"recipe {where}, rule {i}") for i, entry in enumerate(document["rules"], 1))
    choices = {key: document[key] for key in _CHOICE_KEYS if key in document}
    for key, value in choices.items():
        if key in CHOICES and value not in CHOICES[key]:
            raise RecipeError(f"recipe {where}: {key} is {value!r}, expected one of {', '.join(CHOICES[key])}")
        _require_type(value, _CHOICE_KEYS[key], f"recipe {where}: {key}")
    return Recipe(document["name"], rules, **choices)


def dump_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML that :func:`parse_recipe` reads back equal."""
    default = Rule(QuantSpec(8))
    rules = []
    for rule in recipe.rules:
        entry = {key: getattr(rule, key) for key in _RULE_KEYS if getattr(rule, key) != getattr(default, key)}
        entry["bits"] = rule.spec.bits
        entry.update(
            {
                key: getattr(rule.spec, key)
                for key in _SPEC_KEYS
                if key != "bits" and getattr(rule.spec, key) != getattr(default.spec, key)
            }
        )
        rules.append(entry)
    plain = Recipe(recipe.name, recipe.rules)
    changed = [key for key in _CHOICE_KEYS if getattr(recipe, key) != getattr(plain, key)]
    head = {"name": recipe.name, **{key: getattr(recipe, key) for key in changed}}
    return yaml.safe_dump({**head, "rules": rules}, sort_keys=False)


def _parse_rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: expected keys and values, got {type(entry).__name__}")
    known = {**_RULE_KEYS, **_SPEC_KEYS}
    unknown = sorted(set(map(str, entry)) - set(known))
    if unknown:
        raise RecipeError(f"{where}: unknown key {', '.join(unknown)}; known keys: {', '.join(known)}")
    if "bits" not in entry:
        raise RecipeError(f"{where}: the key bits is missing")
    for key, value in entry.items():
        _require_type(value, str(known[key]), f"{where}: {key}")
    try:
        spec = QuantSpec(**{key: value for key, value in entry.items() if key in _SPEC_KEYS})
    except UsageError as error:
        raise RecipeError(f"{where}: {error}") from error
    return Rule(spec, **{key: value for key, value in entry.items() if key in _RULE_KEYS})


def _require_type(value: Any, expected: str, where: str) -> None:
    kinds = _TYPES[expected]
    # bool is an int in Python, but not in a recipe.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise RecipeError(f"{where} is {value!r}, expected {expected}")
