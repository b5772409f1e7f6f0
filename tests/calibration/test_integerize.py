"""From a calibrated graph to integers: operator by operator the simulation's codes, and a lean program."""

from __future__ import annotations

import collections
import re
from dataclasses import replace

import pytest
import torch
from support.models import MODELS, Formula, calibrated, images, recipe, spread, traced
from support.stepwise import steps_apart
from torch import Tensor, nn
from torch.nn import functional

from calibration.engine import calibrate
from calibration.graph import execute
from calibration.integerize import integerize
from calibration.rules import Recipe, Rule
from calibration.simulate import simulate
from calibration.trace import trace
from quantizers.errors import UnsupportedOperatorError
from quantizers.families import FAMILIES, candidates
from quantizers.integer.interpret import interpret, run
from quantizers.integer.program import IntegerProgram, Node
from quantizers.integer.verify import verify
from quantizers.row_relative import RowRelativeQParams
from quantizers.spec import QuantSpec


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def operators(program: IntegerProgram) -> dict[str, int]:
    return dict(collections.Counter(node.op for node in program.nodes))


def readers(program: IntegerProgram, name: str) -> list[Node]:
    return [node for node in program.nodes if name in node.inputs]


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "symmetric"),
    [(8, 8, True), (8, 8, False), (4, 4, True), (3, 3, False), (2, 8, True), (8, 2, False)],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_operator_is_the_simulations(name: str, weight_bits: int, activation_bits: int, symmetric: bool) -> None:
    """Given the same input codes, every operator's codes are the simulation's to one step, and mostly equal.

    What remains are values next to a rounding border, where the float32 sums of the simulation or the
    integers' fixed-point factors tip over: one in fifty at most.
    """
    result = calibrated(name, recipe(weight_bits, activation_bits, "mse", symmetric=symmetric))
    apart = steps_apart(result, images(name, 4, seed=9))
    computed = {
        entry.site.name
        for entry in result.sites
        if entry.site.value not in result.graph.constants and entry.site.kind != "probability"
    }
    assert set(apart) == computed
    for site, steps in apart.items():
        assert float(steps.max()) <= 1, site
        assert float((steps > 0).float().mean()) <= 1 / 50, site


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_integers_are_as_good_as_the_simulation(name: str, symmetric: bool) -> None:
    """At 8 bits the integers are closer to the simulation than float is, and as close to float as it is.

    A few codes differ by one step; random weights carry that to the output, where it stays below the
    quantization error itself.
    """
    x = images(name, 8, seed=5)
    result = calibrated(name, recipe(search="mse", symmetric=symmetric))
    (exact,), (simulated,) = execute(result.float_graph(), (x,)), simulate(result, (x,))
    (integers,) = interpret(integerize(result), x)
    assert integers.dtype == torch.float32
    assert integers.shape == exact.shape
    assert relative(integers, simulated) < relative(simulated, exact)
    assert relative(integers, exact) < 1.3 * relative(simulated, exact)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width(bits: int, symmetric: bool) -> None:
    """2 to 8 bits integerize and verify, in weights and activations at once, with codes inside the width."""
    result = calibrated("ours", recipe(bits, bits, "mse", symmetric=symmetric))
    program = integerize(result)
    intervals = verify(program)
    for entry in result.sites:
        if entry.site.kind == "weight":
            assert intervals[f"{entry.site.value}.codes"].magnitude <= 2 ** (bits - 1) - 1
    values = run(program, (images("ours", 5),))
    for node in program.nodes:
        if node.op in ("requantize", "lookup", "normalize_rows", "layer_norm") and node.type.dtype == "int8":
            assert -(2 ** (bits - 1)) <= int(values[node.name].min()) <= int(values[node.name].max()) < 2 ** (bits - 1)
        if node.op == "exponentials":
            assert int(values[node.name].max()) == 2**bits - 1


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_of_every_family(family: str, bits: int) -> None:
    """Levels stand in the tables of exponentials; integers are as close to the simulation as at uniform levels."""
    x, result = images("ours", 8, seed=5), calibrated("ours", recipe(search="mse"))
    row = RowRelativeQParams(candidates(family, bits)[-1])
    sites = tuple(replace(e, qparams=row) if e.site.kind == "probability" else e for e in result.sites)
    changed = replace(result, sites=sites)
    program = integerize(changed)
    verify(program)
    values = run(program, (x,))
    found = [values[node.name] for node in program.nodes if node.op == "exponentials"]
    assert found
    for levels in found:
        assert set(levels.unique().tolist()) <= set(row.codebook.levels)
        assert int(levels.max()) == row.codebook.levels[-1]
    (exact,), (simulated,), (integers,) = (
        execute(result.float_graph(), (x,)),
        simulate(changed, (x,)),
        interpret(program, x),
    )
    assert relative(integers, simulated) < relative(simulated, exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_narrow_residual_stream(bits: int) -> None:
    """A recipe may put the residual stream on 4 or 8 bits; the operators take it."""
    rules = (Rule(QuantSpec(8, granularity="channel"), "weight"), Rule(QuantSpec(bits), "residual"), Rule(QuantSpec(8)))
    result = calibrated("ours", Recipe("narrow", rules))
    assert all(float(steps.max()) <= 1 for steps in steps_apart(result, images("ours", 4)).values())
    assert {node.type.dtype for node in integerize(result).nodes if node.op == "add"} == {"int8"}


@pytest.mark.parametrize("name", MODELS)
def test_float_is_at_the_doors_only(name: str) -> None:
    """One quantize at the image and one dequantize for each output; everything between is integer."""
    program = integerize(calibrated(name))
    assert (operators(program)["quantize"], operators(program)["dequantize"]) == (1, 1)
    for node in program.nodes:
        assert (node.type.dtype == "float32") == (node.op == "dequantize")
    floats = [name for name, array in program.constants.items() if array.dtype.kind == "f"]
    assert [reader.op for name in floats for reader in readers(program, name)] == ["dequantize"]


@pytest.mark.parametrize("name", MODELS)
def test_the_verifier_accepts(name: str) -> None:
    """All rules hold and no accumulator can overflow, also at asymmetric 8 bits, where zero points add up."""
    for symmetric in (True, False):
        intervals = verify(integerize(calibrated(name, recipe(symmetric=symmetric))))
        assert max(interval.magnitude for interval in intervals.values()) < 2**62


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_does_not_matter(name: str) -> None:
    """Every sample gives the same bits alone and in a batch."""
    x = images(name, 3, seed=2)
    program = integerize(calibrated(name))
    (together,) = interpret(program, x)
    for index in range(3):
        assert torch.equal(interpret(program, x[index : index + 1])[0][0], together[index])


@pytest.mark.parametrize("name", ["ours", "vit", "deit", "dinov2", "swin"])
def test_a_fused_projection_has_one_requantize(name: str) -> None:
    """Queries, keys and values are channels of one linear: one requantize, with a multiplier for each channel."""
    program = integerize(calibrated(name))
    for node in program.nodes:
        if node.op == "linear" and re.search(r"\.qkv\.weight", node.inputs[1]):
            (requantize,) = readers(program, node.name)
            assert requantize.op == "requantize"
            assert program.constants[requantize.inputs[1]].shape == (node.type.shape[-1],)


@pytest.mark.parametrize("name", ["ours", "vit", "deit", "dinov2", "transformers"])
def test_patches_stay_rows(name: str) -> None:
    """From the patches to the token sequence nothing is permuted: the convolution's planes cancel with the flatten."""
    program = integerize(calibrated(name))
    sequence = [node.op for node in program.nodes]
    assert sequence[: sequence.index("concat") + 1] == ["quantize", "patches", "linear", "requantize", "concat"]


def test_scalings_cost_nothing() -> None:
    """The attention's division by the root of the width, and an image's by 255, become multipliers and scales."""
    x = torch.rand(16, 6, 8, generator=torch.Generator().manual_seed(0)) * 255
    module = spread(Formula(lambda x, a: functional.gelu(a(x / 255.0)) * 0.3, nn.Linear(8, 8)))
    result = calibrate(trace(module, (x,)), [(i,) for i in x], recipe())
    program = integerize(result)
    assert list(operators(program)) == ["quantize", "linear", "requantize", "lookup", "dequantize"]
    assert relative(interpret(program, x)[0], simulate(result, (x,))[0]) < 0.01


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "formula",
    [
        lambda x, a, _: functional.gelu(a(x)),
        lambda x, a, _: a(x).softmax(-1),
        lambda x, a, b: b(functional.silu(a(x)) * a(x)),
        lambda x, a, _: torch.cat([a(x), functional.relu(a(x)), x], -1),
        lambda x, a, b: a(x) @ b(x).transpose(1, 2),
        lambda x, a, b: (a(x) @ b(x).transpose(1, 2)).softmax(-1) @ b(x).reshape(-1, 6, 8),
        lambda x, a, _: a(x).mean(1),
        lambda x, a, b: functional.hardswish(a(x)) + b(x),
        lambda x, a, _: (x - 0.5) * 2 + a(x),
        lambda x, a, b: b(torch.tanh(a(x)) * torch.linspace(-1, 1, 8)),
        lambda x, a, _: functional.pad(functional.gelu(a(x)), (1, 2)),
        lambda x, a, _: functional.gelu(a(x)).roll((2, 1), (1, 2))[:, ::2],
        lambda x, a, b: {"first": x, "second": (a(x), functional.layer_norm(b(x), (8,)))},
    ],
)
def test_small_formulas(formula: object, symmetric: bool) -> None:
    """One structure at a time, symmetric and not: close to the simulation on every output."""
    x = torch.randn(32, 6, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(spread(Formula(formula, nn.Linear(8, 8), nn.Linear(8, 8))), (x[:2],))
    result = calibrate(graph, [(i,) for i in x], recipe(symmetric=symmetric))
    for integers, simulated in zip(interpret(integerize(result), x), simulate(result, (x,)), strict=True):
        assert relative(integers, simulated) < 0.01


def test_operators_without_an_integer_form_are_listed_at_once() -> None:
    """Grouped and dilated convolutions trace and simulate; integerize names all of them in one error."""
    layers = (
        nn.Conv2d(3, 6, 1),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.Conv2d(3, 6, 3, dilation=2, padding=2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
    )
    x = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    module = spread(Formula(lambda x, a, b, c, d: d(b(a(x))) + c(x), *layers))
    result = calibrate(trace(module, (x,)), [(i,) for i in x], recipe())
    assert relative(simulate(result, (x,))[0], module(x).detach()) < 0.1
    with pytest.raises(UnsupportedOperatorError) as caught:
        integerize(result)
    assert caught.value.nodes == {
        "grouped conv2d": ["conv2d_1 in layers.1", "conv2d_2 in layers.3"],
        "dilated conv2d": ["conv2d_3 in layers.2"],
    }
    assert "cannot integerize: 3 graph nodes use 2 operators that have no integer form" in str(caught.value)
    assert "  grouped conv2d (2): conv2d_1 in layers.1, conv2d_2 in layers.3" in str(caught.value)


ATTENTION = """
layer_norm int8[5, 24]
linear int32[5, 72]
requantize int8[5, 72]
reshape int8[5, 3, 3, 8]
permute int8[3, 3, 5, 8]
slice int8[1, 3, 5, 8]
reshape int8[3, 5, 8]
reshape int8[5, 3, 3, 8]
permute int8[3, 3, 5, 8]
slice int8[1, 3, 5, 8]
reshape int8[3, 5, 8]
matmul int32[3, 5, 5]
requantize int8[3, 5, 5]
exponentials uint8[3, 5, 5]
row_sum int32[3, 5, 1]
reshape int8[5, 3, 3, 8]
permute int8[3, 3, 5, 8]
slice int8[1, 3, 5, 8]
reshape int8[3, 5, 8]
matmul int32[3, 5, 8]
normalize_rows int8[3, 5, 8]
permute int8[5, 3, 8]
reshape int8[5, 24]
linear int32[5, 24]
add int16[5, 24]"""
MLP = """
layer_norm int8[5, 24]
linear int32[5, 48]
requantize int8[5, 48]
lookup int8[5, 48]
linear int32[5, 24]
add int16[5, 24]"""
PROGRAM = f"""
quantize int8[1, 8, 8]
patches int8[4, 16]
linear int32[4, 24]
requantize int16[4, 24]
concat int16[5, 24]
add int16[5, 24]{ATTENTION}{MLP}{ATTENTION}{MLP}
layer_norm int8[5, 24]
slice int8[1, 24]
reshape int8[24]
linear int32[10]
dequantize float32[10]
"""


def test_the_program_of_two_blocks() -> None:
    """Operators and types of the whole program, as text: nothing is there that a ViT does not need."""
    program = integerize(calibrated("ours"))
    assert "\n" + "".join(f"{node.op} {node.type}\n" for node in program.nodes) == PROGRAM


def test_names_tell_where_things_come_from() -> None:
    """Constants are named after parameters, nodes after the traced operation, and sources after modules."""
    program = integerize(calibrated("ours"))
    expected = {"blocks.0.attn.qkv.weight.codes", "blocks.0.attn.qkv.bias.codes", "pos_embed.codes"}
    assert expected <= set(program.constants)
    sources = {node.source for node in program.nodes if node.op == "linear"}
    assert {"patch_embed.proj", "blocks.1.mlp.fc2", "head"} <= sources


def test_the_same_calibration_gives_the_same_program() -> None:
    """Integerizing twice gives equal programs, and equal text."""
    first, second = (integerize(calibrated("swin")) for _ in range(2))
    assert first == second
    assert first.to_text() == second.to_text()


def test_inputs_and_outputs_keep_their_names() -> None:
    """The program's doors are the graph's, with their shapes."""
    program, graph = integerize(calibrated("ours")), traced("ours")
    assert [(name, kind.shape, kind.dtype) for name, kind in program.inputs] == [
        (name, shape, "float32") for name, shape in graph.inputs
    ]
    assert [name for name, _ in program.outputs] == [name for name, _ in graph.outputs] == ["output"]
