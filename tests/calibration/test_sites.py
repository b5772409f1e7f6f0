"""Sites are found by structure: which tensors get a format, what they are called, who reads them."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from support.models import MODELS, Formula, calibrated, images, spread, traced
from torch import nn
from torch.nn import functional

from calibration.rules import Recipe, Rule
from calibration.simulate import simulate
from calibration.sites import OUTPUT, SITE_KINDS, Structure, find_sites
from calibration.trace import trace
from quantizers.spec import QuantSpec

TWO_BLOCKS = [
    ("patch_embed.proj.input", "image"),
    ("patch_embed.proj.weight", "weight"),
    ("residual", "residual"),
    ("pos_embed", "constant"),
    ("blocks.0.norm1.input", "residual"),
    ("blocks.0.attn.qkv.input", "linear_input"),
    ("blocks.0.attn.qkv.weight", "weight"),
    ("blocks.0.attn.query", "query"),
    ("blocks.0.attn.key", "key"),
    ("blocks.0.attn.scores", "scores"),
    ("blocks.0.attn.probability", "probability"),
    ("blocks.0.attn.value", "value"),
    ("blocks.0.attn.proj.input", "linear_input"),
    ("blocks.0.attn.proj.weight", "weight"),
    ("blocks.0.norm2.input", "residual"),
    ("blocks.0.mlp.fc1.input", "linear_input"),
    ("blocks.0.mlp.fc1.weight", "weight"),
    ("blocks.0.mlp.act.input", "activation_input"),
    ("blocks.0.mlp.fc2.input", "activation_output"),
    ("blocks.0.mlp.fc2.weight", "weight"),
    ("blocks.1.norm1.input", "residual"),
    ("blocks.1.attn.qkv.input", "linear_input"),
    ("blocks.1.attn.qkv.weight", "weight"),
    ("blocks.1.attn.query", "query"),
    ("blocks.1.attn.key", "key"),
    ("blocks.1.attn.scores", "scores"),
    ("blocks.1.attn.probability", "probability"),
    ("blocks.1.attn.value", "value"),
    ("blocks.1.attn.proj.input", "linear_input"),
    ("blocks.1.attn.proj.weight", "weight"),
    ("blocks.1.norm2.input", "residual"),
    ("blocks.1.mlp.fc1.input", "linear_input"),
    ("blocks.1.mlp.fc1.weight", "weight"),
    ("blocks.1.mlp.act.input", "activation_input"),
    ("blocks.1.mlp.fc2.input", "activation_output"),
    ("blocks.1.mlp.fc2.weight", "weight"),
    ("norm.input", "residual"),
    ("head.input", "linear_input"),
    ("head.weight", "weight"),
]


def test_sites_of_two_blocks() -> None:
    """The sites of a plain ViT with two blocks, in execution order."""
    assert [(site.name, site.kind) for site in find_sites(traced("ours"))] == TWO_BLOCKS


def test_structure_decides_not_names() -> None:
    """timm's ViT, which is written differently, has the same kinds in the same order."""
    assert [site.kind for site in find_sites(traced("vit"))] == [kind for _, kind in TWO_BLOCKS]


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_well_formed(name: str) -> None:
    """Names are unique, kinds are known, no edge has two formats, and an edge reads its site's value."""
    graph = traced(name)
    sites = find_sites(graph)
    structure = Structure(graph)
    assert len({site.name for site in sites}) == len(sites)
    assert {site.kind for site in sites} <= set(SITE_KINDS)
    edges = [edge for site in sites for edge in site.edges]
    assert len(set(edges)) == len(edges)
    for site in sites:
        for operation, position in site.edges:
            value = dict(enumerate(v for _, v in graph.outputs)) if operation == OUTPUT else None
            read = structure.producers[operation].inputs[position] if value is None else value[position]
            assert structure.whole(read) == structure.whole(site.value)


