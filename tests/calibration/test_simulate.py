"""The simulation: every site fake-quantized, everything else float."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import MODELS, Formula, calibrated, images, model, recipe, spread, traced
from torch import nn
from torch.nn import functional

from calibration.engine import calibrate
from calibration.graph import execute
from calibration.integerize import integerize, multipliers_of
from calibration.rules import Rule
from calibration.simulate import apply, simulate
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.codebook import CodebookQParams, fake_quantize_codebook, uniform_codebook
from quantizers.integer.interpret import interpret
from quantizers.logarithm import log2
from quantizers.row_relative import RowRelativeQParams, fake_quantize_rows
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams, dequantize, fake_quantize, quantize


def test_a_linear_by_hand() -> None:
    """Input and weight are fake-quantized, the bias is rounded to the steps of their product, the result is not."""
    layer = spread(nn.Linear(8, 4))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    result = calibrate(trace(layer, (x,)), [(row,) for row in x], recipe(4, 6))
    source, weight = (entry.qparams for entry in result.sites)
    assert isinstance(source, UniformQParams)
    assert isinstance(weight, UniformQParams)
    steps = torch.tensor(weight.scale, dtype=torch.float64) * source.scale[0]
    bias = (layer.bias.detach() / steps).round() * steps
    assert 0 < float((bias - layer.bias).detach().abs().max()) <= float(steps.max()) / 2
    codes = quantize(x, source).to(torch.float64)
    expected = functional.linear(
        dequantize(codes, source), fake_quantize(layer.weight.detach().to(torch.float64), weight), bias
    )
    assert torch.equal(simulate(result, (x,))[0], expected.to(torch.float32))


@pytest.mark.parametrize("family", ["tangent", "adalog", "sulq"])
@pytest.mark.parametrize("name", MODELS)
def test_levels_behind_sums_are_predicted_to_the_last_code(name: str, family: str) -> None:
    """The program rounds to carrier codes before it looks levels up, and so does the simulation."""
    plain = named_recipe("minmax", "w6a6")
    coded = Rule(QuantSpec(6, symmetric=False, search="output", format=family), kind="linear_input", optional=True)
    result = calibrate(
        traced(name),
        [(image,) for image in images(name, 8)],
        dataclasses.replace(plain, rules=(coded, *plain.rules)),
    )
    assert any(isinstance(entry.qparams, CodebookQParams) for entry in result.sites)
    x = images(name, 8, seed=1)
    expected = simulate(result, (x,), multipliers=multipliers_of(result))
    for found, wanted in zip(interpret(integerize(result), x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("method", "bits"),
    [("auto", "w8a8"), ("auto", "w4a4"), ("repq", "w3a3"), ("adalog", "w4a4"), ("minmax", "w8a8")],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_predicted_to_the_last_code(name: str, method: str, bits: str) -> None:
    """What is simulated is what runs: results of the program differ by the rounding of float32 only."""
    result = calibrate(traced(name), [(image,) for image in images(name, 8)], named_recipe(method, bits))
    x = images(name, 8, seed=1)
    (simulated,) = simulate(result, (x,), multipliers=multipliers_of(result))
    (integers,) = interpret(integerize(result), x)
    torch.testing.assert_close(integers, simulated, rtol=1e-6, atol=1e-6)


def test_formats_are_applied_by_their_type() -> None:
    row = torch.tensor([[0.1, 0.2, 0.7]])
    qparams = RowRelativeQParams(uniform_codebook(3))
    assert torch.equal(apply(qparams, row), fake_quantize_rows(row, qparams))
    levels = CodebookQParams(log2(4), 2.0**-8, 0)
    assert torch.equal(apply(levels, row), fake_quantize_codebook(row, levels))


@pytest.mark.parametrize("name", MODELS)
def test_8_bits_are_close_to_float(name: str) -> None:
    """At 8 bits the outputs are within 10 % of the float outputs, in norm.

    Random weights amplify: two blocks of trained ones are an order of magnitude closer.
    """
    x = images(name, 8, seed=5)
    (simulated,) = simulate(calibrated(name), (x,))
    with torch.no_grad():
        expected = model(name)(x)
    assert simulated.dtype == torch.float32
    assert float((simulated - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_are_closer(symmetric: bool) -> None:
    """The distance to float falls from 3 to 4, 6 and 8 bits."""
    x = images("vit", 8, seed=5)
    (expected,) = execute(traced("vit"), (x,))
    errors = []
    for bits in (3, 4, 6, 8):
        result = calibrated("vit", recipe(bits, bits, "mse", symmetric=symmetric))
        errors.append(float((simulate(result, (x,))[0] - expected).norm() / expected.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("name", ["ours", "swin"])
def test_samples_do_not_see_each_other(name: str) -> None:
    """A sample's result does not depend on the batch it is in, up to codes that float32 rounding tips over."""
    x = images(name, 5, seed=5)
    result = calibrated(name)
    (together,) = simulate(result, (x,))
    alone = torch.cat([simulate(result, (image[None],))[0] for image in x])
    torch.testing.assert_close(alone, together, rtol=0.02, atol=0.02)


def test_nothing_is_changed() -> None:
    """The simulation leaves images, weights and parameters as they were."""
    result = calibrated("ours")
    x = images("ours", 3)
    kept = x.clone(), {name: tensor.clone() for name, tensor in result.graph.constants.items()}
    first = simulate(result, (x,))[0]
    assert torch.equal(simulate(result, (x,))[0], first)
    assert torch.equal(x, kept[0])
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in result.graph.constants.items())


def test_a_weight_that_two_layers_share_is_quantized_once() -> None:
    """Both uses read the same codes."""
    layer = spread(nn.Linear(8, 8))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    result = calibrate(trace(Formula(lambda x, a: a(functional.gelu(a(x))), layer), (x,)), [(i,) for i in x], recipe(3))
    (weight,) = (entry for entry in result.sites if entry.site.kind == "weight")
    assert len(weight.site.edges) == 2
