"""The published forms of I-ViT from calibration to integers: the same numbers in the simulation and in the program."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch
from support.models import MODELS, Formula, calibrated, images, spread, traced
from support.stepwise import steps_apart
from torch import Tensor, nn
from torch.nn import functional

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import Graph, execute
from calibration.integerize import integerize
from calibration.integerize.published import i_layer_norm_constants
from calibration.published import PUBLISHED_OPERATORS, published_executors
from calibration.rules import Recipe, Rule
from calibration.serialize import calibrated_from_bytes, calibrated_to_bytes
from calibration.simulate import simulate
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.errors import ProgramError, RecipeError, UnsupportedOperatorError, UsageError
from quantizers.integer.interpret import interpret
from quantizers.integer.verify import verify
from quantizers.shiftmax import ShiftmaxQParams, cut_off
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams

IVIT = named_recipe("ivit", "w8a8")
#: For an operator alone: 16 bits before and after it.
WIDE = Recipe("wide", (Rule(QuantSpec(16)),), "published")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def with_probability_bits(bits: int) -> Recipe:
    return Recipe("t", (Rule(QuantSpec(bits), "probability", optional=True), *IVIT.rules), "published")


def calibrated_formula(formula: object, x: Tensor, *layers: nn.Module, chosen: Recipe = IVIT) -> Calibrated:
    graph = trace(spread(Formula(formula, *layers)), (x[:2],))
    return calibrate(graph, [(i,) for i in x], chosen)


@pytest.mark.parametrize("name", MODELS)
def test_each_operator_is_the_simulations(name: str) -> None:
    """Given the same codes, codes are the simulation's to one step, and all but one in fifty are equal."""
    for site, steps in steps_apart(calibrated(name, IVIT), images(name, 4, seed=9)).items():
        assert float(steps.max()) <= 1, site
        assert float((steps > 0).float().mean()) <= 1 / 50, site


@pytest.mark.parametrize("name", MODELS)
def test_integers_are_as_good_as_the_simulation(name: str) -> None:
    """The integers are closer to the simulation than float is, and about as close to float as it is."""
    x = images(name, 8, seed=5)
    result = calibrated(name, IVIT)
    (exact,), (simulated,) = execute(result.float_graph(), (x,)), simulate(result, (x,))
    (integers,) = interpret(integerize(result), x)
    assert relative(integers, simulated) < 0.7 * relative(simulated, exact)
    assert relative(integers, exact) < 1.3 * relative(simulated, exact)


def test_each_operators_share_can_be_told() -> None:
    """With one published operator the result differs from that with none, and from that with all."""
    result, x = calibrated("vit", IVIT), images("vit", 4, seed=5)
    none, every = simulate(result, (x,), ())[0], simulate(result, (x,))[0]
    assert torch.equal(simulate(result, (x,), PUBLISHED_OPERATORS)[0], every)
    assert set(published_executors(result.graph, result.by_edge())) == set(PUBLISHED_OPERATORS)
    for operator in PUBLISHED_OPERATORS:
        alone = simulate(result, (x,), (operator,))[0]
        assert not torch.equal(alone, none)
        assert not torch.equal(alone, every)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_program_holds_the_published_operators(bits: int) -> None:
    """No table and no exact LayerNorm is left; probabilities have the width that the recipe gives them."""
    program = integerize(calibrated("ours", with_probability_bits(bits)))
    count = collections.Counter(node.op for node in program.nodes)
    assert not {"exponentials", "row_sum", "normalize_rows", "lookup", "layer_norm"} & count.keys()
    assert (count["shiftmax"], count["shift_gelu"], count["i_layer_norm"]) == (2, 2, 5)
    for node in program.nodes:
        if node.op == "shiftmax":
            assert (node.type.dtype, node.integer("bits"), node.integer("window")) == (f"int{bits}", bits, 15)
        if node.op == "i_layer_norm":
            assert (node.integer("start"), node.integer("iterations")) == (-1, 10)
        if node.op == "shift_gelu":
            assert (node.integer("window"), node.integer("bits")) == (23, 8)


