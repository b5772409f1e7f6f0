"""Recipes of mixed widths: every weight gets its own, everything else stays, and the YAML reads back equal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import traced

from calibration.rules import assign_specs
from calibration.sites import Site, find_sites
from ptq.mixed_precision.recipe import mixed_recipe
from ptq.recipe import dump_recipe, parse_recipe
from ptq.recipes import named_recipe

BASE = named_recipe("auto", "w8a8")


def weights(sites: list[Site]) -> dict[str, Site]:
    return {site.name: site for site in sites if site.kind == "weight"}


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["ours", "dinov2"]), st.data())
def test_each_weight_gets_its_width_and_nothing_else_changes(name: str, data: st.DataObject) -> None:
    sites = list(find_sites(traced(name)))
    mine = weights(sites)
    widths = {site: data.draw(st.sampled_from([3, 4, 6, 8])) for site in mine}
    recipe = mixed_recipe(BASE, mine, widths, "mixed")
    assert parse_recipe(dump_recipe(recipe), "it") == recipe
    before, after = assign_specs(sites, BASE), assign_specs(sites, recipe)
    for site in sites:
        if site.kind == "weight":
            assert after[site.name].bits == widths[site.name]
            assert after[site.name].search == before[site.name].search
        else:
            assert after[site.name] == before[site.name]


def test_one_width_is_the_recipe_of_that_width() -> None:
    mine = weights(list(find_sites(traced("ours"))))
    recipe = mixed_recipe(BASE, mine, dict.fromkeys(mine, 4), "auto-w4a8")
    assert recipe == named_recipe("auto", "w4a8")


def test_blocks_that_are_alike_share_a_rule() -> None:
    mine = weights(list(find_sites(traced("ours"))))
    widths = {name: 3 if ".mlp." in name else 8 for name in mine}
    widths["blocks.1.attn.qkv.weight"] = 4
    recipe = mixed_recipe(BASE, mine, widths, "mixed")
    named = {rule.name: rule.spec.bits for rule in recipe.rules if rule.name != "*"}
    assert named == {"blocks.*.mlp.fc1.weight": 3, "blocks.*.mlp.fc2.weight": 3, "blocks.1.attn.qkv.weight": 4}


@pytest.mark.parametrize("name", ["a[0].weight", "a*.weight", "a?.0.weight", "[!x].weight"])
def test_names_that_look_like_patterns_are_names(name: str) -> None:
    odd, plain = (Site(text, "weight", text, ((text, 1),)) for text in (name, "ab.weight"))
    other, more = (Site(text, "weight", text, ((text, 1),)) for text in ("y.weight", "z.weight"))
    mine = {site.name: site for site in (odd, plain, other, more)}
    widths = {name: 3, "ab.weight": 8, "y.weight": 8, "z.weight": 8}
    recipe = parse_recipe(dump_recipe(mixed_recipe(BASE, mine, widths, "mixed")), "it")
    specs = assign_specs([*mine.values(), Site("x.input", "linear_input", "x", (("x", 0),))], recipe)
    assert {site: specs[site].bits for site in mine} == widths