@pytest.mark.parametrize("name", MODELS)
def test_every_product_operand_has_a_format(name: str) -> None:
    """No linear, convolution or matrix product reads a float: exactly one site on each operand but biases."""
    graph = traced(name)
    edges = {edge for site in find_sites(graph) for edge in site.edges}
    for operation in graph.operations:
        if operation.op in ("linear", "conv2d", "matmul", "multiply"):
            assert {(operation.name, 0), (operation.name, 1)} <= edges


def test_the_residual_stream_is_one_site_for_both_readers() -> None:
    """LayerNorm and the next residual add read the stream in one format."""
    (site,) = [site for site in find_sites(traced("ours")) if site.name == "blocks.1.norm2.input"]
    assert [position for _, position in site.edges] == [0, 0]
    producers = traced("ours").producers()
    assert [producers[operation].op for operation, _ in site.edges] == ["layer_norm", "add"]


def test_relative_position_biases_are_constants() -> None:
    """Swin adds a bias table to the scores, and in shifted blocks a mask: additive constants with formats."""
    graph = traced("swin")
    producers = graph.producers()
    found = [
        (site.name, tuple(graph.constants[site.value].shape), producers[site.edges[0][0]].op)
        for site in find_sites(graph)
        if site.kind == "constant"
    ]
    # The first stage has windows beside the batch on axis 0; the second has one window only.
    bias, mask, last = (1, 2, 16, 16), (4, 1, 16, 16), (4, 16, 16)
    assert [shape for _, shape, _ in found] == [bias, bias, mask, last, last]
    assert {op for _, _, op in found} == {"add"}
    kinds = collections.Counter(site.kind for site in find_sites(graph))
    assert kinds["scores"] == kinds["probability"] == kinds["query"] == kinds["key"] == kinds["value"] == 4


@pytest.mark.parametrize(
    ("formula", "kinds"),
    [
        (lambda x, a: a(x), ["image", "weight"]),
        (lambda x, a: a(x / 255), ["image", "weight"]),
        (lambda x, a: functional.gelu(a(x)), ["image", "weight", "activation_input", "output"]),
        (lambda x, a: a(x).softmax(-1), ["image", "weight", "scores", "output"]),
        (lambda x, a: a(x) + x, ["image", "weight", "residual", "output"]),
        (lambda x, a: a(x) * x, ["image", "weight", "multiply_input", "multiply_input"]),
        (lambda x, a: a(x) @ x.transpose(1, 2), ["image", "weight", "matmul_left", "matmul_right"]),
        (lambda x, a: a(x).mean(1), ["image", "weight", "residual"]),
        (lambda x, a: a(functional.gelu(a(x))), ["image", "weight", "activation_input", "activation_output"]),
    ],
)
def test_kinds(formula: object, kinds: list[str]) -> None:
    """One operator at a time; a linear's result is an accumulator and needs no format as an output."""
    graph = trace(spread(Formula(formula, nn.Linear(8, 8))), (torch.ones(2, 6, 8),))
    assert [site.kind for site in find_sites(graph)] == kinds


def test_every_site_takes_part_in_the_simulation() -> None:
    """Each of the sites changes the simulated output when its format, of 3 bits, is taken away.

    Weights and tables lie on the grids of their formats: without one they are those of the float graph.
    """
    narrow = QuantSpec(3)
    rules = (Rule(QuantSpec(3, granularity="channel"), "weight"), Rule(narrow))
    whole = calibrated("ours", Recipe("narrow", rules))
    # Many images: of a few, the next coarse format can round away what another one changes.
    x = images("ours", 32)
    (with_all,) = simulate(whole, (x,))
    for index, entry in enumerate(whole.sites):
        floats = {name: tensor for name, tensor in whole.float_constants.items() if name == entry.site.value}
        graph = dataclasses.replace(whole.graph, constants={**whole.graph.constants, **floats})
        fewer = dataclasses.replace(whole, graph=graph, sites=whole.sites[:index] + whole.sites[index + 1 :])
        (without,) = simulate(fewer, (x,))
        assert not torch.equal(with_all, without), entry.site.name
