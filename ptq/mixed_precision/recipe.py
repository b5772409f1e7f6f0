"""The recipe of a choice of widths: rules for weights, before the rules of the method."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase

from calibration.rules import Recipe, Rule
from calibration.sites import Site
from quantizers.spec import QuantSpec

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def mixed_recipe(base: Recipe, sites: Mapping[str, Site], widths: Mapping[str, int], name: str) -> Recipe:
    """Return a recipe that gives each weight its width, and everything else what it has.

    The width that most weights have goes to the rules of the base recipe. Of the others, those that differ only in
    numbers of blocks share a rule where all weights of that pattern have one width.

    Args:
        base: the recipe of the method.
        sites: weights by name.
        widths: by name of every one of them.
        name: of the recipe.
    """
    counts = Counter(widths[name] for name in sites)
    # Of widths that are as common, the larger one.
    common = max(counts, key=lambda width: (counts[width], width))
    rest = tuple(
        dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, bits=common)) if rule.kind == "weight" else rule
        for rule in base.rules
    )
    plain = Recipe(name, rest)
    named: dict[str, Rule] = {}
    for site in sites.values():
        if widths[site.name] == common:
            continue
        spec = dataclasses.replace(_spec_of(plain, site), bits=widths[site.name])
        pattern = _pattern(site, sites, widths)
        named.setdefault(pattern, Rule(spec, kind="weight", name=pattern))
    return dataclasses.replace(base, name=name, rules=(*named.values(), *rest))


def _spec_of(recipe: Recipe, site: Site) -> QuantSpec:
    return next(rule.spec for rule in recipe.rules if rule.matches(site))


def _pattern(site: Site, sites: Mapping[str, Site], widths: Mapping[str, int]) -> str:
    """Return the name with its numbers left open where all weights that match have one width, else the name."""
    exact = glob.escape(site.name)
    pattern = _NUMBER.sub("*", exact)
    alike = {widths[name] for name in sites if fnmatchcase(name, pattern)}
    return pattern if alike == {widths[site.name]} else exact
