"""Codebooks at the operands of products: their levels are the simulation's, and a table is all they cost."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.codebooks import GELU_LOW, with_codebooks
from support.models import Formula, calibrated, images, recipe, spread
from support.stepwise import steps_apart
from torch import Tensor, nn
from torch.nn import functional

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import execute
from calibration.integerize import integerize
from calibration.published import reading_formats
from calibration.simulate import apply, simulate
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.adalog import adalog
from quantizers.codebook import CodebookQParams, levels_of, nearest_levels, uniform_codebook
from quantizers.errors import UsageError
from quantizers.families import FAMILIES, candidates
from quantizers.integer.interpret import interpret, run
from quantizers.integer.program import IntegerProgram, Node
from quantizers.integer.verify import verify
from quantizers.logarithm import log2, log_sqrt2
from quantizers.tangent import tangent

OPERANDS = ("linear_input", "activation_output", "query", "key", "value")
IVIT = named_recipe("ivit", "w8a8")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def producers(program: IntegerProgram) -> dict[str, Node]:
    return {node.name: node for node in program.nodes}


def inputs_of(program: IntegerProgram, weight: str) -> list[Node]:
    """Return the nodes behind the input of a linear, nearest first, up to the operator that computes."""
    nodes, found = producers(program), []
    (name,) = (node.inputs[0] for node in program.nodes if node.op == "linear" and node.inputs[1] == weight)
    while not found or found[-1].op in ("reshape", "permute", "slice", "lookup", "requantize"):
        found.append(nodes[name])
        name = nodes[name].inputs[0]
    return found


def calibrated_formula(
    formula: object, *layers: nn.Module, shape: tuple[int, ...] = (6, 8)
) -> tuple[Calibrated, Tensor]:
    x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))
    graph = trace(spread(Formula(formula, *layers)), (x[:2],))
    return calibrate(graph, [(i,) for i in x], recipe()), x


# The numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["ours", "swin"])
def test_levels_are_the_simulations(name: str, family: str, bits: int) -> None:
    """Given the same input codes, levels are the simulation's, or those a carrier step beside the value."""
    codebook = candidates(family, bits)[-1]
    result = with_codebooks(calibrated(name), dict.fromkeys(OPERANDS, codebook))
    apart = steps_apart(result, images(name, 4, seed=9))
    assert {entry.site.name for entry in result.sites if entry.site.kind in OPERANDS} <= set(apart)
    for site, steps in apart.items():
        assert float(steps.max()) <= 1, site
        if re.search(r"mlp\.fc2\.input", site):
            # The table of a function goes from codes to levels without a carrier between them.
            assert float(steps.max()) == 0, site


@pytest.mark.parametrize("name", ["ours", "swin"])
def test_integers_are_as_good_as_the_simulation(name: str) -> None:
    """With a codebook at every operand the integers are as close to float as the simulation is.

    They need not be the simulation's: a value within a carrier step of a threshold is as near to the one level as
    to the other, and either choice errs as little.
    """
    x, codebook = images(name, 8, seed=5), tangent(6, 1.2)
    result = with_codebooks(calibrated(name), {**dict.fromkeys(OPERANDS, codebook), "probability": log_sqrt2(6)})
    (exact,), (simulated,) = execute(result.float_graph(), (x,)), simulate(result, (x,))
    (integers,) = interpret(integerize(result), x)
    assert relative(integers, exact) < 1.3 * relative(simulated, exact)


@pytest.mark.parametrize("name", ["ours", "swin"])
def test_published_forms_write_the_carrier_first(name: str) -> None:
    """Operator by operator the simulation's levels; ShiftGELU is rescaled to the carrier, then read from a table."""
    result = with_codebooks(calibrated(name, IVIT), dict.fromkeys(OPERANDS, tangent(6, 1.2)))
    for site, steps in steps_apart(result, images(name, 4, seed=9)).items():
        assert float(steps.max()) <= 1, site
    program = integerize(result)
    found = [
        inputs_of(program, node.inputs[1]) for node in program.nodes if node.op == "linear" and "fc2" in node.inputs[1]
    ]
    assert [[node.op for node in nodes] for nodes in found] == [["lookup", "requantize", "shift_gelu"]] * len(found)
    assert {(nodes[1].type.dtype, nodes[1].attributes["qmax"]) for nodes in found} == {("uint8", 255)}


