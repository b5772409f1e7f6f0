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


#: What later layers see during calibration: float activations (parallel), or quantized ones (sequential).
PROPAGATIONS = ("float", "quantized")
#: Scale that the channels of a LayerNorm's output get in common (RepQ-ViT; DopQ-ViT); ``best``: by measured error.
LAYER_NORM_SCALES = ("none", "mean", "median", "best")
#: ``least_squares``: weights and biases that make up for the errors of what they read (ERQ).
CORRECTIONS = ("none", "least_squares")
#: Integer forms of softmax, GELU, LayerNorm and residual sums: ours, or those of I-ViT as published.
NONLINEAR = ("corrected", "published")


#: Keys of a recipe that choose one of a few ways, and these.
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "nonlinear": NONLINEAR,
        "propagation": PROPAGATIONS,
        "layer_norm_scale": LAYER_NORM_SCALES,
        "correction": CORRECTIONS,
    }
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named, ordered list of rules.

    Args:
        name: for people.
        rules: the first that matches a site gives its spec.
        nonlinear: a member of :data:`NONLINEAR`; the simulation uses the same forms as the integer program.
        propagation: a member of :data:`PROPAGATIONS`.
        layer_norm_scale: a member of :data:`LAYER_NORM_SCALES`.
        centring: whether keys and values are moved to the middle of their ranges, see :mod:`calibration.reparam`.
        correction: a member of :data:`CORRECTIONS`.

    Raises:
        RecipeError: an unknown choice, or published forms in a quantized run.
    """

    name: str
    rules: tuple[Rule, ...]
    nonlinear: str = NONLINEAR[0]
    propagation: str = PROPAGATIONS[0]
    layer_norm_scale: str = LAYER_NORM_SCALES[0]
    centring: bool = False
    correction: str = CORRECTIONS[0]

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            value = getattr(self, key)
            if value not in known:
                raise RecipeError(f"recipe {self.name}: {key} is {value!r}, expected one of {', '.join(known)}")
        if self.nonlinear == "published" and self.propagation == "quantized":
            raise RecipeError(
                f"recipe {self.name}: the published forms are calibrated on float activations; "
                "say 'propagation: float' or 'nonlinear: corrected'"
            )


#: What is not chosen among percentile ranges by the error at a result.
_NO_PERCENTILE_OUTPUT = frozenset({"weight", "query", "key", "value"})
#: Widths that the integer operators read at each kind; everything else is a mistake in a recipe.
_WIDE_KINDS = frozenset({"residual", "constant", "output"})
#: Operands of products, which read any levels.
_CODEBOOK_KINDS = frozenset(
    {
        *("linear_input", "activation_output", "probability", "query", "key", "value"),
        *("matmul_left", "matmul_right", "multiply_input"),
    }
)
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


def is_possible(recipe: Recipe, site: Site, spec: QuantSpec) -> bool:
    """Whether a site can have a spec."""
    try:
        _require_possible(recipe, site, spec)
    except RecipeError:
        return False
    return True


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
    if spec.search == "feedback" and site.kind != "weight":
        raise RecipeError(f"{where} is no weight; only weights have the search 'feedback'")
    if spec.search == "percentile_output" and site.kind in _NO_PERCENTILE_OUTPUT:
        raise RecipeError(f"{where} has no search 'percentile_output'; 'output' is the one that looks at results")
    if spec.format != "uniform" and site.kind not in _CODEBOOK_KINDS:
        raise RecipeError(f"{where} is uniform; the rule says {spec.format!r}")
    if spec.bits > 8 and site.kind not in _WIDE_KINDS:
        raise RecipeError(f"{where} can have 2 to 8 bits, the rule says {spec.bits}")


def _unmatched(recipe: Recipe, rule: Rule, index: int, sites: Sequence[Site]) -> str:
    if rule.name != "*":
        close = difflib.get_close_matches(rule.name, [site.name for site in sites], n=3, cutoff=0.3)
        hint = f"close site names: {', '.join(close)}" if close else "see the site names with 'ptq inspect'"
    else:
        hint = f"kinds in this model: {', '.join(sorted({site.kind for site in sites}))}; all: {', '.join(SITE_KINDS)}"
    return f"recipe {recipe.name}: rule {index + 1} (kind {rule.kind!r}, name {rule.name!r}) matched no site; {hint}"