def test_sums_round_each_side_on_its_own() -> None:
    """Every sum is of two int32 values in steps of the result, doubled and halved; tables are rescaled beforehand."""
    program = integerize(calibrated("ours", IVIT))
    types = program.types()
    sums = [node for node in program.nodes if node.op == "add"]
    assert len(sums) == 5
    for node in sums:
        assert {types[name].dtype for name in node.inputs[:2]} == {"int32"}
        assert node.integer("shift") == 1
        assert [program.constants[name].tolist() for name in node.inputs[2:]] == [[2], [2]]


def test_two_roundings_differ_from_one() -> None:
    """0.5 + 0.5 steps are rounded up twice: two steps instead of one, in the integers and in the simulation."""
    x = torch.tensor([[[0.5, 0.25]], [[127.0, 0.0]]])
    graph = trace(Formula(lambda x: x * 1.0 + x), (x,))
    fine, coarse = UniformQParams((0.5,), 0, -32768, 32767), UniformQParams((1.0,), 0, -128, 127)
    results = []
    for recipe in (WIDE, dataclasses.replace(WIDE, nonlinear="corrected")):
        result = calibrate(graph, [(i,) for i in x], recipe)
        sites = tuple(
            dataclasses.replace(entry, qparams=coarse if entry.site.kind == "output" else fine)
            for entry in result.sites
        )
        result = dataclasses.replace(result, sites=sites)
        (integers,), (simulated,) = interpret(integerize(result), x), simulate(result, (x,))
        results.append(float(integers[0, 0, 0]))
        assert float(simulated[0, 0, 0]) == results[-1]
    assert results == [2.0, 1.0]


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, a, _: functional.gelu(a(x)),
        lambda x, a, _: functional.gelu(a(x), approximate="tanh"),
        lambda x, a, b: b(functional.silu(a(x)) * a(x)),
        lambda x, a, _: a(x).softmax(-1),
        lambda x, a, b: (a(x) @ b(x).transpose(1, 2)).softmax(-1) @ b(x).reshape(-1, 6, 8),
        lambda x, a, b: (a(x) @ b(x).transpose(1, 2) + torch.eye(6)).softmax(-1) @ b(x),
        lambda x, a, b: functional.layer_norm(b(x) + a(x) + torch.ones(8), (8,)),
    ],
)
def test_small_formulas(formula: object) -> None:
    """One structure at a time, close to the simulation: what the sums' second rounding moves is below 1 %."""
    x = torch.randn(32, 6, 8, generator=torch.Generator().manual_seed(0))
    result = calibrated_formula(formula, x, nn.Linear(8, 8), nn.Linear(8, 8))
    for integers, simulated in zip(interpret(integerize(result), x), simulate(result, (x,)), strict=True):
        assert relative(integers, simulated) < 0.01


def test_asymmetric_formats_are_allowed() -> None:
    """The published forms are symmetric; zero points cancel in two of them and are taken off in the third."""
    rules = tuple(
        dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, symmetric=False))
        if rule.kind != "weight"
        else rule
        for rule in IVIT.rules
    )
    result = calibrated("ours", Recipe("t", rules, "published"))
    steps = steps_apart(result, images("ours", 4, seed=9))
    assert all(float(s.max()) <= 1 for s in steps.values())


def _normed(gamma: list[float], beta: list[float]) -> tuple[Graph, Tensor]:
    x = torch.randn(32, 6, 4, generator=torch.Generator().manual_seed(0))
    layer = nn.LayerNorm(4)
    module = Formula(lambda x, a: a(x), layer).eval()
    layer.weight.data, layer.bias.data = torch.tensor(gamma), torch.tensor(beta)
    return trace(module, (x[:2],)), x


def test_a_gamma_of_zero_is_refused_by_name() -> None:
    """Beta is held as a multiple of gamma; without gamma there is none. Before any calibration, with the advice."""
    graph, x = _normed([1.0, 0.0, 1.0, 1.0], [0.5, 0.25, 0.0, 0.0])
    result = calibrate(graph, [(i,) for i in x], WIDE)
    with pytest.raises(UnsupportedOperatorError, match="published layer_norm with a gamma of zero") as caught:
        integerize(result)
    assert "layers.0" in str(caught.value)
    assert "nonlinear: corrected" in str(caught.value)
    with pytest.raises(ProgramError, match=r"layers\.0: the published I-LayerNorm divides beta by gamma; channel 1"):
        simulate(result, (x,))
    integerize(calibrate(graph, [(i,) for i in x], dataclasses.replace(WIDE, nonlinear="corrected")))