@pytest.mark.parametrize(
    ("formula", "kinds"),
    [
        (lambda x, a, b: b(functional.silu(a(x)) * a(x)), ("multiply_input", "linear_input")),
        (lambda x, a, b: b(torch.tanh(a(x)) * torch.linspace(-1, 1, 8)), ("multiply_input", "constant")),
        (lambda x, a, b: a(x) @ b(x).transpose(1, 2), ("matmul_left", "matmul_right")),
        (lambda x, a, b: (a(x) @ b(x).transpose(1, 2)) @ (b(x) / 3), ("matmul_left", "matmul_right")),
        (lambda x, a, b: (0.3 * a(x) @ b(x).mT).softmax(-1) @ b(x).reshape(-1, 6, 8), ("query", "key", "value")),
        (lambda x, a, b: a(functional.pad(functional.gelu(b(x))[..., 1:5], (1, 3))), ("linear_input",)),
        (lambda x, a, b: a(torch.cat([b(x)[:, :2], functional.relu(b(x)), x], 1) * 0.7), ("linear_input",)),
        (lambda x, a, b: b(a(x) * -0.7), ("linear_input",)),
        (lambda x, a, b: b(a(x).softmax(-1)) + x, ("linear_input",)),
        (lambda x, a, b: b(a(x) + functional.hardswish(x)), ("linear_input",)),
        (lambda x, a, b: b(x / 255.0) + a(x), ("image",)),
    ],
)
def test_requests_pass_on_as_uniform_ones_do(formula: object, kinds: tuple[str, ...]) -> None:
    """Through views, scalings, concatenations with constants, and from every operator; one structure at a time."""
    result, x = calibrated_formula(formula, nn.Linear(8, 8), nn.Linear(8, 8))
    changed = with_codebooks(result, dict.fromkeys(kinds, tangent(6, 1.2)))
    assert all(float(steps.max()) <= 1 for steps in steps_apart(changed, x).values())
    (exact,), (simulated,) = execute(changed.float_graph(), (x,)), simulate(changed, (x,))
    assert relative(interpret(integerize(changed), x)[0], exact) < 1.3 * relative(simulated, exact)


def test_a_convolution_reads_levels() -> None:
    """Padding is real zero: the level of the zero point."""
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=(1, 2))
    result, x = calibrated_formula(lambda x, a, b: b(functional.relu(a(x))), *layers, shape=(3, 6, 8))
    changed = with_codebooks(result, {"activation_output": log_sqrt2(4)})
    assert all(float(steps.max()) == 0 for site, steps in steps_apart(changed, x).items() if "layers.1" in site)
    (integers,), (simulated,) = interpret(integerize(changed), x), simulate(changed, (x,))
    assert relative(integers, simulated) < 0.01
    second = [node for node in integerize(changed).nodes if node.op == "patches"][1]
    assert (second.type.dtype, second.attributes["pad_value"]) == ("uint8", 128)


def test_constants_are_encoded_directly() -> None:
    """Without the carrier: the levels nearest to the real values."""
    factors = torch.linspace(-1, 1, 8)
    result, _ = calibrated_formula(lambda x, a, b: b(torch.tanh(a(x)) * factors), nn.Linear(8, 8), nn.Linear(8, 8))
    changed = with_codebooks(result, {"constant": log2(3)})
    (entry,) = (e for e in changed.sites if e.site.kind == "constant")
    found = integerize(changed).constants[f"{entry.site.value}.codes"]
    assert found.dtype == np.uint8
    assert np.array_equal(found.reshape(-1), levels_of(factors, entry.qparams))


# The program ----------------------------------------------------------------------------------------


def test_a_function_goes_straight_to_levels() -> None:
    """GELU into fc2 keeps its one lookup; the entries are the nearest levels of the function's values."""
    uniform, codebook = calibrated("ours"), adalog(4, 20)
    result = with_codebooks(uniform, {r".*\.mlp\.fc2\.input": codebook}, low=GELU_LOW)
    program = integerize(result)
    assert [node.op for node in program.nodes] == [node.op for node in integerize(uniform).nodes]
    table, gelu, _ = inputs_of(program, "blocks.0.mlp.fc2.weight.codes")[0:3]
    assert (table.op, table.type.dtype, gelu.op) == ("lookup", "uint8", "requantize")
    formats = {entry.site.name: entry.qparams for entry in result.sites}
    source, target = formats["blocks.0.mlp.act.input"], formats["blocks.0.mlp.fc2.input"]
    reals = torch.from_numpy((np.arange(-128, 128) - source.zero_point) * source.scale[0])
    found = program.constants[table.inputs[1]]
    assert np.array_equal(found, levels_of(functional.gelu(reals).float(), target))
    assert set(found.tolist()) <= set(codebook.levels)


