"""Recipes: the first rule that matches wins, and every mistake is named."""

from __future__ import annotations

import pytest
from support.models import recipe, traced

from calibration.rules import Recipe, Rule, assign_specs
from calibration.sites import find_sites
from quantizers.errors import RecipeError
from quantizers.spec import QuantSpec

WEIGHT = QuantSpec(8, granularity="channel")
WIDE = QuantSpec(16)
BYTE = QuantSpec(8)
SITES = find_sites(traced("ours"))


def assign(*rules: Rule) -> dict[str, QuantSpec]:
    return assign_specs(SITES, Recipe("test", rules))


def test_every_site_gets_a_spec() -> None:
    """The usual recipe: weights by channel, a wide residual stream, one width for all else."""
    specs = assign_specs(SITES, recipe(4, 6))
    assert set(specs) == {site.name for site in SITES}
    for site in SITES:
        width = {"weight": 4, "residual": 16, "constant": 16}.get(site.kind, 6)
        assert specs[site.name].bits == width


def test_the_first_match_wins() -> None:
    """A narrow rule before a wide one decides; after it, it decides nothing but is no mistake."""
    special, general = Rule(QuantSpec(4), "query", "blocks.0.*"), Rule(BYTE)
    before = assign(Rule(WEIGHT, "weight"), special, general)
    assert (before["blocks.0.attn.query"].bits, before["blocks.1.attn.query"].bits) == (4, 8)
    after = assign(Rule(WEIGHT, "weight"), general, special)
    assert (after["blocks.0.attn.query"].bits, after["blocks.1.attn.query"].bits) == (8, 8)


def test_patterns_match_kind_and_name() -> None:
    """Both patterns must match, with shell wildcards, whole and with their case."""
    rule = Rule(BYTE, "*_*put", "blocks.?.mlp.*")
    matched = [site.name for site in SITES if rule.matches(site)]
    assert matched == [f"blocks.{i}.mlp.{layer}.input" for i in (0, 1) for layer in ("fc1", "act", "fc2")]
    assert not any(Rule(BYTE, name="BLOCKS.*").matches(site) for site in SITES)
    assert not any(Rule(BYTE, name="blocks").matches(site) for site in SITES)


def test_a_rule_that_matches_nothing_shows_close_names() -> None:
    """A misspelt name is refused with the names that it may have meant."""
    with pytest.raises(RecipeError) as caught:
        assign(Rule(BYTE, name="blocks.0.attn.quer"), Rule(WEIGHT, "weight"), Rule(BYTE))
    text, _, hint = str(caught.value).partition("; ")
    assert text == "recipe test: rule 1 (kind '*', name 'blocks.0.attn.quer') matched no site"
    assert hint.startswith("close site names: blocks.0.attn.query, ")


def test_a_kind_that_matches_nothing_shows_the_kinds() -> None:
    """A kind that the model lacks is refused with those it has and those there are."""
    with pytest.raises(RecipeError) as caught:
        assign(Rule(WEIGHT, "weight"), Rule(BYTE), Rule(BYTE, "matmul_left"))
    text, _, hint = str(caught.value).partition("; ")
    assert text == "recipe test: rule 3 (kind 'matmul_left', name '*') matched no site"
    assert hint.startswith("kinds in this model: activation_input, activation_output, constant, image, ")


def test_an_optional_rule_may_match_nothing() -> None:
    """Presets serve models that lack some kinds."""
    assign(Rule(WEIGHT, "weight"), Rule(BYTE, "matmul_left", optional=True), Rule(BYTE))


def test_a_site_without_a_rule_is_refused() -> None:
    """The message names the site, its kind, and the rule to add."""
    with pytest.raises(RecipeError) as caught:
        assign(Rule(WEIGHT, "weight"), Rule(BYTE, "image"))
    assert str(caught.value) == ("recipe test: no rule matches site residual (residual); add a last rule for kind '*'")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (Rule(WEIGHT, "weight"), Rule(WIDE, "query"), Rule(BYTE)),
            "site blocks.0.attn.query (query) can have 2 to 8 bits, the rule says 16",
        ),
        (
            (Rule(WEIGHT, "weight"), Rule(QuantSpec(8, search="percentile_output"), "query"), Rule(BYTE)),
            "site blocks.0.attn.query (query) has no search 'percentile_output'",
        ),
        (
            (Rule(WIDE, "image"), Rule(WEIGHT, "weight"), Rule(BYTE)),
            "site patch_embed.proj.input (image) can have 2 to 8 bits, the rule says 16",
        ),
        (
            (Rule(QuantSpec(16, granularity="channel"), "weight"), Rule(BYTE)),
            "site patch_embed.proj.weight (weight) can have 2 to 8 bits, the rule says 16",
        ),
        ((Rule(BYTE),), "site patch_embed.proj.weight (weight) needs granularity 'channel', the rule says 'tensor'"),
        ((Rule(WEIGHT),), "site patch_embed.proj.input (image) needs granularity 'tensor', the rule says 'channel'"),
        (
            (Rule(QuantSpec(8, symmetric=False, granularity="channel"), "weight"), Rule(BYTE)),
            "site patch_embed.proj.weight (weight) needs symmetric weights",
        ),
    ],
)
def test_impossible_specs_name_the_site(rules: tuple[Rule, ...], message: str) -> None:
    """A spec that a site cannot have: site, kind, what it can have, what the rule says."""
    with pytest.raises(RecipeError) as caught:
        assign(*rules)
    assert message in str(caught.value)