def test_a_channel_without_gamma_and_beta_is_zero() -> None:
    """Where both are zero nothing has to be expressed."""
    graph, x = _normed([1.0, 0.0, 1.0, -1.0], [0.5, 0.0, 0.0, 0.0])
    result = calibrate(graph, [(i,) for i in x], WIDE)
    (integers,), (simulated,) = interpret(integerize(result), x), simulate(result, (x,))
    assert torch.equal(integers[..., 1], torch.zeros(32, 6))
    assert relative(integers, simulated) < 0.01


def test_a_bias_beyond_int32_stays_right() -> None:
    """A small gamma beside a beta: 32 bits would overflow, 64 give what the simulation and float have."""
    graph, x = _normed([1.0, 1e-3, 1.0, 1.0], [0.5, 0.75, 0.0, 0.0])
    result = calibrate(graph, [(i,) for i in x], WIDE)
    program = integerize(result)
    (node,) = [node for node in program.nodes if node.op == "i_layer_norm"]
    assert int(np.abs(program.constants[node.inputs[2]]).max()) > 2**31
    (integers,), (exact,) = interpret(program, x), execute(graph, (x,))
    step = float(program.constants[program.nodes[-1].inputs[1]][0])
    assert float((integers - exact)[..., 1].abs().max()) <= 1.01 * step


def test_a_ratio_beyond_64_bits_is_refused() -> None:
    """With the layer, the channel and the ratio."""
    graph, x = _normed([1.0, 1e-20, 1.0, 1.0], [0.5, 0.75, 0.0, 0.0])
    result = calibrate(graph, [(i,) for i in x], WIDE)
    with pytest.raises(ProgramError, match=r"layers\.0: .* channel 1"):
        integerize(result)


def test_constants_reproduce_gamma_and_beta() -> None:
    gamma, beta = np.array([2.0, -0.5, 0.01]), np.array([1.0, 3.0, -0.2])
    made = i_layer_norm_constants(gamma, beta, "here")
    np.testing.assert_allclose(made.gain * made.bias, beta, atol=1e-8)
    np.testing.assert_allclose(made.gain * 2**30 / np.sqrt(3), gamma)


@pytest.mark.parametrize("bits", [8, 16])
def test_an_artifact_keeps_the_forms(bits: int) -> None:
    """Recipe and probability formats come back equal, and with them the program."""
    result = calibrated("ours", with_probability_bits(bits))
    again = calibrated_from_bytes(*calibrated_to_bytes(result))
    assert again.recipe == result.recipe
    assert [entry.qparams for entry in again.sites] == [entry.qparams for entry in result.sites]
    assert integerize(again) == integerize(result)


def test_the_narrow_probabilities_are_the_wide_ones_cut_off() -> None:
    """So that one softmax of the simulation serves readers of both widths."""
    wide = torch.arange(0, 2**15) * 2.0**-15
    narrow = cut_off(wide, ShiftmaxQParams(8))
    assert torch.equal(narrow * 2**7, torch.arange(0, 2**15) >> 8)
    assert torch.equal(cut_off(wide, ShiftmaxQParams(16)), wide)


def test_wrong_recipes_are_refused() -> None:
    with pytest.raises(RecipeError, match="recipe t: nonlinear is 'paper', expected one of corrected, published"):
        Recipe("t", IVIT.rules, "paper")
    with pytest.raises(RecipeError, match=r"has 8 or 16 bits in its published form, the rule says 4"):
        calibrate(traced("ours"), [(x,) for x in images("ours", 2)], with_probability_bits(4))
    with pytest.raises(RecipeError, match=r"\(probability\) can have 2 to 8 bits, the rule says 16"):
        calibrate(traced("ours"), [(x,) for x in images("ours", 2)], Recipe("t", IVIT.rules))
    with pytest.raises(UsageError, match="published probabilities have 8 or 16 bits, got 12"):
        ShiftmaxQParams(12)


@pytest.mark.parametrize("name", MODELS)
def test_the_verifier_accepts(name: str) -> None:
    assert max(interval.magnitude for interval in verify(integerize(calibrated(name, IVIT))).values()) < 2**31