def test_other_operators_write_the_carrier() -> None:
    """Norms, divisions and rescalings write 0 to 255 in steps of a level; a lookup of the nearest levels follows."""
    codebook = log_sqrt2(4)
    result = with_codebooks(calibrated("ours"), {"linear_input": codebook, "value": codebook})
    program = integerize(result)
    for weight, expected in {
        "blocks.0.attn.qkv": ["lookup", "layer_norm"],
        "blocks.0.attn.proj": ["reshape", "permute", "lookup", "normalize_rows"],
        "blocks.0.mlp.fc1": ["lookup", "layer_norm"],
    }.items():
        nodes = inputs_of(program, f"{weight}.weight.codes")
        assert [node.op for node in nodes] == expected
        lookup, source = nodes[-2:]
        assert (source.type.dtype, source.attributes["qmin"], source.attributes["qmax"]) == ("uint8", 0, 255)
        assert np.array_equal(program.constants[lookup.inputs[1]], nearest_levels(np.arange(256), codebook))


def test_the_proof_uses_the_levels() -> None:
    """Sums are bounded by the largest level of the table, not by the byte that holds it."""
    result = with_codebooks(calibrated("ours"), {r".*\.mlp\.fc2\.input": uniform_codebook(4)}, low=0.0)
    program = integerize(result)
    bounds = verify(program)
    (linear,) = (node for node in program.nodes if node.inputs[1:2] == ("blocks.0.mlp.fc2.weight.codes",))
    assert bounds[linear.inputs[0]].high <= 15
    weight = program.constants[linear.inputs[1]].astype(int)
    reach = 15 * np.abs(weight).sum(1) + np.abs(program.constants[linear.inputs[2]].astype(int))
    assert bounds[linear.name].magnitude <= reach.max()
    values = run(program, (images("ours", 5),))
    assert int(values[linear.inputs[0]].max()) <= 15


@pytest.mark.parametrize(
    ("kinds", "requantizes"),
    [((), 1), (("query", "key", "value"), 1), (("value",), 3), (("query", "key"), 3)],
)
def test_a_fused_projection_shares_a_requantize_among_equal_codes(kinds: tuple[str, ...], requantizes: int) -> None:
    """Uniform formats share one, and so do carriers; where both are among the readers each has its own."""
    result = calibrated("ours")
    if kinds:
        result = with_codebooks(result, dict.fromkeys(kinds, tangent(6, 1.2)))
    program = integerize(result)
    for node in program.nodes:
        if node.op == "linear" and ".qkv." in node.inputs[1]:
            assert [n.op for n in program.nodes if node.name in n.inputs] == ["requantize"] * requantizes
    assert all(float(steps.max()) <= 1 for steps in steps_apart(result, images("ours", 4, seed=9)).values())


def test_a_sum_of_the_published_form_is_rounded_to_the_carrier() -> None:
    """The steps of a sum that only a codebook reads are those of its carrier."""
    result, _ = calibrated_formula(lambda x, a, b: b(a(x) + x), nn.Linear(8, 8), nn.Linear(8, 8))
    changed = with_codebooks(result, {"layers.1.input": tangent(6, 1.2)})
    (add,) = (operation for operation in changed.graph.operations if operation.op == "add")
    (qparams,) = (e.qparams for e in changed.sites if e.site.name == "layers.1.input")
    assert isinstance(qparams, CodebookQParams)
    assert reading_formats(changed.graph, changed.by_edge(), add.name) == {qparams.carrier}


@pytest.mark.parametrize("kind", ["scores", "residual", "activation_input"])
def test_a_codebook_elsewhere_is_refused(kind: str) -> None:
    """What is no operand of a product needs evenly spaced codes: the error says where, and what to choose."""
    result = with_codebooks(calibrated("ours"), {kind: tangent(8, 1.2)})
    with pytest.raises(UsageError, match=r"in levels of tangent\(alpha=1.2\); only activations .* choose a uniform"):
        integerize(result)


def test_simulation_knows_what_the_carrier_means() -> None:
    """Levels are values of the carrier, so that a value on a level passes both roundings unchanged."""
    qparams = CodebookQParams(log_sqrt2(4), 0.125, 128)
    values = (torch.tensor(qparams.codebook.levels) - 128) * 0.125
    assert torch.equal(apply(qparams.carrier, values), values)
    assert torch.equal(apply(qparams, values), values)
