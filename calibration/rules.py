"""Recipes: an ordered list of rules, each from a pattern of sites to a spec. The first match wins."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from calibration.sites import SITE_KINDS, Site
from quantizers.errors import RecipeError
from quantizers.shiftmax import SHIFTMAX_BITS
from quantizers.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Rule:
    """Where and how.

    Args:
        spec: how to quantize the sites that match.
        kind: shell pattern on the kind of a site, for example ``query`` or ``*_input``.
        name: shell pattern on its name, for example ``blocks.0.*``.
        optional: whether the rule may match nothing; presets serve models that lack some kinds.
    """

    spec: QuantSpec
    kind: str = "*"
    name: str = "*"
    optional: bool = False

    def matches(self, site: Site) -> bool:
        """Whether the rule applies to a site."""
        return fnmatchcase(site.kind, self.kind) and fnmatchcase(site.name, self.name)


#: Integer forms of softmax, GELU, LayerNorm and residual sums: ours, or those of I-ViT as published.
NONLINEAR = ("corrected", "published")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named, ordered list of rules.

    Args:
        name: for people.
        rules: the first that matches a site gives its spec.
        nonlinear: a member of :data:`NONLINEAR`; the simulation uses the same forms as the integer program.

    Raises:
        RecipeError: unknown forms.
    """

    name: str
    rules: tuple[Rule, ...]
    nonlinear: str = NONLINEAR[0]

    def __post_init__(self) -> None:
        if self.nonlinear not in NONLINEAR:
            raise RecipeError(
                f"recipe {self.name}: nonlinear is {self.nonlinear!r}, expected one of {', '.join(NONLINEAR)}"
            )


#: Widths that the integer operators read at each kind; everything else is a mistake in a recipe.
_WIDE_KINDS = frozenset({"residual", "constant", "output"})
#: Granularities that the integer operators have at each kind; everything else has one scale for a tensor.
_GRANULARITIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"weight": ("channel",), **dict.fromkeys(("query", "key", "value"), ("tensor", "head"))}
)


def assign_specs(sites: Sequence[Site], recipe: Recipe) -> dict[str, QuantSpec]:
    """Return the spec of each site by name.

    Raises:
        RecipeError: a site without a rule, a rule that matched nothing, or a spec that the site cannot have.
    """
    assigned: dict[str, QuantSpec] = {}
    used: set[int] = set()
    for site in sites:
        index = next((i for i, rule in enumerate(recipe.rules) if rule.matches(site)), None)
        if index is None:
            raise RecipeError(
                f"recipe {recipe.name}: no rule matches site {site.name} ({site.kind}); add a last rule for kind '*'"
            )
        # A rule that only repeats an earlier match still matched something.
        used.update(i for i, rule in enumerate(recipe.rules) if rule.matches(site))
        spec = recipe.rules[index].spec
        _require_possible(recipe, site, spec)
        assigned[site.name] = spec
    for index, rule in enumerate(recipe.rules):
        if index not in used and not rule.optional:
            raise RecipeError(_unmatched(recipe, rule, index, sites))
    return assigned


def _require_possible(recipe: Recipe, site: Site, spec: QuantSpec) -> None:
    where = f"recipe {recipe.name}: site {site.name} ({site.kind})"
    granularities = _GRANULARITIES.get(site.kind, ("tensor",))
    if spec.granularity not in granularities:
        expected = " or ".join(map(repr, granularities))
        raise RecipeError(f"{where} needs granularity {expected}, the rule says {spec.granularity!r}")
    if site.kind == "weight" and not spec.symmetric:
        raise RecipeError(f"{where} needs symmetric weights; the integer kernels have no row sums of activations")
    if site.kind == "probability" and recipe.nonlinear == "published":
        if spec.bits not in SHIFTMAX_BITS:
            raise RecipeError(f"{where} has 8 or 16 bits in its published form, the rule says {spec.bits}")
        return
    if spec.bits > 8 and site.kind not in _WIDE_KINDS:
        raise RecipeError(f"{where} can have 2 to 8 bits, the rule says {spec.bits}")


def _unmatched(recipe: Recipe, rule: Rule, index: int, sites: Sequence[Site]) -> str:
    if rule.name != "*":
        close = difflib.get_close_matches(rule.name, [site.name for site in sites], n=3, cutoff=0.3)
        hint = f"close site names: {', '.join(close)}" if close else "see the site names with 'ptq inspect'"
    else:
        hint = f"kinds in this model: {', '.join(sorted({site.kind for site in sites}))}; all: {', '.join(SITE_KINDS)}"
    return f"recipe {recipe.name}: rule {index + 1} (kind {rule.kind!r}, name {rule.name!r}) matched no site; {hint}"
